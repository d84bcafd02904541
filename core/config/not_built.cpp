#include "core/config/not_built.h"

#include "core/base/json.h"
#include "core/config/load.h"
#include "core/config/schema.h"

#include <algorithm>

namespace moe {
namespace {
using reflect::OrderedJson;

const OrderedJson& value_at(const OrderedJson& root, const std::string& path) {
    std::string pointer = "/" + path;
    std::replace(pointer.begin(), pointer.end(), '.', '/');
    return root.at(OrderedJson::json_pointer(pointer));
}

/// Adds a problem for each key below `path` that differs from its default.
void differing(const OrderedJson& value, const OrderedJson& standard, const std::string& path, const NotBuilt& rule, std::vector<Problem>& out) {
    if (value.is_object() && standard.is_object()) {
        for (auto it = value.begin(); it != value.end(); ++it) differing(it.value(), standard.at(it.key()), reflect::join(path, it.key()), rule, out);
    } else if (value != standard) {
        out.push_back({path, brief(value, 40), brief(standard, 40), "not built yet"});
    }
}
}  // namespace

const std::vector<NotBuilt>& not_built() {
    auto refused = [](const char* path, const char* row) { return NotBuilt{path, row, {}}; };
    auto values = [](const char* path, const char* row, std::vector<std::string> list) { return NotBuilt{path, row, std::move(list)}; };
    static const std::vector<NotBuilt> table = {
        values("model.mla.flash_mla_backend", "A2", {"\"sparse\""}),
        refused("model.mla.fallback_to_dense", "A2"),
        refused("model.mla.sparse_top_k", "A2"),
        refused("model.mla.indexer_heads", "A2"),
        refused("model.mla.indexer_head_dim", "A2"),
        refused("model.mla.use_fp8_kv", "F2"),
        refused("model.mla.use_flash_mla", "A2"),
        refused("distributed.overlap_grad_reduce", "D2"),
        refused("distributed.overlap_param_gather", "D2"),
        refused("model.moe.use_deep_ep", "D3"),
        refused("model.moe.deep_ep_fp8", "D3"),
        refused("model.moe.deep_ep_async", "D3"),
        refused("model.moe.redundant_experts", "D3"),
        refused("training.sft", "B7"),
        refused("training.lora", "B7"),
        refused("training.dpo", "B7"),
        values("data.dataset_type", "C5", {"\"parquet\"", "\"hf\""}),
        refused("data.tokenizer", "C3"),
        refused("data.fim_rate", "C4"),
        refused("logging.statistics.matrices_interval", "G3"),
        refused("logging.statistics.saturation_lag", "G3"),
        refused("logging.alarms", "G3"),
        refused("logging.tensorboard.log_dir", "G2"),
        refused("logging.wandb", "G2"),
        refused("logging.log_rank", "D1"),
        refused("profiling", "B10"),
        values("distributed.backend", "D2", {"\"deepspeed\""}),
        values("distributed.launcher", "D5", {"\"torchrun\"", "\"slurm\"", "\"deepspeed\""}),
        refused("distributed.context_parallel_size", "D1"),
        refused("distributed.replicate_size", "D1"),
        refused("distributed.expert_tensor_parallel_size", "D1"),
        refused("distributed.zero_offload", "D2"),
        refused("distributed.reduce_bucket_bytes", "D2"),
        values("distributed.pipeline_schedule", "D1", {"\"interleaved\"", "\"zero_bubble\"", "\"dualpipev\""}),
        refused("distributed.pipeline_chunks", "D1"),
        refused("distributed.dispatcher", "D3"),
        refused("deepspeed", "D2"),
        refused("slurm", "D6"),
    };
    return table;
}

void require_built(const Config& config) {
    OrderedJson value = to_json(config), standard = to_json(Config());
    std::vector<Problem> out;
    for (const NotBuilt& rule : not_built()) {
        const OrderedJson& item = value_at(value, rule.path);
        bool listed = rule.values.empty() || std::find(rule.values.begin(), rule.values.end(), item.dump()) != rule.values.end();
        if (listed) differing(item, value_at(standard, rule.path), rule.path, rule, out);
    }
    throw_problems(ErrorKind::config, "configuration, keys whose feature is not built yet", out);
}
}  // namespace moe
