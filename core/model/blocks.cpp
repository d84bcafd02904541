// Embedding, attention and dense feed-forward. Letters: T tokens, D hidden, H heads, G key heads, L latent.
#include "core/model/model.h"

#include "core/base/error.h"
#include "core/kernels/embed/embed.h"
#include "core/kernels/linear/linear.h"
#include "core/kernels/norm/rmsnorm.h"
#include "core/kernels/swiglu/swiglu.h"

#include <ATen/TensorOperators.h>

#include <cmath>
#include <utility>

namespace moe {
namespace {
/// The norms of the two latents keep their own epsilon whatever norm_eps says: so does the model that the checkpoints were made
/// for. Source: DeepseekV3Attention of transformers, whose q_a_layernorm and kv_a_layernorm take the default.
constexpr double kLatentNormEps = 1e-6;

kernels::YarnSettings yarn_of(const MlaConfig& mla) {
    kernels::YarnSettings y;
    if (!mla.rope_scaling) return y;
    auto& r = *mla.rope_scaling;
    y = {r.factor, r.beta_fast, r.beta_slow, r.mscale, r.mscale_all_dim, r.original_max_position_embeddings};
    return y;
}
}  // namespace

void Model::add_embed() {
    add("embed", -1, {"anchor"}, {"residual"}, {embedding_}, [this](const Tensors& in, Call& call) -> Tensors { return {kernels::embed(in[0], call.batch.ids_T, embedding_)}; });
}

const kernels::RopeTable& Model::rope(int64_t S) {
    auto& c = config_.model.mla;
    auto dtype = options_.precision.compute == at::kDouble ? at::kDouble : at::kFloat;
    auto found = rope_tables_.find(S);
    if (found == rope_tables_.end())
        found = rope_tables_.emplace(S, kernels::rope_table(S, c.qk_rope_head_dim, c.rope_theta, c.rope_interleave, yarn_of(c), dtype, options_.device)).first;
    return found->second;
}

kernels::RandomRows Model::rows_of(Purpose purpose, int64_t layer, const MicroBatch& batch) const {
    return {{uint64_t(config_.seed), purpose, batch.step, uint32_t(layer)}, batch.first_token};
}

void Model::add_attention(int64_t layer) {
    auto& c = config_.model.mla;
    std::string p = layer_prefix(layer), a = p + "self_attn.";
    int64_t D = c.d_model, H = c.num_heads, G = config_.model.num_kv_heads(), L = c.d_latent, rope_dim = c.use_rope ? c.qk_rope_head_dim : 0, tp = mesh_.tp.size();
    int64_t qk = c.qk_nope_head_dim + rope_dim;
    auto input_norm = norm(p + "input_layernorm", D);
    WeightPtr q_a, q_norm, q;
    if (c.q_lora_rank) {
        q_a = projection(a + "q_a_proj", *c.q_lora_rank, D);
        q_norm = rms_gamma(a + "q_a_layernorm", *c.q_lora_rank);
        q = projection(a + "q_b_proj", H * qk, *c.q_lora_rank, 0);
    } else {
        q = projection(a + "q_proj", H * qk, D, 0);
    }
    auto kv_a = projection(a + "kv_a_proj_with_mqa", L + rope_dim, D);
    auto kv_norm = rms_gamma(a + "kv_a_layernorm", L);
    auto kv_b = projection(a + "kv_b_proj", G * (c.qk_nope_head_dim + c.v_head_dim), L, 0);
    auto out = projection(a + "o_proj", D, H * c.v_head_dim, 1);
    kernels::MlaShape shape{0, 0, H / tp, G / tp, c.qk_nope_head_dim, rope_dim, c.v_head_dim, kernels::yarn_softmax_correction(yarn_of(c)) / std::sqrt(double(qk)), c.sliding_window.value_or(0)};
    std::vector<WeightPtr> weights = {input_norm.gamma, input_norm.beta, q_a, q_norm, q, kv_a, kv_norm, kv_b, out};
    const int below = std::exchange(residual_products_, 1);

    add(fmt::format("layers.{}.attention", layer), layer, {"residual"}, {"residual"}, weights, [=, this](const Tensors& in, Call& call) -> Tensors {
        const MicroBatch& batch = call.batch;
        const bool fp8 = options_.precision.fp8;
        kernels::MlaShape s = shape;
        s.B = batch.B;
        s.S = batch.S;
        auto [normed_TD, x_TD] = branch(in[0], input_norm, 2, below);
        Tensor h_TD = layout_.tp.enter(normed_TD);                               // from here on all tokens of the micro-batch, this rank's heads
        auto of_h = kernels::linears(h_TD, {q_a ? q_a : q, kv_a});
        Tensor q_T = q_a ? kernels::linear(kernels::rmsnorm(of_h[0], q_norm, kLatentNormEps, {fp8, fp8}), q) : of_h[0], kv_a_T = of_h[1], latent_TL = kv_a_T, k_rope;
        if (rope_dim > 0) {
            auto parts = kv_a_T.split_with_sizes({L, rope_dim}, -1);
            latent_TL = parts[0].contiguous();
            k_rope = parts[1].contiguous();
        }
        Tensor kv_T = layout_.cp.gather(kernels::linear(kernels::rmsnorm(latent_TL, kv_norm, kLatentNormEps, {fp8, 0}), kv_b));
        const kernels::RopeTable& table = rope_dim > 0 ? rope(s.S) : kernels::RopeTable{};
        double dropped = batch.training ? config_.model.mla.attn_dropout : 0;
        Tensor o_T;
        if (dropped > 0) {
            auto rows = rows_of(Purpose::attention_dropout, layer, batch);
            rows.group = s.H;
            rows.stride = s.H * layout_.tp.group.size();
            rows.first = (batch.first_token - layout_.tp.group.rank() * in[0].size(0)) * rows.stride + layout_.tp.group.rank() * s.H;
            Tensor first = s.window > 0 ? kernels::windowed(batch.doc_start_BS, s.B, s.S, s.window, q_T.device()) : batch.doc_start_BS;
            o_T = kernels::mla_attention_dropout(q_T, kv_T, k_rope, table, s, first, dropped, rows);
        } else {
            o_T = kernels::mla_attention(q_T, kv_T, k_rope, table, s, batch.doc_start_BS, fp8);
        }
        return {layout_.tp.exit(kernels::linear(o_T, out)).add_(x_TD)};
    });
}

void Model::add_dense(int64_t layer) {
    std::string p = layer_prefix(layer);
    int64_t D = config_.model.mla.d_model, width = config_.model.dense_width();
    auto post_norm = norm(p + "post_attention_layernorm", D);
    auto up = gate_up(p + "mlp.", width);
    auto down = projection(p + "mlp.down_proj", D, width, 1);
    const int below = std::exchange(residual_products_, 1);
    add(fmt::format("layers.{}.feed_forward", layer), layer, {"residual"}, {"residual"}, {post_norm.gamma, post_norm.beta, up, down}, [=, this](const Tensors& in, Call&) -> Tensors {
        auto [h_TD, x_TD] = branch(in[0], post_norm, 1, below);
        return {layout_.tp.exit(kernels::linear(kernels::swiglu(kernels::linear(layout_.tp.enter(h_TD), up), {}, up->is_fp8), down)).add_(x_TD)};
    });
}

}  // namespace moe
