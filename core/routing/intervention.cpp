#include "core/routing/intervention.h"

#include "core/base/error.h"
#include "core/tensor/check.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <limits>
#include <tuple>

namespace moe::routing {
namespace {
/// Other values under the same graph: what a hook gives counts as the old value plus a constant.
struct Replace : torch::autograd::Function<Replace> {
    static Tensor forward(torch::autograd::AutogradContext*, const Tensor& /*x*/, const Tensor& values) { return values.clone(); }
    static torch::autograd::variable_list backward(torch::autograd::AutogradContext*, torch::autograd::variable_list grads) { return {grads[0], Tensor()}; }
};
Tensor replaced(const Tensor& x, const Tensor& values) { return x.requires_grad() && at::GradMode::is_enabled() ? Replace::apply(x, values) : values; }

/// "post_topk: ids, layer 1, at step 5": whose result is wrong.
std::string of_decision(const char* what, const RouteCall& call) { return fmt::format("{}, {}", what, call.place()); }

/// A script's tensor as [T, n] on the right device and in the right type.
Tensor checked(const Tensor& got, const Tensor& like, const char* what, at::ScalarType type, const RouteCall& call) {
    MOE_CHECK(got.defined() && got.sizes() == like.sizes(), shape, of_decision(what, call), got.defined() ? shape_text(got.sizes()) : "nothing", shape_text(like.sizes()), "");
    if (at::isFloatingType(type) != at::isFloatingType(got.scalar_type())) MOE_THROW(dtype, of_decision(what, call), dtype_text(got.scalar_type()), dtype_text(type), "");
    return got.detach().to(like.device(), type).contiguous();
}

void check_choice(const Tensor& ids_TK, int64_t E, const RouteCall& call) {
    if (ids_TK.numel() == 0) return;
    int64_t low = ids_TK.min().item<int64_t>(), high = ids_TK.max().item<int64_t>();
    MOE_CHECK(low >= 0 && high < E, shape, of_decision("post_topk: ids", call), fmt::format("{} to {}", low, high), fmt::format("experts in [0, {})", E), "");
    if (ids_TK.size(1) < 2) return;
    Tensor sorted = std::get<0>(ids_TK.sort(-1));
    bool twice = sorted.narrow(1, 1, ids_TK.size(1) - 1).eq(sorted.narrow(1, 0, ids_TK.size(1) - 1)).any().item<bool>();
    MOE_CHECK(!twice, usage, of_decision("post_topk: ids", call), "an expert twice in a row", "different experts for each token", "");
}

/// f(), a function of a script with the checks of what it gave; false where it failed, and the failure is kept.
template <class F>
bool succeeds(const Intervention& change, F&& f) {
    try {
        f();
    } catch (const std::exception&) {
        if (!change.keep || !change.keep()) throw;
        return false;
    }
    return true;
}

Tensor forced_choice(const Tensor& forced, const RouteCall& call, const Tensor& logits_TE) {
    Tensor table = forced.to(logits_TE.device());
    if (table.dim() == 1) return table.unsqueeze(0).expand({logits_TE.size(0), table.size(0)}).contiguous();
    return table.index_select(0, call.token_ids_T.to(logits_TE.device()));
}
}  // namespace

std::string RouteCall::place() const { return training ? fmt::format("layer {}, at step {}", layer, step + 1) : fmt::format("layer {}, outside of training", layer); }

Tensor choose(const Tensor& scores_TE, const Tensor& bias_E, const kernels::RouteOptions& o) {
    at::NoGradGuard no_grad;
    int64_t T = scores_TE.size(0), E = scores_TE.size(1), G = o.n_group, per = E / G;
    Tensor choice = bias_E.defined() ? scores_TE + bias_E.to(scores_TE.scalar_type()) : scores_TE;
    if (G > 1) {
        Tensor grouped = choice.view({T, G, per});
        Tensor of_group = o.best_two && per > 1 ? std::get<0>(grouped.topk(2, -1)).sum(-1) : grouped.amax(-1);
        Tensor best = std::get<1>(of_group.sort(/*stable=*/true, -1, /*descending=*/true)).narrow(1, 0, o.topk_group);
        Tensor out = at::ones({T, G}, scores_TE.options().dtype(at::kBool)).scatter_(1, best, false);
        choice = grouped.masked_fill(out.unsqueeze(-1), -std::numeric_limits<double>::infinity()).view({T, E});
    }
    return std::get<1>(choice.sort(/*stable=*/true, -1, /*descending=*/true)).narrow(1, 0, o.top_k).contiguous();
}

Tensor weigh(const Tensor& scores_TE, const Tensor& ids_TK, const kernels::RouteOptions& o) {
    Tensor w = scores_TE.gather(1, ids_TK);
    if (o.norm_topk) w = w / (w.sum(-1, true) + 1e-20);
    return w * o.scale;
}

kernels::Route route(const Intervention& change, const Tensor& logits_TE, const Tensor& layer_bias_E, const RouteCall& call, const Tensor& given_TK, bool again, HookResults& hooked) {
    kernels::RouteOptions options = change.settings.route;
    Tensor bias_E = layer_bias_E;
    if (change.bias_E.defined()) {
        Tensor added = change.bias_E.to(logits_TE.device(), logits_TE.scalar_type());
        bias_E = bias_E.defined() ? bias_E.to(logits_TE.scalar_type()) + added : added;
    }
    Tensor ids_TK = given_TK;
    if (!ids_TK.defined() && change.forced.defined()) ids_TK = forced_choice(change.forced, call, logits_TE);
    if (ids_TK.defined()) options.top_k = ids_TK.size(1);
    kernels::Route out;
    bool own_scores = !change.score && change.pre_topk.empty();
    if (own_scores) {
        out = kernels::route(logits_TE, bias_E, options, ids_TK);
    } else {
        if (change.score) {
            bool well = succeeds(change, [&] {
                Tensor s = change.score(logits_TE, call);
                MOE_CHECK(s.defined() && s.sizes() == logits_TE.sizes(), shape, of_decision("router.score", call), s.defined() ? shape_text(s.sizes()) : "nothing", shape_text(logits_TE.sizes()), "one score for each logit");
                out.scores_TE = s.to(logits_TE.device(), logits_TE.scalar_type());
            });
            if (!well) out.scores_TE = logits_TE.sigmoid();
        } else {
            out.scores_TE = kernels::route(logits_TE, bias_E, options, ids_TK).scores_TE;
        }
        if (!again && !change.pre_topk.empty()) {
            at::NoGradGuard no_grad;
            Tensor s = out.scores_TE.detach();
            for (auto& hook : change.pre_topk) succeeds(change, [&] { s = checked(hook(logits_TE.detach(), s, bias_E, call), logits_TE, "pre_topk: scores", logits_TE.scalar_type(), call); });
            hooked.scores_TE = s;
        }
        if (hooked.scores_TE.defined()) out.scores_TE = replaced(out.scores_TE, hooked.scores_TE);
        out.ids_TK = ids_TK.defined() ? ids_TK : choose(out.scores_TE.detach(), bias_E, options);
        out.weights_TK = weigh(out.scores_TE, out.ids_TK, options);
    }
    if (!again && !change.post_topk.empty()) {
        at::NoGradGuard no_grad;
        Tensor ids = out.ids_TK, weights = out.weights_TK.detach();
        bool has_hooked_weights = false;
        for (auto& hook : change.post_topk) {
            Tensor given_ids, given_weights;
            bool well = succeeds(change, [&] {
                std::tie(given_ids, given_weights) = hook(ids, weights, out.scores_TE.detach(), call);
                if (given_ids.defined()) {
                    given_ids = checked(given_ids, ids, "post_topk: ids", at::kLong, call);
                    check_choice(given_ids, logits_TE.size(1), call);
                }
                if (given_weights.defined()) given_weights = checked(given_weights, weights, "post_topk: weights", weights.scalar_type(), call);
            });
            if (!well) continue;
            if (given_ids.defined()) {
                ids = given_ids;
                if (!given_weights.defined()) weights = weigh(out.scores_TE.detach(), ids, options);
            }
            if (given_weights.defined()) weights = given_weights;
            if (given_ids.defined() || given_weights.defined()) has_hooked_weights = given_weights.defined();
        }
        out.ids_TK = ids;
        if (has_hooked_weights) hooked.weights_TK = weights;
    }
    if (!change.post_topk.empty()) out.weights_TK = weigh(out.scores_TE, out.ids_TK, options);
    if (hooked.weights_TK.defined()) out.weights_TK = replaced(out.weights_TK, hooked.weights_TK);
    if (change.kept_E.defined()) out.weights_TK = out.weights_TK * change.kept_E.to(logits_TE.device(), out.weights_TK.scalar_type()).index_select(0, out.ids_TK.view({-1})).view_as(out.ids_TK);
    return out;
}

void check_enough_experts(const std::vector<bool>& masked, const RouterSettings& settings, int64_t layer) {
    auto& o = settings.route;
    int64_t E = int64_t(masked.size()), per = E / o.n_group;
    std::vector<int64_t> left;                             // by group that may win; one whose score is −inf may not, unless there are too few
    for (int64_t g = 0; g < o.n_group; ++g) {
        int64_t n = std::count(masked.begin() + g * per, masked.begin() + (g + 1) * per, false);
        if (n >= (o.best_two && per > 1 && o.n_group > 1 ? 2 : 1)) left.push_back(n);
    }
    std::sort(left.begin(), left.end());
    int64_t worst = 0;
    for (int64_t g = 0; g < std::min<int64_t>(o.topk_group, int64_t(left.size())); ++g) worst += left[size_t(g)];
    bool enough = int64_t(left.size()) >= o.topk_group && worst >= o.top_k;
    int64_t all = std::count(masked.begin(), masked.end(), false);
    MOE_CHECK(enough, usage, fmt::format("router: layer {}", layer), o.n_group > 1 ? fmt::format("{} experts left, as few as {} in the {} groups that are chosen", all, worst, o.topk_group) : fmt::format("{} experts left", all),
              fmt::format("at least {}, the experts of a token", o.top_k), "mask fewer, or override top_k first");
}

}  // namespace moe::routing
