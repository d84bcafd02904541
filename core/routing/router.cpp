#include "core/routing/router.h"

#include "core/base/error.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <cmath>
#include <limits>

namespace moe::routing {

RouterSettings RouterSettings::from(const MoeConfig& c) {
    RouterSettings s;
    s.num_experts = c.num_experts;
    s.top_k = c.num_experts_per_token;
    s.n_group = c.n_group;
    s.topk_group = c.topk_group;
    s.scoring = c.scoring_func == "softmax" ? Scoring::softmax : Scoring::sigmoid;
    s.norm_topk = c.norm_topk_prob;
    s.scale = c.routed_scaling_factor;
    s.temperature = c.router_temperature;
    s.with_bias = c.use_aux_loss_free;
    s.capacity_factor = c.capacity_factor;
    s.min_capacity = c.min_expert_capacity;
    return s;
}

Tensor scores(const Tensor& logits_TE, const RouterSettings& s) {
    MOE_CHECK(logits_TE.dim() == 2 && logits_TE.size(1) == s.num_experts, shape, "router: logits", fmt::format("{} dims, last {}", logits_TE.dim(), logits_TE.size(-1)),
              fmt::format("[T, {}]", s.num_experts), "");
    Tensor logits = s.temperature == 1 ? logits_TE : logits_TE / s.temperature;
    return s.scoring == Scoring::sigmoid ? logits.sigmoid() : logits.softmax(-1);
}

Tensor choose(const Tensor& scores_TE, const Tensor& bias_E, const RouterSettings& s) {
    at::NoGradGuard no_grad;
    Tensor choice_TE = bias_E.defined() ? scores_TE + bias_E : scores_TE.detach();
    if (s.n_group > 1) {
        int64_t T = scores_TE.size(0), per_group = s.num_experts / s.n_group;
        Tensor grouped_TGe = choice_TE.view({T, s.n_group, per_group});
        Tensor score_TG = s.with_bias && per_group > 1 ? std::get<0>(grouped_TGe.topk(2, -1)).sum(-1) : grouped_TGe.amax(-1);
        Tensor kept_TG = at::zeros_like(score_TG, at::kBool).scatter_(1, std::get<1>(score_TG.topk(s.topk_group, -1, true, false)), true);
        choice_TE = choice_TE.masked_fill(kept_TG.logical_not().unsqueeze(-1).expand({T, s.n_group, per_group}).reshape({T, s.num_experts}), -std::numeric_limits<double>::infinity());
    }
    return std::get<1>(choice_TE.topk(s.top_k, -1));
}

Tensor forced(int64_t num_tokens, int64_t first_token, const RouterSettings& s, at::Device device) {
    int64_t K = s.top_k, first = first_token % s.num_experts * K;
    return at::arange(first, first + num_tokens * K, at::TensorOptions().dtype(at::kLong).device(device)).remainder(s.num_experts).view({num_tokens, K});
}

int64_t capacity(int64_t S, const RouterSettings& s) {
    return std::max<int64_t>(s.min_capacity, int64_t(std::ceil(s.capacity_factor.value() * double(S * s.top_k) / double(s.num_experts))));
}

Tensor drop_over_capacity(const Tensor& ids_TK, const Tensor& weights_TK, const Tensor& counted_T, int64_t S, const RouterSettings& s) {
    at::NoGradGuard no_grad;
    int64_t T = ids_TK.size(0), K = ids_TK.size(1), E = s.num_experts, B = T / S;
    MOE_CHECK(B * S == T, shape, "router: capacity", fmt::format("{} tokens", T), fmt::format("whole sequences of {}", S), "");
    // A bin is (sequence, expert); padding has the last bin to itself.
    Tensor bin_TK = (at::arange(T, ids_TK.options()).div(S, "floor") * E).unsqueeze(-1) + ids_TK;
    Tensor bin = bin_TK.masked_fill(counted_T.logical_not().unsqueeze(-1), B * E).reshape({-1});
    Tensor by_weight = std::get<1>(weights_TK.reshape({-1}).sort(/*stable=*/true, 0, /*descending=*/true));
    Tensor order = by_weight.index_select(0, std::get<1>(bin.index_select(0, by_weight).sort(/*stable=*/true, 0, /*descending=*/false)));
    Tensor sorted = bin.index_select(0, order), counts = at::zeros({B * E + 1}, bin.options()).scatter_add_(0, bin, at::ones_like(bin));
    Tensor place = at::arange(T * K, bin.options()) - (counts.cumsum(0) - counts).index_select(0, sorted);
    Tensor kept = place.lt(capacity(S, s)).logical_and(sorted.ne(B * E));
    Tensor dropped = at::zeros_like(kept).scatter_(0, order, kept.logical_not());
    return ids_TK.masked_fill(dropped.view({T, K}), -1);
}

Tensor weights(const Tensor& scores_TE, const Tensor& ids_TK, const RouterSettings& s) {
    Tensor w_TK = scores_TE.gather(1, ids_TK);
    if (s.norm_topk) w_TK = w_TK / (w_TK.sum(-1, true) + 1e-20);
    return s.scale == 1 ? w_TK : w_TK * s.scale;
}

}  // namespace moe::routing
