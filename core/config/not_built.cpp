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
void differing(const OrderedJson& value, const OrderedJson& standard, const std::string& path, std::vector<Problem>& out) {
    if (value.is_object() && standard.is_object()) {
        for (auto it = value.begin(); it != value.end(); ++it) differing(it.value(), standard.at(it.key()), reflect::join(path, it.key()), out);
    } else if (value != standard) {
        out.push_back({path, brief(value, 40), brief(standard, 40), "not built yet"});
    }
}
}  // namespace

const std::vector<NotBuilt>& not_built() {
    auto refused = [](const char* path) { return NotBuilt{path, {}}; };
    auto values = [](const char* path, std::vector<std::string> list) { return NotBuilt{path, std::move(list)}; };
    static const std::vector<NotBuilt> table = {
        values("model.mla.flash_mla_backend", {"\"sparse\""}),
        refused("model.mla.fallback_to_dense"),
        refused("model.mla.sparse_top_k"),
        refused("model.mla.indexer_heads"),
        refused("model.mla.indexer_head_dim"),
        refused("model.mla.use_fp8_kv"),
        refused("model.mla.use_flash_mla"),
        refused("distributed.overlap_grad_reduce"),
        refused("distributed.overlap_param_gather"),
        refused("model.moe.use_deep_ep"),
        refused("model.moe.deep_ep_fp8"),
        refused("model.moe.deep_ep_async"),
        refused("model.moe.redundant_experts"),
        refused("training.sft"),
        refused("training.lora"),
        refused("training.dpo"),
        values("data.dataset_type", {"\"parquet\"", "\"hf\""}),
        refused("data.tokenizer"),
        refused("data.fim_rate"),
        refused("logging.statistics.matrices_interval"),
        refused("logging.statistics.saturation_lag"),
        refused("logging.alarms"),
        refused("logging.tensorboard.log_dir"),
        refused("logging.wandb"),
        refused("logging.log_rank"),
        refused("profiling"),
        values("distributed.backend", {"\"deepspeed\""}),
        values("distributed.launcher", {"\"torchrun\"", "\"slurm\"", "\"deepspeed\""}),
        refused("distributed.context_parallel_size"),
        refused("distributed.replicate_size"),
        refused("distributed.expert_tensor_parallel_size"),
        refused("distributed.zero_offload"),
        refused("distributed.reduce_bucket_bytes"),
        values("distributed.pipeline_schedule", {"\"interleaved\"", "\"zero_bubble\"", "\"dualpipev\""}),
        refused("distributed.pipeline_chunks"),
        refused("distributed.dispatcher"),
        refused("deepspeed"),
        refused("slurm"),
    };
    return table;
}

void require_built(const Config& config) {
    OrderedJson value = to_json(config), standard = to_json(Config());
    std::vector<Problem> out;
    for (const NotBuilt& rule : not_built()) {
        const OrderedJson& item = value_at(value, rule.path);
        bool listed = rule.values.empty() || std::find(rule.values.begin(), rule.values.end(), item.dump()) != rule.values.end();
        if (listed) differing(item, value_at(standard, rule.path), rule.path, out);
    }
    throw_problems(ErrorKind::config, "configuration, keys whose feature is not built yet", out);
}
}  // namespace moe
