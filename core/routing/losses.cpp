#include "core/routing/losses.h"

#include "core/base/error.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>

namespace moe::routing {

LossWeights LossWeights::from(const MoeConfig& c) {
    LossWeights w;
    w.switch_aux = c.router_aux_loss_weight;
    w.sequence = c.sequence_aux_loss_weight;
    w.global = c.global_aux_loss_weight;
    w.z = c.router_z_loss_weight;
    if (c.balance_loss_type == "entropy") w.entropy = c.balance_loss_weight;
    if (c.balance_loss_type == "load") w.load = c.balance_loss_weight;
    return w;
}

GlobalLoad::GlobalLoad(int64_t num_layers, int64_t num_experts, dist::Group group, at::Device device)
    : counts_LE_(at::zeros({num_layers, num_experts}, at::TensorOptions().dtype(at::kDouble).device(device))), group_(std::move(group)) {}

Tensor GlobalLoad::add(int64_t layer, const Tensor& counts_E) {
    at::NoGradGuard no_grad;
    Tensor all = counts_E.contiguous().clone(), sum = counts_LE_[layer];
    group_.all_reduce(all);
    sum.add_(all);
    return sum / sum.mean().clamp_min(1e-300);
}

Tensor routed_counts(const Tensor& ids_TK, const Tensor& counted_T, int64_t num_experts) {
    Tensor ones_TK = counted_T.to(at::kDouble).unsqueeze(-1).expand_as(ids_TK);
    return at::zeros({num_experts}, ones_TK.options()).scatter_add_(0, ids_TK.reshape({-1}), ones_TK.reshape({-1}));
}

namespace {
/// N/(K·n) Σ_b Σ_i c_bi (Σ_t p_ti) / n_b: the Switch loss of each of the B windows times its tokens, summed; p [B, S, E].
Tensor switch_sum(const Tensor& p_BSE, const Tensor& ids_TK, const Tensor& counted_BS) {
    int64_t B = p_BSE.size(0), S = p_BSE.size(1), E = p_BSE.size(2), K = ids_TK.size(1);
    Tensor ones = counted_BS.unsqueeze(-1).expand({B, S, K}).reshape({B, S * K});
    Tensor c_BE = at::zeros({B, E}, p_BSE.options()).scatter_add_(1, ids_TK.view({B, S * K}), ones);
    Tensor n_B = counted_BS.sum(1).clamp_min(1);
    return (double(E) / double(K)) * (c_BE * p_BSE.sum(1) / n_B.unsqueeze(-1)).sum();
}
}  // namespace

Tensor window_loss(const LossWindow& w, const LossWeights& weights, const Tensor& load_E, const Factor& share) {
    int64_t T = w.scores_TE.size(0), E = w.scores_TE.size(1);
    MOE_CHECK(w.B * w.S == T && w.ids_TK.size(0) == T && w.counted_T.size(0) == T, shape, "router losses", fmt::format("{} tokens", T), fmt::format("{} sequences of {}", w.B, w.S), "");
    Tensor counted_T = w.counted_T.to(at::kDouble), scores = w.scores_TE.to(at::kDouble);
    Tensor p_TE = scores / scores.sum(-1, true).clamp_min(1e-300) * counted_T.unsqueeze(-1);
    Tensor n = counted_T.sum(), P_E = p_TE.sum(0) / n.clamp_min(1), total = at::zeros({}, p_TE.options());
    if (weights.switch_aux != 0) total = total + weights.switch_aux * switch_sum(p_TE.view({1, T, E}), w.ids_TK, counted_T.view({1, T}));
    if (weights.sequence != 0) total = total + weights.sequence * switch_sum(p_TE.view({w.B, w.S, E}), w.ids_TK, counted_T.view({w.B, w.S}));
    if (weights.global != 0) total = total + weights.global * n * (load_E * P_E).sum();
    if (weights.entropy != 0) total = total + weights.entropy * n * (P_E * P_E.clamp_min(1e-300).log()).sum();
    if (weights.load != 0) total = total + weights.load * n * (double(E) * P_E.square().sum() - 1);
    return scaled(total, share);
}

Tensor z_loss(const Tensor& logits_TE, const Tensor& counted_T, double weight, const Factor& share) {
    return scaled((logits_TE.to(at::kDouble).logsumexp({-1}).square() * counted_T.to(at::kDouble)).sum(), share * weight);
}

namespace {
struct AttachLoss : torch::autograd::Function<AttachLoss> {
    static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& x, const Tensor& /*loss*/, double scale) {
        ctx->saved_data["scale"] = scale;
        return x.view_as(x);
    }
    static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, torch::autograd::variable_list grads) {
        return {grads[0], at::full({}, ctx->saved_data["scale"].toDouble(), grads[0].options().dtype(at::kDouble)), Tensor()};
    }
};
}  // namespace

Tensor attach_loss(const Tensor& x, const Tensor& loss, double scale) { return x.requires_grad() && loss.requires_grad() ? AttachLoss::apply(x, loss, scale) : x; }

}  // namespace moe::routing
