// Letters: T tokens, D hidden, H heads, G key heads, L latent, V vocabulary, E experts, F expert width, R rows by expert.
#include "core/model/model.h"

#include "core/base/error.h"
#include "core/config/load.h"
#include "core/kernels/embed/embed.h"
#include "core/kernels/head/head_loss.h"
#include "core/kernels/linear/linear.h"
#include "core/kernels/mla/attention.h"
#include "core/kernels/norm/rmsnorm.h"
#include "core/kernels/swiglu/swiglu.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <cmath>

namespace moe {
namespace {
/// The norms of the two latents keep their own epsilon whatever norm_eps says: so does the model that the checkpoints were made
/// for. Source: DeepseekV3Attention of transformers, whose q_a_layernorm and kv_a_layernorm take the default.
constexpr double kLatentNormEps = 1e-6;

std::string layer_prefix(int64_t layer) { return fmt::format("model.layers.{}.", layer); }

StoreOptions store_options(const Config& config, const ModelOptions& options) {
    StoreOptions s;
    s.precision = options.precision;
    s.device = options.device;
    s.zero_stage = int(config.distributed.zero_stage);
    s.seed = uint64_t(config.seed);
    s.num_moments = options.num_moments;
    s.whole_tensors = config.training.optimizer == "muon";
    s.training = options.training;
    return s;
}

kernels::YarnSettings yarn_of(const MlaConfig& mla) {
    kernels::YarnSettings y;
    if (!mla.rope_scaling) return y;
    auto& r = *mla.rope_scaling;
    y = {r.factor, r.beta_fast, r.beta_slow, r.mscale, r.mscale_all_dim, r.original_max_position_embeddings};
    return y;
}
}  // namespace

Model::Model(const Config& config, const dist::Mesh& mesh, const ModelOptions& options)
    : config_(config), mesh_(mesh), options_(options), layout_(mesh), store_(mesh, store_options(config, options)) {
    validate(config_);
    require_built(config_);
    add_embed();
    for (int64_t layer = 0; layer < config_.model.num_layers; ++layer) {
        add_attention(layer);
        if (config_.model.is_moe_layer(layer)) add_experts(layer);
        else add_dense(layer);
    }
    add_head();
    store_.build();
}

std::string Model::bias_name(int64_t layer) { return layer_prefix(layer) + "mlp.gate.e_score_correction_bias"; }

Tensor Model::bias(int64_t layer) const {
    auto it = bias_.find(layer);
    return it == bias_.end() ? Tensor() : it->second;
}

// ---- weights ----
WeightPtr Model::weight(const std::string& name, std::vector<int64_t> shape, BucketKind bucket) {
    TensorSpec tensor{name + ".weight", shape, config_.model.init_method_std};
    return store_.declare({name, bucket, {tensor}, shape});
}

WeightPtr Model::norm(const std::string& name, int64_t width) {
    TensorSpec tensor{name + ".weight", {width}, 0, 1, /*decay=*/false};
    return store_.declare({name, BucketKind::dense, {tensor}, {width}});
}

/// Gate and up of one feed-forward as one product: [2 · width, D].
WeightPtr Model::gate_up(const std::string& prefix, int64_t width) {
    int64_t D = config_.model.mla.d_model;
    double std = config_.model.init_method_std;
    return store_.declare({prefix + "gate_up", BucketKind::dense, {{prefix + "gate_proj.weight", {width, D}, std}, {prefix + "up_proj.weight", {width, D}, std}}, {2 * width, D}});
}

// ---- segments, in the order in which a token meets them ----
void Model::add_embed() {
    auto table_VD = weight("model.embed_tokens", {config_.model.vocab(), config_.model.mla.d_model});
    segments_.push_back({"embed", -1, {"anchor"}, {"residual"}, [=](const Tensors& in, Call& call) -> Tensors {
        return {kernels::embed(in[0], call.batch.ids_T, table_VD)};
    }});
}

void Model::add_attention(int64_t layer) {
    auto& c = config_.model.mla;
    std::string p = layer_prefix(layer), a = p + "self_attn.";
    int64_t D = c.d_model, H = c.num_heads, G = config_.model.num_kv_heads(), L = c.d_latent, rope = c.use_rope ? c.qk_rope_head_dim : 0;
    int64_t qk = c.qk_nope_head_dim + rope;
    double eps = config_.model.norm_eps;
    auto input_norm = norm(p + "input_layernorm", D);
    WeightPtr q_a, q_norm, q;
    if (c.q_lora_rank) {
        q_a = weight(a + "q_a_proj", {*c.q_lora_rank, D});
        q_norm = norm(a + "q_a_layernorm", *c.q_lora_rank);
        q = weight(a + "q_b_proj", {H * qk, *c.q_lora_rank});
    } else {
        q = weight(a + "q_proj", {H * qk, D});
    }
    auto kv_a = weight(a + "kv_a_proj_with_mqa", {L + rope, D});
    auto kv_norm = norm(a + "kv_a_layernorm", L);
    auto kv_b = weight(a + "kv_b_proj", {G * (c.qk_nope_head_dim + c.v_head_dim), L});
    auto out = weight(a + "o_proj", {D, H * c.v_head_dim});

    auto yarn = yarn_of(c);
    kernels::MlaShape shape{0, 0, H, G, c.qk_nope_head_dim, rope, c.v_head_dim, kernels::yarn_softmax_correction(yarn) / std::sqrt(double(qk))};
    auto table_dtype = options_.precision.compute == at::kDouble ? at::kDouble : at::kFloat;
    auto table = std::make_shared<std::map<int64_t, kernels::RopeTable>>();      // by sequence length

    segments_.push_back({fmt::format("layers.{}.attention", layer), layer, {"residual"}, {"residual"}, [=, this](const Tensors& in, Call& call) -> Tensors {
        const Tensor& x_TD = in[0];
        auto& mla = config_.model.mla;
        kernels::MlaShape s = shape;
        s.B = call.batch.B;
        s.S = call.batch.S;
        if (rope > 0 && !table->contains(s.S))
            table->emplace(s.S, kernels::rope_table(s.S, rope, mla.rope_theta, mla.rope_interleave, yarn, table_dtype, options_.device));
        Tensor h_TD = layout_.tp.enter(kernels::rmsnorm(x_TD, input_norm, eps));
        Tensor q_in = q_a ? kernels::rmsnorm(kernels::linear(h_TD, q_a), q_norm, kLatentNormEps) : h_TD;
        Tensor q_T = kernels::linear(q_in, q), kv_a_T = kernels::linear(h_TD, kv_a), latent_TL = kv_a_T, k_rope;
        if (rope > 0) {
            auto parts = kv_a_T.split_with_sizes({L, rope}, -1);
            latent_TL = parts[0].contiguous();
            k_rope = parts[1].contiguous();
        }
        Tensor kv_T = layout_.cp.gather(kernels::linear(kernels::rmsnorm(latent_TL, kv_norm, kLatentNormEps), kv_b));
        Tensor o_T = kernels::mla_attention(q_T, kv_T, k_rope, rope > 0 ? table->at(s.S) : kernels::RopeTable{}, s, call.batch.doc_start_BS);
        return {x_TD + layout_.tp.exit(kernels::linear(o_T, out))};
    }});
}

void Model::add_dense(int64_t layer) {
    std::string p = layer_prefix(layer);
    int64_t D = config_.model.mla.d_model, width = config_.model.dense_width();
    double eps = config_.model.norm_eps;
    auto post_norm = norm(p + "post_attention_layernorm", D);
    auto up = gate_up(p + "mlp.", width);
    auto down = weight(p + "mlp.down_proj", {D, width});
    segments_.push_back({fmt::format("layers.{}.feed_forward", layer), layer, {"residual"}, {"residual"}, [=, this](const Tensors& in, Call&) -> Tensors {
        Tensor h_TD = layout_.tp.enter(kernels::rmsnorm(in[0], post_norm, eps));
        return {in[0] + layout_.tp.exit(kernels::linear(kernels::swiglu(kernels::linear(h_TD, up)), down))};
    }});
}

void Model::add_experts(int64_t layer) {
    auto& c = config_.model.moe;
    std::string p = layer_prefix(layer), m = p + "mlp.", name = fmt::format("layers.{}.", layer);
    int64_t D = config_.model.mla.d_model, E = c.num_experts, F = c.expert_intermediate_size, shared_width = config_.model.shared_width();
    double eps = config_.model.norm_eps, std = config_.model.init_method_std;
    auto settings = routing::RouterSettings::from(c);
    routed_layers_.push_back(layer);

    auto post_norm = norm(p + "post_attention_layernorm", D);
    auto gate_ED = weight(m + "gate", {E, D}, BucketKind::router);
    Tensor bias_E;
    if (c.use_aux_loss_free) bias_[layer] = bias_E = at::zeros({E}, at::TensorOptions().dtype(options_.precision.master).device(options_.device));
    segments_.push_back({name + "route", layer, {"residual"}, {"hidden", "weights"}, [=](const Tensors& in, Call& call) -> Tensors {
        Tensor h_TD = kernels::rmsnorm(in[0], post_norm, eps);
        Tensor scores_TE = routing::scores(kernels::linear_wide(h_TD, gate_ED), settings);
        Routed& routed = call.batch.routed[layer];
        if (!call.again) {
            routed.ids_TK = routing::choose(scores_TE, bias_E, settings);
            if (call.batch.ledger) call.batch.ledger->count(layer, routed.ids_TK, call.batch.domain_T);
            if (call.batch.trace) call.batch.trace->add(layer, routed.ids_TK);
        }
        return {h_TD, routing::weights(scores_TE, routed.ids_TK, settings)};
    }});

    auto ep = layout_.ep;
    int64_t E_local = E / ep.group.size(), first = ep.group.rank() * E_local;
    segments_.push_back({name + "dispatch", layer, {"hidden", "weights"}, {"rows", "row_weights"}, [=](const Tensors& in, Call& call) -> Tensors {
        Routed& routed = call.batch.routed[layer];
        if (!call.again) {
            routed.by_expert = kernels::sort_by_expert(routed.ids_TK, E);
            routed.offsets = routed.by_expert.offsets_E1;
        }
        auto [rows_RD, weights_R] = kernels::permute(in[0], in[1], routed.by_expert);
        if (ep.group.size() == 1) return {rows_RD, weights_R};
        if (!call.again) {
            routed.across = ep.plan(routed.by_expert.offsets_E1);
            routed.received = kernels::sort_by_expert(routed.across.expert_Q.to(rows_RD.device()), E_local);
            routed.offsets = routed.received.offsets_E1;
        }
        Tensor rows_QD = ep.dispatch(rows_RD, routed.across), weights_Q = ep.dispatch(weights_R, routed.across);
        auto [sorted_QD, sorted_Q] = kernels::permute(rows_QD, weights_Q.unsqueeze(-1), routed.received);
        return {sorted_QD, sorted_Q};
    }});

    WeightSpec up{m + "experts.gate_up", BucketKind::expert, {}, {E_local, 2 * F, D}}, down{m + "experts.down_proj", BucketKind::expert, {}, {E_local, D, F}};
    for (int64_t e = first; e < first + E_local; ++e) {
        std::string x = fmt::format("{}experts.{}.", m, e);
        up.tensors.push_back({x + "gate_proj.weight", {F, D}, std});
        up.tensors.push_back({x + "up_proj.weight", {F, D}, std});
        down.tensors.push_back({x + "down_proj.weight", {D, F}, std});
    }
    auto up_EFD = store_.declare(up), down_EDF = store_.declare(down);
    segments_.push_back({name + "experts", layer, {"rows", "row_weights"}, {"expert_rows"}, [=](const Tensors& in, Call& call) -> Tensors {
        const Tensor& offsets = call.batch.routed[layer].offsets;
        return {kernels::grouped_linear(kernels::swiglu(kernels::grouped_linear(in[0], offsets, up_EFD), in[1]), offsets, down_EDF)};
    }});

    std::vector<std::string> combined = {"residual", "expert_rows"};
    if (shared_width > 0) {
        auto shared_up = gate_up(m + "shared_experts.", shared_width);
        auto shared_down = weight(m + "shared_experts.down_proj", {D, shared_width});
        segments_.push_back({name + "shared_experts", layer, {"hidden"}, {"shared"}, [=, this](const Tensors& in, Call&) -> Tensors {
            return {layout_.tp.exit(kernels::linear(kernels::swiglu(kernels::linear(layout_.tp.enter(in[0]), shared_up)), shared_down))};
        }});
        combined.push_back("shared");
    }
    segments_.push_back({name + "combine", layer, combined, {"residual"}, [=](const Tensors& in, Call& call) -> Tensors {
        Routed& routed = call.batch.routed[layer];
        Tensor base_TD = in.size() > 2 ? in[0] + in[2] : in[0], rows = in[1];
        if (ep.group.size() > 1) rows = ep.combine(kernels::unpermute({}, rows, routed.received), routed.across);
        return {kernels::unpermute(base_TD, rows, routed.by_expert)};
    }});
}

void Model::add_head() {
    int64_t D = config_.model.mla.d_model;
    double eps = config_.model.norm_eps;
    final_norm_ = norm("model.norm", D);
    head_ = weight("lm_head", {config_.model.vocab(), D});
    segments_.push_back({"head", -1, {"residual"}, {"loss"}, [norm = final_norm_, head = head_, eps](const Tensors& in, Call& call) -> Tensors {
        kernels::HeadLossOptions options;
        options.scale = call.batch.loss_scale;
        return {kernels::head_loss(kernels::rmsnorm(in[0], norm, eps), head, call.batch.targets_T, options, call.batch.token_loss)};
    }});
}

// ---- running ----
MicroBatch Model::micro_batch(const Tensor& ids, const Tensor& targets, const Tensor& domain, const Tensor& doc_start) const {
    MOE_CHECK(ids.dim() == 2 && ids.scalar_type() == at::kLong && ids.numel() > 0, shape, "model: ids", fmt::format("{} dims of {}", ids.dim(), c10::toString(ids.scalar_type())), "int64 [batch, time], not empty", "");
    MOE_CHECK(ids.size(1) <= config_.model.mla.max_context_length, shape, "model: sequence length", std::to_string(ids.size(1)),
              fmt::format("at most {}", config_.model.mla.max_context_length), "raise model.mla.max_context_length");
    int64_t low = ids.min().item<int64_t>(), high = ids.max().item<int64_t>(), V = config_.model.vocab();
    MOE_CHECK(low >= 0 && high < V, data, "model: token ids", fmt::format("{} to {}", low, high), fmt::format("0 to {}", V - 1), "the tokenizer and model.vocab_size must agree");
    MicroBatch b;
    b.B = ids.size(0);
    b.S = ids.size(1);
    auto move = [&](const Tensor& t) { return t.to(options_.device).reshape({-1}).contiguous(); };
    b.ids_T = move(ids);
    b.targets_T = targets.defined() ? move(targets) : at::full_like(b.ids_T, kernels::kIgnore);
    b.domain_T = domain.defined() ? move(domain) : at::zeros({b.B * b.S}, at::TensorOptions().dtype(at::kInt).device(options_.device));
    if (doc_start.defined()) b.doc_start_BS = doc_start.to(options_.device).contiguous();
    return b;
}

/// Segments [0, end) in one graph.
Tensors Model::run_segments(MicroBatch& batch, size_t end, std::map<std::string, Tensor>& slots) {
    slots["anchor"] = at::zeros({1}, at::TensorOptions().dtype(options_.precision.compute).device(options_.device)).set_requires_grad(at::GradMode::is_enabled());
    Call call{batch};
    Tensors out;
    for (size_t s = 0; s < end; ++s) {
        Tensors in;
        for (auto& slot : segments_[s].reads) in.push_back(slots.at(slot));
        out = segments_[s].forward(in, call);
        for (size_t i = 0; i < out.size(); ++i) slots[segments_[s].writes[i]] = out[i];
    }
    return out;
}

Tensor Model::run_attached(MicroBatch& batch) {
    std::map<std::string, Tensor> slots;
    return run_segments(batch, segments_.size(), slots)[0];
}

Tensor Model::logits(const Tensor& ids_BS) {
    at::NoGradGuard no_grad;
    MicroBatch batch = micro_batch(ids_BS, {}, {}, {});
    std::map<std::string, Tensor> slots;
    run_segments(batch, segments_.size() - 1, slots);
    Tensor h_TD = kernels::rmsnorm(slots.at("residual"), final_norm_, config_.model.norm_eps);
    Tensor logits_TV = kernels::linear(h_TD, head_);
    if (at::isReducedFloatingType(logits_TV.scalar_type())) logits_TV = logits_TV.to(at::kFloat);
    return logits_TV.view({batch.B, batch.S, -1});
}

}  // namespace moe
