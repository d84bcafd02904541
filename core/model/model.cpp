// Letters: T tokens, D hidden, H heads, G key heads, L latent, V vocabulary, E experts, F expert width, R rows by expert.
#include "core/model/model.h"

#include "core/base/error.h"
#include "core/base/random.h"
#include "core/config/load.h"
#include "core/kernels/embed/embed.h"
#include "core/kernels/grouped/grouped.h"
#include "core/kernels/head/head_loss.h"
#include "core/kernels/linear/linear.h"
#include "core/kernels/norm/layernorm.h"
#include "core/kernels/norm/rmsnorm.h"
#include "core/kernels/swiglu/swiglu.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <utility>

namespace moe {
namespace {
/// The norms of the two latents keep their own epsilon whatever norm_eps says: so does the model that the checkpoints were made
/// for. Source: DeepseekV3Attention of transformers, whose q_a_layernorm and kv_a_layernorm take the default.
constexpr double kLatentNormEps = 1e-6;
constexpr int64_t kMaxLogitRows = 1024;              // rows whose logits exist at a time where the head predicts

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

void check_fp8_sizes(const std::string& name, int64_t out, int64_t in, at::Device device) {
    bool fits = device.is_cpu() || kernels::grouped_fp8_fits(out, in, device);
    MOE_CHECK(fits, config, "training.use_fp8", fmt::format("{} of {} x {} on {}", name, out, in, device.str()), "both multiples of 16 up to 65536, on a GPU of compute capability 9.0", "use_bf16, or other widths");
}

Model::Model(const Config& config, const dist::Mesh& mesh, const ModelOptions& options)
    : config_(config), mesh_(mesh), options_(options), layout_(mesh), store_(mesh, store_options(config, options)), router_(routing::RouterSettings::from(config.model.moe)),
      loss_weights_(routing::LossWeights::from(config.model.moe)) {
    validate(config_);
    require_built(config_);
    declare_embedding();
    if (mesh_.is_first()) add_embed();
    int64_t L = config_.model.num_layers, P = mesh_.num_stages(), stage = mesh_.pp.rank();
    for (int64_t layer = stage * L / P; layer < (stage + 1) * L / P; ++layer) {
        add_attention(layer);
        if (config_.model.is_moe_layer(layer)) add_experts(layer);
        else add_dense(layer);
    }
    if (mesh_.is_last()) {
        add_head();
        for (int64_t k = 1; k <= config_.training.mtp_depth(); ++k) add_mtp(k);
    }
    store_.build();
}

std::string Model::bias_name(int64_t layer) { return layer_prefix(layer) + "mlp.gate.e_score_correction_bias"; }

Tensor Model::bias(int64_t layer) const {
    auto it = bias_.find(layer);
    return it == bias_.end() ? Tensor() : it->second;
}

const routing::Intervention* Model::intervention(int64_t layer) const {
    auto it = interventions_.find(layer);
    return it == interventions_.end() ? nullptr : &it->second;
}

Tensor Model::new_bias() const { return at::zeros({config_.model.moe.num_experts}, at::TensorOptions().dtype(options_.precision.master).device(options_.device)); }

void Model::adopt(const Config& config) {
    config_.model.moe = config.model.moe;
    config_.training = config.training;
    router_ = routing::RouterSettings::from(config_.model.moe);
    loss_weights_ = routing::LossWeights::from(config_.model.moe);
    for (int64_t layer : routed_layers_)
        if (config_.model.moe.use_aux_loss_free && !bias_.contains(layer)) bias_[layer] = new_bias();
    if (!config_.model.moe.use_aux_loss_free) bias_.clear();
}

std::vector<WeightPtr> Model::weights() const {
    std::vector<WeightPtr> all;
    for (auto& s : segments_)
        for (auto& w : s.weights)
            if (std::find(all.begin(), all.end(), w) == all.end()) all.push_back(w);
    return all;
}

// ---- weights ----
TensorSpec Model::cut(TensorSpec spec, int dim) const {
    int64_t parts = mesh_.tp.size();
    if (dim < 0 || parts == 1) return spec;
    int64_t whole = spec.shape[size_t(dim)];
    MOE_CHECK(whole % parts == 0, config, "distributed.tensor_parallel_size", fmt::format("{}: {} on {} ranks", spec.name, whole, parts), "a divisor", "");
    spec.cut_dim = dim;
    spec.cut_size = whole / parts;
    spec.cut_begin = mesh_.tp.rank() * spec.cut_size;
    return spec;
}

WeightPtr Model::in_fp8(WeightPtr weight, int64_t out, int64_t in) const {
    weight->is_fp8 = options_.precision.fp8;
    if (weight->is_fp8) check_fp8_sizes(weight->name, out, in, options_.device);
    return weight;
}

WeightPtr Model::projection(const std::string& name, int64_t out, int64_t in, int cut_dim) {
    WeightPtr w = weight(name, {out, in}, cut_dim);
    return in_fp8(w, cut_dim == 0 ? out / mesh_.tp.size() : out, cut_dim == 1 ? in / mesh_.tp.size() : in);
}

WeightPtr Model::weight(const std::string& name, std::vector<int64_t> shape, int cut_dim, BucketKind bucket) {
    TensorSpec tensor = cut({name + ".weight", shape, config_.model.init_method_std}, cut_dim);
    return store_.declare({name, tensor.cut_dim >= 0 ? BucketKind::tensor : bucket, {tensor}, tensor.local_shape()});
}

WeightPtr Model::rms_gamma(const std::string& name, int64_t width) {
    TensorSpec tensor{name + ".weight", {width}, 0, 1, /*decay=*/false};
    return store_.declare({name, BucketKind::dense, {tensor}, {width}});
}

Model::Norm Model::norm(const std::string& name, int64_t width) {
    Norm n{rms_gamma(name, width), {}};
    if (config_.model.norm_type == "layernorm") n.beta = store_.declare({name + ".bias", BucketKind::dense, {{name + ".bias", {width}, 0, 0, /*decay=*/false}}, {width}});
    return n;
}

Tensor Model::normalized(const Tensor& x_TD, const Norm& n, int below) const {
    double eps = config_.model.norm_eps;
    return n.beta ? kernels::layernorm(x_TD, n.gamma, n.beta, eps) : kernels::rmsnorm(x_TD, n.gamma, eps, {0, fp8_readers(below)});
}

std::pair<Tensor, Tensor> Model::branch(const Tensor& x_TD, const Norm& n, int products, int below) const {
    if (n.beta) return {normalized(x_TD, n), x_TD};
    return kernels::rmsnorm_and_input(x_TD, n.gamma, config_.model.norm_eps, {fp8_readers(products), fp8_readers(below)});
}

/// Gate and up of one feed-forward as one product: [2 · width, D].
WeightPtr Model::gate_up(const std::string& prefix, int64_t width) {
    int64_t D = config_.model.mla.d_model;
    double std = config_.model.init_method_std;
    TensorSpec gate = cut({prefix + "gate_proj.weight", {width, D}, std}, 0), up = cut({prefix + "up_proj.weight", {width, D}, std}, 0);
    int64_t rows = 2 * gate.local_shape()[0];
    return in_fp8(store_.declare({prefix + "gate_up", gate.cut_dim >= 0 ? BucketKind::tensor : BucketKind::dense, {gate, up}, {rows, D}}), rows, D);
}

/// The embedding is also what MTP modules read and, tied, the head: then the last stage has a copy.
void Model::declare_embedding() {
    bool again = config_.model.tie_word_embeddings || config_.training.mtp_depth() > 0;
    if (!mesh_.is_first() && !(mesh_.is_last() && again)) return;
    embedding_ = weight("model.embed_tokens", {config_.model.vocab(), config_.model.mla.d_model}, -1, again && mesh_.num_stages() > 1 ? BucketKind::tied : BucketKind::dense);
}

// ---- segments, in the order in which a token meets them ----
void Model::add(const std::string& name, int64_t layer, std::vector<std::string> reads, std::vector<std::string> writes, std::vector<WeightPtr> weights,
                std::function<Tensors(const Tensors&, Call&)> forward) {
    std::erase(weights, WeightPtr());
    segments_.push_back({name, layer, std::move(reads), std::move(writes), std::move(weights), std::move(forward)});
}

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

// ---- the router ----
const Tensor& Model::domain_of(int64_t layer, const MicroBatch& batch) const {
    int64_t module = layer - config_.model.num_layers;
    return module < 0 ? batch.domain_T : batch.mtp.at(size_t(module)).domain_T;
}

/// What becomes of a choice: capacity, then it is counted, once.
void Model::decide(int64_t layer, const routing::RouterSettings& settings, const Tensor& weights_TK, const Tensor& domain_T, Routed& routed, MicroBatch& batch) {
    at::NoGradGuard no_grad;
    routed.ids_TK = routed.chosen_TK;
    if (settings.capacity_factor) {                                               // sequences may be cut over tp: all tokens decide together
        auto& tp = layout_.tp;
        Tensor counted_T = tp.enter(domain_T).ge(0);
        routed.ids_TK = tp.part(routing::drop_over_capacity(tp.enter(routed.chosen_TK), tp.enter(weights_TK), counted_T, batch.S, settings)).contiguous();
    }
    if (batch.ledger) batch.ledger->count(layer, routed.chosen_TK, domain_T, settings.capacity_factor ? routed.ids_TK : Tensor());
    if (batch.trace) batch.trace->add(layer, routed.chosen_TK);
    if (batch.global_load) routed.load_E = batch.global_load->add(layer, routing::routed_counts(routed.chosen_TK, domain_T.ge(0), settings.num_experts));
}

/// What scripts get to know of a decision.
routing::RouteCall Model::route_call(int64_t layer, const MicroBatch& batch) const {
    int64_t module = layer - config_.model.num_layers;
    auto r = draw({uint64_t(config_.seed), routing::kScriptPurpose, batch.step, uint32_t(layer)}, uint64_t(batch.first_token));
    return {layer, int64_t(batch.step), batch.training, module < 0 ? batch.ids_T : batch.mtp.at(size_t(module)).ids_T, uint64_t(r[0]) << 32 | r[1]};
}

/// The balance losses and the z-loss of a layer, with their graph; their values are noted in the batch the first time.
Tensor Model::router_losses(const Tensor& logits_TE, const Tensor& scores_TE, const Tensor& counted_T, const Routed& routed, MicroBatch& batch, bool again) const {
    Tensor total = at::zeros({}, logits_TE.options().dtype(at::kDouble));
    auto take = [&](const char* name, const Tensor& loss) {
        if (!again) batch.add_loss(name, loss);
        total = total + loss;
    };
    if (loss_weights_.z != 0) take("z", routing::z_loss(logits_TE, counted_T, loss_weights_.z, batch.token_share));
    if (loss_weights_.need_window()) {                                           // the same on every rank of tp, each with its share
        auto& tp = layout_.tp;
        routing::LossWindow window{tp.enter(scores_TE), tp.enter(routed.chosen_TK), tp.enter(counted_T.to(at::kInt)).ne(0), batch.B, batch.S};
        take("balance", routing::window_loss(window, loss_weights_, routed.load_E, batch.token_share * (1 / double(tp.group.size()))));
    }
    return total;
}

WeightPtr Model::add_route(int64_t layer) {
    auto& c = config_.model.moe;
    std::string p = layer_prefix(layer);
    int64_t E = c.num_experts;
    auto post_norm = norm(p + "post_attention_layernorm", config_.model.mla.d_model);
    auto gate_ED = weight(p + "mlp.gate", {E, config_.model.mla.d_model}, -1, BucketKind::router);
    if (c.use_aux_loss_free) bias_[layer] = new_bias();
    routed_layers_.push_back(layer);
    const int below = std::exchange(residual_products_, config_.model.shared_width() > 0 && c.dropout == 0 ? 1 : 0);
    bool shared = config_.model.shared_width() > 0, fp64 = c.router_dtype == "fp64", force_balance = c.force_balance;
    add(fmt::format("layers.{}.route", layer), layer, {"residual"}, {"hidden", "weights", "residual"}, {post_norm.gamma, post_norm.beta, gate_ED}, [=, this](const Tensors& in, Call& call) -> Tensors {
        MicroBatch& batch = call.batch;
        auto [h_TD, x_TD] = branch(in[0], post_norm, shared ? 1 : 0, below);            // dispatch makes the copies of the rows that it gathers
        Tensor logits_TE = fp64 ? kernels::linear_fp64(h_TD, gate_ED) : kernels::linear_wide(h_TD, gate_ED);
        if (batch.training && batch.noise_std > 0)
            logits_TE = logits_TE + batch.noise_std * kernels::normal_rows(h_TD.size(0), E, rows_of(Purpose::router_noise, layer, batch), logits_TE.scalar_type(), h_TD.device());
        Routed& routed = batch.routed[layer];
        const Tensor& domain_T = domain_of(layer, batch);
        Tensor given_TK;
        if (call.again) given_TK = routed.chosen_TK;
        const routing::Intervention* change = intervention(layer);
        const routing::RouterSettings& settings = change ? change->settings : router_;
        if (!call.again && force_balance) given_TK = routing::forced(h_TD.size(0), batch.first_token, settings, h_TD.device());
        auto [scores_TE, weights_TK, ids_TK] = change ? routing::route(*change, logits_TE, bias(layer), route_call(layer, batch), given_TK, call.again, routed.hooked)
                                                      : kernels::route(logits_TE, bias(layer), router_.route, given_TK);
        if (!call.again) {
            routed.chosen_TK = ids_TK;
            decide(layer, settings, weights_TK.detach(), domain_T, routed, batch);
        }
        if (batch.trace && !call.again && batch.trace->wants_details()) batch.trace->add_details(layer, logits_TE, bias(layer), {scores_TE, weights_TK, ids_TK}, settings.route);
        weights_TK = weights_TK.to(options_.precision.master);
        if (batch.training && loss_weights_.any())
            weights_TK = routing::attach_loss(weights_TK, router_losses(logits_TE, scores_TE, domain_T.ge(0), routed, batch, call.again), batch.gradient_scale);
        return {h_TD, weights_TK, x_TD};
    });
    return gate_ED;
}

void Model::add_experts(int64_t layer) {
    auto& c = config_.model.moe;
    std::string m = layer_prefix(layer) + "mlp.", name = fmt::format("layers.{}.", layer);
    int64_t D = config_.model.mla.d_model, E = c.num_experts, F = c.expert_intermediate_size, shared_width = config_.model.shared_width();
    double std = config_.model.init_method_std;
    bool fp8 = options_.precision.fp8;
    add_route(layer);

    auto ep = layout_.ep;
    int64_t E_local = E / ep.group.size(), first = ep.group.rank() * E_local;
    bool passes_on = shared_width > 0;                    // the shared experts read what dispatch read: each gradient joins the next
    std::vector<std::string> dispatched = {"rows", "row_weights"};
    if (passes_on) dispatched.push_back("hidden");
    add(name + "dispatch", layer, {"hidden", "weights"}, dispatched, {}, [=](const Tensors& in, Call& call) -> Tensors {
        Routed& routed = call.batch.routed[layer];
        if (!call.again) {
            bool alone = ep.group.size() == 1;            // else these rows go to other ranks, and the experts see those of `received`
            routed.by_expert = kernels::sort_by_expert(routed.ids_TK, E, alone ? kernels::grouped_alignment(in[0].device(), in[0].scalar_type()) : 1);
            routed.groups = routed.by_expert.groups;
        }
        auto [rows_RD, weights_R, x_TD] = kernels::permute_and_input(in[0], in[1], routed.by_expert, fp8 && ep.group.size() == 1);
        auto with_input = [&](Tensors out) {
            if (passes_on) out.push_back(x_TD);
            return out;
        };
        if (ep.group.size() == 1) return with_input({rows_RD, weights_R});
        if (!call.again) {
            routed.across = ep.plan(routed.by_expert.groups.offsets_E1.to(at::kCPU, at::kLong));
            routed.received = kernels::sort_by_expert(routed.across.expert_Q.to(rows_RD.device()), E_local, kernels::grouped_alignment(in[0].device(), in[0].scalar_type()));
            routed.groups = routed.received.groups;
        }
        Tensor rows_QD = ep.dispatch(rows_RD, routed.across), weights_Q = ep.dispatch(weights_R, routed.across);
        auto [sorted_QD, sorted_Q] = kernels::permute(rows_QD, weights_Q.unsqueeze(-1), routed.received, fp8);
        return with_input({sorted_QD, sorted_Q});
    });

    WeightSpec up{m + "experts.gate_up", BucketKind::expert, {}, {E_local, 2 * F, D}}, down{m + "experts.down_proj", BucketKind::expert, {}, {E_local, D, F}};
    for (int64_t e = first; e < first + E_local; ++e) {
        std::string x = fmt::format("{}experts.{}.", m, e);
        up.tensors.push_back({x + "gate_proj.weight", {F, D}, std});
        up.tensors.push_back({x + "up_proj.weight", {F, D}, std});
        down.tensors.push_back({x + "down_proj.weight", {D, F}, std});
    }
    auto up_EFD = in_fp8(store_.declare(up), 2 * F, D), down_EDF = in_fp8(store_.declare(down), D, F);
    add(name + "experts", layer, {"rows", "row_weights"}, {"expert_rows"}, {up_EFD, down_EDF}, [=](const Tensors& in, Call& call) -> Tensors {
        const kernels::RowGroups& groups = call.batch.routed[layer].groups;
        return {kernels::grouped_linear(kernels::swiglu(kernels::grouped_linear(in[0], groups, up_EFD), in[1], fp8), groups, down_EDF)};
    });

    std::vector<std::string> combined = {"residual", "expert_rows"};
    if (shared_width > 0) {
        auto shared_up = gate_up(m + "shared_experts.", shared_width);
        auto shared_down = projection(m + "shared_experts.down_proj", D, shared_width, 1);
        add(name + "shared_experts", layer, {"hidden"}, {"shared"}, {shared_up, shared_down}, [=, this](const Tensors& in, Call&) -> Tensors {
            return {layout_.tp.exit(kernels::linear(kernels::swiglu(kernels::linear(layout_.tp.enter(in[0]), shared_up), {}, fp8), shared_down))};
        });
        combined.push_back("shared");
    }
    double dropout = c.dropout;
    add(name + "combine", layer, combined, {"residual"}, {}, [=, this](const Tensors& in, Call& call) -> Tensors {
        Routed& routed = call.batch.routed[layer];
        Tensor rows = in[1], shared_TD = in.size() > 2 ? in[2] : Tensor();
        bool alone = ep.group.size() == 1;
        if (!alone) rows = ep.combine(kernels::unpermute({}, rows, routed.received, {}, fp8), routed.across);
        if (call.batch.training && dropout > 0)
            return {in[0] + kernels::dropout(kernels::unpermute(shared_TD, rows, routed.by_expert, {}, fp8 && alone), dropout, rows_of(Purpose::expert_dropout, layer, call.batch))};
        return {kernels::unpermute(in[0], rows, routed.by_expert, shared_TD, fp8 && alone)};
    });
}

// ---- heads ----
/// The most likely token of each row, int64 [T], in pieces.
static Tensor most_likely(const Tensor& final_TD, const WeightPtr& head) {
    at::NoGradGuard no_grad;
    Tensors parts;
    for (int64_t lo = 0; lo < final_TD.size(0); lo += kMaxLogitRows)
        parts.push_back(kernels::linear(final_TD.narrow(0, lo, std::min(kMaxLogitRows, final_TD.size(0) - lo)), head).argmax(-1));
    return at::cat(parts);
}

Tensor Model::head_loss(const Tensor& final_TD, const Tensor& targets_T, const Factor& scale, Call& call, bool main) const {
    kernels::HeadLossOptions options;
    options.scale = scale;
    options.gradients_in_forward = call.backward_follows;
    Tensor loss = kernels::head_loss(final_TD, head_, targets_T, options, main ? call.batch.token_loss : nullptr);
    if (!call.again) call.batch.add_loss(main ? "loss" : "mtp", loss / call.batch.gradient_scale);
    if (call.batch.predicted) call.batch.predicted->push_back(most_likely(final_TD, head_));
    return loss;
}

void Model::add_head() {
    int64_t D = config_.model.mla.d_model;
    auto final_norm = norm("model.norm", D);
    head_ = config_.model.tie_word_embeddings ? embedding_ : weight("lm_head", {config_.model.vocab(), D});
    const int below = residual_products_;
    add("final_norm", -1, {"residual"}, {"final"}, {final_norm.gamma, final_norm.beta}, [=, this](const Tensors& in, Call&) -> Tensors { return {normalized(in[0], final_norm, below)}; });
    add("head", -1, {"final"}, {"loss"}, {head_}, [this](const Tensors& in, Call& call) -> Tensors {
        return {head_loss(in[0], call.batch.targets_T, call.batch.loss_scale, call, true)};
    });
}

/// MTP module k: what the head of depth k − 1 read and the embedding of the token k ahead, joined; a layer with experts; the shared
/// head. Source: DeepSeek-V3 technical report 2.2; names and the order in eh_proj as in its checkpoints.
void Model::add_mtp(int64_t k) {
    int64_t layer = config_.model.num_layers + k - 1, D = config_.model.mla.d_model;
    std::string p = layer_prefix(layer), name = fmt::format("mtp.{}.", k);
    auto enorm = norm(p + "enorm", D), hnorm = norm(p + "hnorm", D);
    auto join = projection(p + "eh_proj", D, 2 * D);
    add(name + "join", -1, {"final", "anchor"}, {"residual"}, {enorm.gamma, enorm.beta, hnorm.gamma, hnorm.beta, join, embedding_}, [=, this](const Tensors& in, Call& call) -> Tensors {
        Tensor ahead_TD = kernels::embed(in[1], call.batch.mtp.at(size_t(k - 1)).ids_T, embedding_);
        return {kernels::linear(at::cat({normalized(ahead_TD, enorm), normalized(in[0], hnorm)}, -1), join)};
    });
    residual_products_ = 1;
    add_attention(layer);
    add_experts(layer);
    const int below = residual_products_;
    auto shared_norm = norm(p + "shared_head.norm", D);
    add(name + "norm", -1, {"residual"}, {"final"}, {shared_norm.gamma, shared_norm.beta}, [=, this](const Tensors& in, Call&) -> Tensors { return {normalized(in[0], shared_norm, below)}; });
    add(name + "head", -1, {"final"}, {"loss"}, {head_}, [=, this](const Tensors& in, Call& call) -> Tensors {
        auto& ahead = call.batch.mtp.at(size_t(k - 1));
        return {head_loss(in[0], ahead.targets_T, ahead.loss_scale, call, false)};
    });
}

// ---- running ----
void MicroBatch::add_loss(const std::string& name, const Tensor& value) {
    Tensor& sum = losses[name];
    sum = sum.defined() ? sum + value.detach() : value.detach();
}

namespace {
/// x [B, S] moved k to the left: what stands k positions on, `fill` past the end.
Tensor ahead_of(const Tensor& x_BS, int64_t k, int64_t fill = kernels::kIgnore) {
    int64_t S = x_BS.size(1);
    Tensor out = at::full_like(x_BS, fill);
    if (k < S) out.narrow(1, 0, S - k).copy_(x_BS.narrow(1, k, S - k));
    return out;
}
/// Where the token k ahead is of the same piece of a document: positions 0 … k − 1 on are in the piece, and each has a target. A valid
/// target alone does not say so: a piece that was cut ends with one.
Tensor reaches(const Tensor& targets_BS, const Tensor& doc_start_BS, int64_t k) {
    Tensor all = at::ones_like(targets_BS, at::kBool);
    for (int64_t j = 0; j < k; ++j) {
        all = all.logical_and(ahead_of(targets_BS, j).ge(0));
        if (j > 0 && doc_start_BS.defined()) all = all.logical_and(ahead_of(doc_start_BS, j, -1).eq(doc_start_BS));
    }
    return all;
}
}  // namespace

int64_t Model::num_mtp_targets(const Tensor& targets_BS, const Tensor& doc_start_BS, int64_t k) { return reaches(targets_BS, doc_start_BS, k + 1).sum().item<int64_t>(); }

MicroBatch Model::micro_batch(const Tensor& ids, const Tensor& targets, const Tensor& domain, const Tensor& doc_start, bool mask_documents) const {
    MOE_CHECK(ids.dim() == 2 && ids.scalar_type() == at::kLong && ids.numel() > 0, shape, "model: ids", fmt::format("{} dims of {}", ids.dim(), c10::toString(ids.scalar_type())), "int64 [batch, time], not empty", "");
    MOE_CHECK(ids.size(1) <= config_.model.mla.max_context_length, shape, "model: sequence length", std::to_string(ids.size(1)),
              fmt::format("at most {}", config_.model.mla.max_context_length), "raise model.mla.max_context_length");
    int64_t low = ids.min().item<int64_t>(), high = ids.max().item<int64_t>(), V = config_.model.vocab();
    MOE_CHECK(low >= 0 && high < V, data, "model: token ids", fmt::format("{} to {}", low, high), fmt::format("0 to {}", V - 1), "the tokenizer and model.vocab_size must agree");
    MicroBatch b;
    b.B = ids.size(0);
    b.S = ids.size(1);
    // From pinned memory, so that the host need not wait for what the device is doing.
    auto copy = [&](const Tensor& t) { return options_.device.is_cuda() && t.is_cpu() ? t.contiguous().pin_memory().to(options_.device, /*non_blocking=*/true) : t.to(options_.device).contiguous(); };
    auto move = [&](const Tensor& t) { return copy(layout_.tp.part(t.reshape({-1}))); };
    Tensor target = targets.defined() ? targets : at::full_like(ids, kernels::kIgnore), label = domain.defined() ? domain : at::zeros(ids.sizes(), at::kInt);
    b.ids_T = move(ids);
    b.targets_T = move(target);
    b.domain_T = move(label);
    if (doc_start.defined() && mask_documents) b.doc_start_BS = copy(doc_start);
    b.first_token = layout_.tp.group.rank() * b.ids_T.numel();
    Tensor host = target.to(at::kCPU), starts = doc_start.defined() ? doc_start.to(at::kCPU) : doc_start, domains = label.to(at::kCPU);
    for (int64_t k = 1; k <= config_.training.mtp_depth() && mesh_.is_last(); ++k) {
        Tensor no_token = reaches(host, starts, k).logical_not(), no_target = reaches(host, starts, k + 1).logical_not();
        b.mtp.push_back({move(ahead_of(host, k - 1).masked_fill(no_token, 0)), move(ahead_of(host, k).masked_fill(no_target, kernels::kIgnore)), move(domains.masked_fill(no_token, -1)), 0});
    }
    return b;
}

Tensor Model::run_segments(MicroBatch& batch, size_t begin, size_t end, std::map<std::string, Tensor>& slots) {
    bool gather = !at::GradMode::is_enabled();
    Call call{batch};
    Tensor loss;
    for (size_t s = begin; s < end; ++s) {
        const Segment& segment = segments_[s];
        Tensors in;
        for (auto& slot : segment.reads) in.push_back(slots.at(slot));
        if (gather) store_.gather(segment.weights, false);
        Tensors out = segment.forward(in, call);
        if (gather) store_.release(segment.weights, false);
        for (size_t i = 0; i < out.size(); ++i) {
            if (segment.writes[i] == "loss") loss = loss.defined() ? loss + out[i] : out[i];
            else slots[segment.writes[i]] = out[i];
        }
    }
    return loss;
}

Tensor Model::run_attached(MicroBatch& batch) {
    MOE_CHECK(mesh_.num_stages() == 1, config, "model", fmt::format("{} pipeline stages", mesh_.num_stages()), "1 for a graph of the whole model", "train and evaluate through a run");
    std::map<std::string, Tensor> slots;
    slots["anchor"] = at::zeros({1}, at::TensorOptions().dtype(options_.precision.compute).device(options_.device)).set_requires_grad(at::GradMode::is_enabled());
    return run_segments(batch, 0, segments_.size(), slots);
}

Tensor Model::logits(const Tensor& ids_BS) {
    MOE_CHECK(mesh_.num_stages() == 1 && mesh_.tp.size() == 1, state, "model:logits", fmt::format("{} stages, {} tensor-parallel ranks", mesh_.num_stages(), mesh_.tp.size()), "a model that is whole on this rank", "");
    at::NoGradGuard no_grad;
    MicroBatch batch = micro_batch(ids_BS, {}, {}, {});
    std::map<std::string, Tensor> slots = {{"anchor", at::zeros({1}, at::TensorOptions().dtype(options_.precision.compute).device(options_.device))}};
    size_t head = 0;
    while (segments_[head].name != "head") ++head;
    run_segments(batch, 0, head, slots);
    store_.gather({head_}, false);
    Tensor logits_TV = kernels::linear(slots.at("final"), head_);
    store_.release({head_}, false);
    if (logits_TV.scalar_type() != at::kDouble) logits_TV = logits_TV.to(at::kFloat);
    return logits_TV.view({batch.B, batch.S, -1});
}

}  // namespace moe
