// What makes values wrong: one small function a group of keys, each adding its problems.
#include "core/config/load.h"
#include "core/config/schema.h"

#include <cmath>
#include <set>

namespace moe {
namespace {
using Problems = std::vector<Problem>;

/// "name 7 % 2" style helper: adds a problem unless the condition holds.
void need(Problems& out, bool holds, std::string path, std::string got, std::string want, std::string hint = "") {
    if (!holds) out.push_back({std::move(path), std::move(got), std::move(want), std::move(hint)});
}

std::string str(int64_t v) { return fmt::format("{}", v); }

/// Divisibility; a divisor below 1 has its own range problem already.
bool divides(int64_t divisor, int64_t value) { return divisor < 1 || value % divisor == 0; }

void check_attention(const Config& c, Problems& out) {
    const MlaConfig& m = c.model.mla;
    int64_t kv = c.model.num_kv_heads();
    need(out, divides(kv, m.num_heads), "model.mla.num_kv_heads", str(kv), fmt::format("a divisor of num_heads = {}", m.num_heads));
    need(out, m.qk_rope_head_dim % 2 == 0, "model.mla.qk_rope_head_dim", str(m.qk_rope_head_dim), "an even number", "rotary features come in pairs");
    need(out, c.training.seq_length <= m.max_context_length, "training.seq_length", str(c.training.seq_length), fmt::format("at most model.mla.max_context_length = {}", m.max_context_length), "raise max_context_length or shorten the sequences");
    if (m.rope_scaling) {
        const RopeScaling& r = *m.rope_scaling;
        need(out, m.use_rope, "model.mla.rope_scaling", "a value with use_rope = false", "null", "there are no rotary frequencies to scale");
        need(out, r.beta_fast >= r.beta_slow, "model.mla.rope_scaling.beta_fast", fmt::format("{}", r.beta_fast), fmt::format("at least beta_slow = {}", r.beta_slow));
    }
    need(out, m.flash_mla_backend != "sparse" || m.use_flash_mla, "model.mla.flash_mla_backend", "sparse with use_flash_mla = false", "use_flash_mla = true");
}

void check_experts(const Config& c, Problems& out) {
    const MoeConfig& m = c.model.moe;
    const std::string at = "model.moe.";
    need(out, m.num_experts_per_token <= m.num_experts, at + "num_experts_per_token", str(m.num_experts_per_token), fmt::format("at most num_experts = {}", m.num_experts));
    bool grouped = divides(m.n_group, m.num_experts);
    need(out, grouped, at + "n_group", str(m.n_group), fmt::format("a divisor of num_experts = {}", m.num_experts));
    need(out, m.topk_group <= m.n_group, at + "topk_group", str(m.topk_group), fmt::format("at most n_group = {}", m.n_group));
    if (grouped && m.n_group >= 1 && m.topk_group >= 1 && m.topk_group <= m.n_group) {
        int64_t each = m.num_experts / m.n_group;
        need(out, m.topk_group * each >= m.num_experts_per_token || m.num_experts_per_token > m.num_experts, at + "topk_group", fmt::format("{} groups of {} experts", m.topk_group, each),
             fmt::format("at least num_experts_per_token = {} experts to choose from", m.num_experts_per_token), "raise topk_group or lower n_group");
        need(out, m.n_group == 1 || each >= 2 || !m.use_aux_loss_free, at + "n_group", fmt::format("{} groups of 1 expert", m.n_group), "groups of 2 or more with use_aux_loss_free", "a group's score is the sum of its two best experts");
    }
    need(out, m.shared_intermediate_size == 0 || m.num_shared_experts > 0, at + "shared_intermediate_size", fmt::format("{} with num_shared_experts = 0", m.shared_intermediate_size), "0, or num_shared_experts ≥ 1");
    need(out, m.balance_loss_weight == 0 || m.balance_loss_type != "none", at + "balance_loss_weight", fmt::format("{} with balance_loss_type = none", m.balance_loss_weight), "0, or a balance_loss_type");
    int64_t ep = c.distributed.expert_parallel_size;
    need(out, divides(ep, m.num_experts), "distributed.expert_parallel_size", str(ep), fmt::format("a divisor of model.moe.num_experts = {}", m.num_experts));
}

void check_batches(const Config& c, Problems& out) {
    const TrainingConfig& t = c.training;
    int64_t dp = std::max<int64_t>(c.distributed.data_parallel_size, 1);
    std::string ranks = c.distributed.data_parallel_size > 0 ? fmt::format(" × distributed.data_parallel_size = {}", dp) : "";
    need(out, t.dynamic_batch_tokens || divides(t.micro_batch_size * dp, t.global_batch_size), "training.global_batch_size", str(t.global_batch_size), fmt::format("a multiple of micro_batch_size = {}{}", t.micro_batch_size, ranks), "change micro_batch_size, or the global batch to the nearest multiple");
    need(out, !t.batch_size_ramp || !t.dynamic_batch_tokens, "training.dynamic_batch_tokens", fmt::format("{} with a batch_size_ramp", t.dynamic_batch_tokens.value_or(0)), "null, or batch_size_ramp = null", "both say how many sequences a step has");
    if (t.batch_size_ramp) {
        int64_t start = t.batch_size_ramp->start;
        need(out, start <= t.global_batch_size, "training.batch_size_ramp.start", str(start), fmt::format("at most global_batch_size = {}", t.global_batch_size));
        need(out, divides(t.micro_batch_size * dp, start), "training.batch_size_ramp.start", str(start), fmt::format("a multiple of micro_batch_size = {}{}", t.micro_batch_size, ranks));
    }
}

void check_optimizer(const Config& c, Problems& out) {
    const TrainingConfig& t = c.training;
    std::string on;
    int count = 0;
    for (auto [set, name] : {std::pair(t.use_fp64, "use_fp64"), {t.use_fp16, "use_fp16"}, {t.use_bf16, "use_bf16"}, {t.use_fp8, "use_fp8"}})
        if (set) on += (count++ ? ", " : "") + std::string(name);
    need(out, count <= 1, "training." + on.substr(0, on.find(',')), on + " together", "at most one precision", "set the others to false; none is fp32");
    need(out, t.min_learning_rate <= t.learning_rate || t.lr_decay_style == "constant", "training.min_learning_rate", fmt::format("{}", t.min_learning_rate), fmt::format("at most learning_rate = {}", t.learning_rate), "it is where the decay ends");
    need(out, !t.train_steps || t.lr_warmup_steps <= *t.train_steps, "training.lr_warmup_steps", str(t.lr_warmup_steps), fmt::format("at most train_steps = {}", t.train_steps.value_or(0)));
    need(out, !t.use_mtp || t.num_predict_tokens >= 2, "training.num_predict_tokens", str(t.num_predict_tokens), "2 or more with use_mtp", "1 is plain next-token prediction: use_mtp = false");
    need(out, !t.use_mtp || t.num_predict_tokens < t.seq_length, "training.num_predict_tokens", str(t.num_predict_tokens), fmt::format("less than seq_length = {}", t.seq_length));
    need(out, t.recompute.empty() || t.gradient_checkpointing == "selective", "training.recompute", fmt::format("segments with gradient_checkpointing = {}", t.gradient_checkpointing), "gradient_checkpointing = selective");
}

void check_sources(const std::vector<DataSource>& sources, const std::string& path, bool text, bool has_path, Problems& out) {
    std::set<std::string> names;
    double total = 0;
    for (size_t i = 0; i < sources.size(); ++i) {
        const DataSource& s = sources[i];
        std::string at = fmt::format("{}[{}]", path, i);
        need(out, !s.name.empty(), at + ".name", "\"\"", "a name", "it is the domain's name in every table");
        need(out, s.name.empty() || names.insert(s.name).second, at + ".name", "\"" + s.name + "\" twice", "different names");
        need(out, !text || s.path || has_path, at + ".path", "null", "a file or folder", "or set " + path.substr(0, path.rfind('.')) + ".path to the folder that holds the sources");
        total += s.weight;
    }
    need(out, sources.empty() || total > 0, path, "weights that are all 0", "a positive sum of weights");
}

void check_data(const Config& c, Problems& out) {
    bool text = c.data.dataset_type == "text";
    check_sources(c.data.sources, "data.sources", text, c.data.path.has_value(), out);
    check_sources(c.validation.sources, "validation.sources", text, c.validation.path.has_value(), out);
    bool files = text || c.data.dataset_type == "jsonl" || c.data.dataset_type == "tokens" || c.data.dataset_type == "parquet";
    need(out, !files || c.data.path || !c.data.sources.empty(), "data.path", "null with dataset_type = " + c.data.dataset_type, "a file or folder, or data.sources", "or dataset_type = synthetic");
    need(out, !c.validation.enabled || !files || c.validation.path || !c.validation.sources.empty(), "validation.path", "null with validation.enabled", "a file or folder, or validation.sources");
}

void check_ranks(const Config& c, Problems& out) {
    const DistributedConfig& d = c.distributed;
    const std::string at = "distributed.";
    need(out, d.data_parallel_size != 0, at + "data_parallel_size", "0", "-1, or 1 or more");
    int64_t tp = d.tensor_parallel_size, tokens = c.training.micro_batch_size * c.training.seq_length;
    need(out, divides(tp, c.model.mla.num_heads) && divides(tp, c.model.num_kv_heads()) && divides(tp, tokens), at + "tensor_parallel_size", str(tp),
         fmt::format("a divisor of model.mla.num_heads = {}, of the {} key and value heads and of a micro-batch's {} tokens", c.model.mla.num_heads, c.model.num_kv_heads(), tokens));
    int64_t pieces = d.pipeline_parallel_size * d.pipeline_chunks;
    need(out, pieces <= c.model.num_layers, at + "pipeline_parallel_size", fmt::format("{} × pipeline_chunks = {} pieces", d.pipeline_parallel_size, pieces), fmt::format("at most model.num_layers = {}", c.model.num_layers));
    need(out, divides(d.context_parallel_size, c.training.seq_length), at + "context_parallel_size", str(d.context_parallel_size), fmt::format("a divisor of training.seq_length = {}", c.training.seq_length));
    if (d.data_parallel_size > 0) {
        int64_t shared = d.data_parallel_size * d.context_parallel_size * d.tensor_parallel_size;
        int64_t expert = d.expert_parallel_size * d.expert_tensor_parallel_size;
        need(out, divides(expert, shared), at + "expert_parallel_size", fmt::format("{} × expert_tensor_parallel_size = {} ranks", d.expert_parallel_size, expert), fmt::format("a divisor of the {} ranks of a stage", shared), "expert ranks are taken from the data-parallel ones");
        need(out, divides(d.replicate_size, d.data_parallel_size), at + "replicate_size", str(d.replicate_size), fmt::format("a divisor of data_parallel_size = {}", d.data_parallel_size));
    }
    need(out, !d.zero_offload || d.zero_stage >= 1, at + "zero_offload", "true with zero_stage = 0", "zero_stage 1 or more");
}

/// DeepSpeed's values that say something else than the canonical keys: both are shown.
void check_deepspeed(const Config& c, Problems& out) {
    const DeepspeedConfig& d = c.deepspeed;
    if (!d.enabled) return;
    auto same = [&](const char* path, bool equal, std::string theirs, const char* key, std::string ours) {
        need(out, equal, fmt::format("deepspeed.{}", path), theirs, fmt::format("{} = {}", key, ours), "two keys for one thing: make them agree");
    };
    const DeepspeedZero& z = d.zero_optimization;
    same("zero_optimization.stage", !z.stage || *z.stage == c.distributed.zero_stage, str(z.stage.value_or(0)), "distributed.zero_stage", str(c.distributed.zero_stage));
    bool away = z.offload_optimizer.device.value_or("none") != "none" || z.offload_param.device.value_or("none") != "none";
    bool said = z.offload_optimizer.device || z.offload_param.device;
    same("zero_optimization.offload_optimizer", !said || away == c.distributed.zero_offload, away ? "offload" : "none", "distributed.zero_offload", c.distributed.zero_offload ? "true" : "false");
    same("zero_optimization.overlap_comm", !z.overlap_comm || *z.overlap_comm == c.distributed.overlap_grad_reduce, z.overlap_comm.value_or(false) ? "true" : "false", "distributed.overlap_grad_reduce", c.distributed.overlap_grad_reduce ? "true" : "false");
    same("fp16.enabled", !d.fp16.enabled || *d.fp16.enabled == c.training.use_fp16, d.fp16.enabled.value_or(false) ? "true" : "false", "training.use_fp16", c.training.use_fp16 ? "true" : "false");
    same("bf16.enabled", !d.bf16.enabled || *d.bf16.enabled == c.training.use_bf16, d.bf16.enabled.value_or(false) ? "true" : "false", "training.use_bf16", c.training.use_bf16 ? "true" : "false");
    same("gradient_clipping", !d.gradient_clipping || *d.gradient_clipping == c.training.grad_clip, fmt::format("{}", d.gradient_clipping.value_or(0)), "training.grad_clip", fmt::format("{}", c.training.grad_clip));
    int64_t dp = c.distributed.data_parallel_size, at_once = c.training.micro_batch_size * dp;
    if (d.gradient_accumulation_steps && dp > 0 && c.training.global_batch_size % at_once == 0)
        same("gradient_accumulation_steps", *d.gradient_accumulation_steps == c.training.global_batch_size / at_once, str(*d.gradient_accumulation_steps), "global_batch_size / (micro_batch_size × data_parallel_size)", str(c.training.global_batch_size / at_once));
}
}  // namespace

std::vector<Problem> problems(const Config& config) {
    Problems out;
    const reflect::Schema& root = reflect::schema<Config>();
    root.check(root.write(&config), "", out);
    check_attention(config, out);
    check_experts(config, out);
    check_batches(config, out);
    check_optimizer(config, out);
    check_data(config, out);
    check_ranks(config, out);
    check_deepspeed(config, out);
    return out;
}

void validate(const Config& config) { throw_problems(ErrorKind::config, "configuration", problems(config)); }
}  // namespace moe
