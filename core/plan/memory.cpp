// Letters: D hidden, H heads, G heads of keys and values, W width of a feed-forward, K active experts a token.
#include "core/plan/memory.h"

#include "core/base/error.h"
#include "core/plan/count.h"

#include <algorithm>
#include <map>

namespace moe::plan {
namespace {
/// Of the gradient of a head's logits; above it they are made in pieces (kernels/head/head_loss.h).
constexpr double kKeptLogitBytes = 256 << 20;

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

/// Elements that one token keeps of a layer from forward to backward.
double kept_by_layer(const ModelConfig& model, bool is_moe) {
    const MlaConfig& m = model.mla;
    double D = double(m.d_model), qk = double(m.num_heads * model.qk_head_dim()), v = double(m.num_heads * m.v_head_dim);
    double attention = 2 * D + 2 * qk + 2 * v + double(m.d_latent + m.qk_rope_head_dim + m.q_lora_rank.value_or(0)) + double(model.num_kv_heads() * (m.qk_nope_head_dim + m.v_head_dim));
    double K = double(model.moe.num_experts_per_token);
    double feed_forward = is_moe ? K * (2 * D + 3 * double(model.moe.expert_intermediate_size)) + 3 * double(model.shared_width()) : 3 * double(model.dense_width());
    return attention + 2 * D + feed_forward;
}

double activations_of(const Config& c, const Axes& axes, const Sizes& s) {
    const ModelConfig& m = c.model;
    double tokens = double(c.training.micro_batch_size * c.training.seq_length), D = double(m.mla.d_model);
    double kept = 0, largest = 0;
    int64_t layers = m.num_layers + c.training.mtp_depth();
    for (int64_t layer = 0; layer < layers; ++layer) {
        double one = kept_by_layer(m, m.is_moe_layer(layer));
        kept += c.training.gradient_checkpointing == "full" ? D : one;
        largest = std::max(largest, one);
    }
    int64_t micro_batches = std::max<int64_t>(1, c.training.global_batch_size / axes.dp / c.training.micro_batch_size);
    int64_t in_flight = axes.pp == 1 ? 1 : c.distributed.pipeline_schedule == "gpipe" ? micro_batches : std::min(axes.pp, micro_batches);
    double head = double(1 + c.training.mtp_depth()) * std::min(kKeptLogitBytes, tokens * double(m.vocab()) * s.compute);
    // One more layer: the gradients of the one that backward is at.
    return tokens * s.compute / double(axes.tp) * (double(in_flight) * kept / double(axes.pp) + largest) + head;
}
}  // namespace

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
