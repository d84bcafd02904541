#include "core/routing/router.h"

#include "core/base/error.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <cmath>

namespace moe::routing {

RouterSettings RouterSettings::from(const MoeConfig& c) {
    RouterSettings s;
    s.num_experts = c.num_experts;
    auto& r = s.route;
    r.top_k = c.num_experts_per_token;
    r.n_group = c.n_group;
    r.topk_group = c.topk_group;
    r.softmax = c.scoring_func == "softmax";
    r.norm_topk = c.norm_topk_prob;
    r.best_two = c.use_aux_loss_free;
    r.scale = c.routed_scaling_factor;
    r.temperature = c.router_temperature;
    s.capacity_factor = c.capacity_factor;
    s.min_capacity = c.min_expert_capacity;
    return s;
}

Tensor forced(int64_t num_tokens, int64_t first_token, const RouterSettings& s, at::Device device) {
    int64_t K = s.route.top_k, first = first_token % s.num_experts * K;
    return at::arange(first, first + num_tokens * K, at::TensorOptions().dtype(at::kLong).device(device)).remainder(s.num_experts).view({num_tokens, K});
}

int64_t capacity(int64_t S, const RouterSettings& s) {
    return std::max<int64_t>(s.min_capacity, int64_t(std::ceil(s.capacity_factor.value() * double(S * s.route.top_k) / double(s.num_experts))));
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

}  // namespace moe::routing
