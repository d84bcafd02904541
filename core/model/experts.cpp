// The router and what its choice leads to: dispatch, experts, combine. Letters: T tokens, D hidden, E experts, F expert width, K chosen a token, R rows by expert, Q rows received.
#include "core/model/model.h"

#include "core/base/error.h"
#include "core/base/random.h"
#include "core/kernels/grouped/grouped.h"
#include "core/kernels/linear/linear.h"
#include "core/kernels/swiglu/swiglu.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/zeros.h>

#include <utility>

namespace moe {
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
    if (batch.trace) batch.trace->add(layer, routed.chosen_TK, settings.capacity_factor ? routed.ids_TK : Tensor());
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
    if (c.use_aux_loss_free) bias_[layer] = zero_bias();
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

}  // namespace moe
