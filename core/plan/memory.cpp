// Letters: D hidden, H heads, G heads of keys and values, W width of a feed-forward, K active experts a token.
#include "core/plan/memory.h"

#include "core/base/error.h"
#include "core/plan/count.h"

#include <algorithm>
#include <map>

namespace moe::plan {
namespace {
/// Of a head's logits in fp32 that exist at a time on a GPU (kernels/head/head_loss.h).
constexpr double kLogitBytes = 1600 << 20;

/// Bytes of an element.
struct Sizes {
    double compute = 4, master = 4, grad = 4, moments = 4;
    double num_moments = 2;
    bool is_split = false;                        ///< fp32 masters made of bf16 weights and what these lack
    double copies = 0;                            ///< of a weight in E4M3: straight and transposed
};

/// Of a master weight beside a weight of `compute` bytes.
double beside(double compute, const Sizes& s) { return compute == s.master ? 0 : s.is_split ? s.master - compute : s.master; }

Sizes sizes_of(const TrainingConfig& t) {
    Sizes s;
    std::string precision = t.precision();
    if (precision == "fp64") s.compute = s.master = s.grad = s.moments = 8;
    if (precision == "bf16" || precision == "fp16" || precision == "fp8") s.compute = 2;
    if (precision == "fp8") s.copies = 2;
    s.is_split = precision == "bf16" || precision == "fp8";
    if (t.grads_dtype == "bf16") s.grad = 2;
    if (t.moments_dtype == "bf16") s.moments = 2;
    if (t.optimizer == "sgd") s.num_moments = t.momentum == 0 ? 0 : 1;
    return s;
}

/// Sizes of the axes that the ranks are split into.
struct Axes {
    int64_t tp = 1, pp = 1, ep = 1, dp = 1;
    int64_t in_stage() const { return dp * tp; }
};

Axes axes_of(const DistributedConfig& d, int64_t ranks) {
    Axes a{d.tensor_parallel_size, d.pipeline_parallel_size, d.expert_parallel_size, 1};
    MOE_CHECK(a.tp >= 1 && a.pp >= 1 && ranks >= 1 && ranks % (a.tp * a.pp) == 0, config, "distributed.tensor_parallel_size",
              fmt::format("tensor_parallel_size {} x pipeline_parallel_size {} on {} ranks", a.tp, a.pp, ranks), "a product that divides the number of ranks",
              fmt::format("start {} ranks (--ranks {}), or change the sizes", a.tp * a.pp, a.tp * a.pp));
    a.dp = ranks / (a.tp * a.pp);
    MOE_CHECK(a.ep >= 1 && a.in_stage() % a.ep == 0, config, "distributed.expert_parallel_size", fmt::format("{}", a.ep),
              fmt::format("a divisor of data_parallel_size x tensor_parallel_size, which is {}", a.in_stage()), "");
    return a;
}

/// Parameters of one rank by how they are held: what the store calls its buckets.
struct Held {
    double dense = 0, tensor = 0, expert = 0, router = 0;
};

/// Weights of one attention that tensor parallel cuts: the up-projections and the output.
double cut_attention(const ModelConfig& model) {
    const MlaConfig& m = model.mla;
    int64_t queries = m.num_heads * model.qk_head_dim() * m.q_lora_rank.value_or(m.d_model), keys = model.num_kv_heads() * (m.qk_nope_head_dim + m.v_head_dim) * m.d_latent;
    return double(queries + keys + m.d_model * m.num_heads * m.v_head_dim);
}

/// Adds `share` of some layers' parameters.
void add(Held& held, const std::vector<Part>& parts, double num_layers, const ModelConfig& model, const Axes& axes, double share) {
    std::map<std::string, double> of;
    for (const Part& p : parts) of[p.name] = double(p.total) * share;
    double cut = (num_layers * cut_attention(model)) * share + of["dense"] + of["shared"];
    held.dense += of["attention"] + of["dense"] + of["shared"] + of["norms"] - cut;
    held.tensor += cut / double(axes.tp);
    held.expert += of["experts"] / double(axes.ep);
    held.router += of["router"];
}

int64_t sum(const std::vector<Part>& parts) {
    int64_t total = 0;
    for (const Part& p : parts) total += p.total;
    return total;
}

Held held_by_fullest_stage(const Config& c, const Axes& axes) {
    const ModelConfig& m = c.model;
    int64_t depth = c.training.mtp_depth(), num_moe = m.num_moe_layers();
    Counts counts = count(m, depth);
    Held held;
    int64_t most = (m.num_layers + axes.pp - 1) / axes.pp;      // layers of the stage that has most
    auto layers = layer_parts(m, m.num_layers - num_moe, num_moe), modules = layer_parts(m, 0, depth);
    add(held, layers, double(m.num_layers), m, axes, double(most) / double(m.num_layers));
    Held end;
    add(end, modules, double(depth), m, axes, 1);
    // Outside of layers: the last norm and the head, and the joints and norms of MTP modules.
    double table = double(counts.part("embedding").total);
    end.dense += double(counts.total_with_mtp() - sum(layers) - sum(modules)) - table;
    bool embedding_too = axes.pp == 1 || depth > 0 || m.tie_word_embeddings;      // the last stage has it, too
    held.dense += end.dense + (embedding_too ? table : 0);
    held.tensor += end.tensor;
    held.expert += end.expert;
    held.router += end.router;
    return held;
}

/// A segment of a layer: elements in the compute type that a token keeps of it from forward to backward, beyond what it reads, and all that its backward has at once.
struct SegmentMemory {
    std::string kind;
    double kept, in_backward;
    double flops;                                 ///< of a token's forward
};

/// Those that keep more than a token's row. What a segment reads is another's, or the residual stream (two rows a layer); dropouts are not counted.
std::vector<SegmentMemory> segments_of(const ModelConfig& model, bool is_moe, double seq_length) {
    const MlaConfig& m = model.mla;
    double D = double(m.d_model), H = double(m.num_heads), qk = H * double(model.qk_head_dim()), v = H * double(m.v_head_dim), L = double(m.d_latent), lora = double(m.q_lora_rank.value_or(0));
    double kv = double(model.num_kv_heads() * (m.qk_nope_head_dim + m.v_head_dim)), rope = double(m.qk_rope_head_dim);
    // The normed input, both latents before and after their norms, queries and keys as attention takes them, keys and values, the output.
    double kept = D + 2 * (lora + L) + rope + 2 * qk + kv + v;
    double projections = lora > 0 ? D * lora + lora * qk : D * qk;
    std::vector<SegmentMemory> list = {{"attention", kept, 2 * qk + kv + v, 2 * (projections + D * (L + rope) + L * kv + v * D) + (qk + v) * seq_length}};
    // In backward: the output's gradient and those of the activation and of gate and up, while the activation itself has gone.
    auto feed_forward = [&](const char* kind, double rows, double width, double own_input) { list.push_back({kind, own_input + rows * 3 * width, rows * (D + 2 * width), 2 * rows * 3 * D * width}); };
    if (!is_moe) {
        feed_forward("feed_forward", 1, double(model.dense_width()), D);
        return list;
    }
    double K = double(model.moe.num_experts_per_token);
    list.push_back({"route", D, D, 0});
    list.push_back({"dispatch", K * D, 0, 0});    // its rows are what experts read: never computed again by themselves
    feed_forward("experts", K, double(model.moe.expert_intermediate_size), 0);
    if (double width = double(model.shared_width()); width > 0) feed_forward("shared_experts", 1, width, 0);
    return list;
}

bool can_recompute(const SegmentMemory& s) { return s.kind != "route" && s.kind != "dispatch"; }
std::string segment_name(int64_t layer, const std::string& kind) { return fmt::format("layers.{}.{}", layer, kind); }
bool is_recomputed(const TrainingConfig& t, int64_t layer, const SegmentMemory& s) {
    auto has = [&](const std::string& name) { return std::find(t.recompute.begin(), t.recompute.end(), name) != t.recompute.end(); };
    return t.gradient_checkpointing == "selective" && can_recompute(s) && (has(s.kind) || has(segment_name(layer, s.kind)));
}
int64_t num_layers(const Config& c) { return c.model.num_layers + c.training.mtp_depth(); }

double activations_of(const Config& c, const Axes& axes, const Sizes& s) {
    const ModelConfig& m = c.model;
    double tokens = double(c.training.micro_batch_size * c.training.seq_length), D = double(m.mla.d_model);
    double kept = 0, largest = 0;
    bool full = c.training.gradient_checkpointing == "full";
    for (int64_t layer = 0; layer < num_layers(c); ++layer) {
        kept += full ? D : 2 * D;
        double whole = 0;
        for (const SegmentMemory& segment : segments_of(m, m.is_moe_layer(layer), double(c.training.seq_length))) {
            bool again = is_recomputed(c.training, layer, segment);
            if (!full && !again) kept += segment.kept;
            whole += segment.kept;
            largest = std::max(largest, segment.in_backward + (again ? segment.kept : 0));
        }
        if (full) largest = std::max(largest, whole);
    }
    int64_t micro_batches = std::max<int64_t>(1, c.training.global_batch_size / axes.dp / c.training.micro_batch_size);
    int64_t in_flight = axes.pp == 1 ? 1 : c.distributed.pipeline_schedule == "gpipe" ? micro_batches : std::min(axes.pp, micro_batches);
    double head = std::min(kLogitBytes, tokens * double(m.vocab()) * 4);
    return tokens * s.compute / double(axes.tp) * double(in_flight) * kept / double(axes.pp) + std::max(head, tokens * s.compute / double(axes.tp) * largest);
}
}  // namespace

std::vector<std::string> choose_recompute(const Config& config, int64_t ranks, double budget) {
    struct Candidate {
        std::string name;
        double kept, flops;
    };
    std::vector<Candidate> candidates;
    for (int64_t layer = 0; layer < num_layers(config); ++layer)
        for (const SegmentMemory& s : segments_of(config.model, config.model.is_moe_layer(layer), double(config.training.seq_length)))
            if (can_recompute(s)) candidates.push_back({segment_name(layer, s.kind), s.kept, s.flops});
    std::stable_sort(candidates.begin(), candidates.end(), [](const Candidate& a, const Candidate& b) { return a.flops * b.kept < b.flops * a.kept; });
    Config c = config;
    c.training.gradient_checkpointing = "selective";
    c.training.recompute.clear();
    for (const Candidate& candidate : candidates) {
        if (memory(c, ranks).total() <= budget) break;
        c.training.recompute.push_back(candidate.name);
    }
    return c.training.recompute;
}

Memory memory(const Config& config, int64_t ranks) {
    Axes axes = axes_of(config.distributed, ranks);
    Sizes s = sizes_of(config.training);
    Held held = held_by_fullest_stage(config, axes);
    int64_t stage = config.distributed.zero_stage;
    Memory out;
    auto bucket = [&](double elements, int64_t group, double compute) {
        double own = elements / double(group);
        out.weights += (stage >= 3 ? own : elements) * compute;
        out.gradients += (stage >= 2 ? own : elements) * s.grad;
        out.optimizer += (stage >= 1 ? own : elements) * (beside(compute, s) + s.num_moments * s.moments);
    };
    bucket(held.dense, axes.in_stage(), s.compute);
    bucket(held.tensor, axes.dp, s.compute);
    bucket(held.expert, axes.in_stage() / axes.ep, s.compute);
    bucket(held.router, axes.in_stage(), s.master);
    out.weights += (held.dense + held.tensor + held.expert) * s.copies;              // a bound: embedding and head have none; whole also where ZeRO 3 cuts
    out.activations = activations_of(config, axes, s);
    return out;
}
}  // namespace moe::plan
