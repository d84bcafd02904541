#include "core/routing/router.h"

#include "core/base/error.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

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

Tensor weights(const Tensor& scores_TE, const Tensor& ids_TK, const RouterSettings& s) {
    Tensor w_TK = scores_TE.gather(1, ids_TK);
    if (s.norm_topk) w_TK = w_TK / (w_TK.sum(-1, true) + 1e-20);
    return s.scale == 1 ? w_TK : w_TK * s.scale;
}

}  // namespace moe::routing
