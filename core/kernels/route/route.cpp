#include "core/kernels/route/route.h"

#include "core/kernels/common/autograd.h"
#include "core/kernels/common/dispatch.h"
#include "core/kernels/route/route_kernels.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

namespace moe::kernels {
namespace {
/// What has no gradient.
struct RouteRest {
    Tensor bias_E;
    RouteOptions options;
    bool choose;
    Route out;
};

struct RouteFunction : Function<RouteFunction> {
    static Grads forward(AutogradContext* ctx, const Tensor& logits_TE, const RouteRest& rest) {
        const Route& out = rest.out;
        MOE_BY_DEVICE("route", logits_TE, route_forward, logits_TE, rest.bias_E, rest.options, rest.choose, out);
        ctx->save_for_backward({out.scores_TE, out.ids_TK});
        ctx->set_materialize_grads(false);
        keep(ctx, "options", rest.options);
        return {out.scores_TE, out.weights_TK};
    }
    static Grads backward(AutogradContext* ctx, Grads grads) {
        auto saved = ctx->get_saved_variables();
        Tensor dlogits_TE = at::empty_like(saved[0]);
        auto whole = [](const Tensor& t) { return t.defined() ? t.contiguous() : t; };
        MOE_BY_DEVICE("route", saved[0], route_backward, Route{saved[0], {}, saved[1]}, whole(grads[1]), whole(grads[0]), kept<RouteOptions>(ctx, "options"), dlogits_TE);
        return {dlogits_TE, Tensor()};
    }
};

void check_options(const RouteOptions& o, int64_t E) {
    MOE_CHECK(o.top_k >= 1 && o.top_k <= E, usage, "route: top_k", std::to_string(o.top_k), fmt::format("1 to {}, the experts", E), "");
    MOE_CHECK(o.n_group >= 1 && E % o.n_group == 0, usage, "route: n_group", std::to_string(o.n_group), fmt::format("a divisor of {} experts", E), "");
    MOE_CHECK(o.topk_group >= 1 && o.topk_group <= o.n_group, usage, "route: topk_group", std::to_string(o.topk_group), fmt::format("1 to {}, the groups", o.n_group), "");
    MOE_CHECK(o.top_k <= E / o.n_group * o.topk_group, usage, "route: top_k", std::to_string(o.top_k), fmt::format("at most the {} experts of {} groups", E / o.n_group * o.topk_group, o.topk_group), "");
    MOE_CHECK(o.temperature > 0, usage, "route: temperature", fmt::format("{}", o.temperature), "above 0", "");
}
/// Of a choice that is given, on the CPU: on CUDA the host would wait, and the kernel takes NaN for an expert that is not there.
void check_ids(const Tensor& ids_TK, int64_t E) {
    if (!ids_TK.is_cpu()) return;
    auto* id = ids_TK.const_data_ptr<int64_t>();
    for (int64_t p = 0; p < ids_TK.numel(); ++p)
        MOE_CHECK(id[p] >= 0 && id[p] < E, shape, fmt::format("route: ids[{}][{}]", p / ids_TK.size(1), p % ids_TK.size(1)), std::to_string(id[p]), fmt::format("an expert in [0, {})", E), "");
}
}  // namespace

Route route(const Tensor& logits_TE, const Tensor& bias_E, const RouteOptions& options, const Tensor& ids_TK) {
    check_dims("route", {"logits", logits_TE}, 2);
    check_wide_float("route", {"logits", logits_TE});
    int64_t T = logits_TE.size(0), E = logits_TE.size(1);
    check_options(options, E);
    Tensor logits = logits_TE.contiguous(), bias;
    if (bias_E.defined()) {
        check_shape("route", {"bias", bias_E}, {E});
        check_float("route", {"bias", bias_E});
        check_same_device("route", {"logits", logits}, {"bias", bias_E});
        bias = bias_E.detach().to(logits.scalar_type()).contiguous();
    }
    bool choose = !ids_TK.defined();
    if (!choose) {
        check_shape("route", {"ids", ids_TK}, {T, options.top_k});
        check_dtype("route", {"ids", ids_TK}, {at::kLong});
        check_same_device("route", {"logits", logits}, {"ids", ids_TK});
    }
    Route out{at::empty({T, E}, logits.options()), at::empty({T, options.top_k}, logits.options()), choose ? at::empty({T, options.top_k}, logits.options().dtype(at::kLong)) : ids_TK.contiguous()};
    if (!choose) check_ids(out.ids_TK, E);
    if (wants_grad(logits)) {
        auto made = RouteFunction::apply(logits, RouteRest{bias, options, choose, out});
        return {made[0], made[1], out.ids_TK};
    }
    Tensor plain = logits.detach();
    MOE_BY_DEVICE("route", plain, route_forward, plain, bias, options, choose, out);
    return out;
}

void count_pairs(const Tensor& ids_TK, const Tensor& domain_T, const Tensor& kept_TK, Tensor counts_DE, Tensor dropped_E) {
    check_dims("count_pairs", {"ids", ids_TK}, 2);
    check_dtype("count_pairs", {"ids", ids_TK}, {at::kLong});
    check_shape("count_pairs", {"domain", domain_T}, {ids_TK.size(0)});
    check_dtype("count_pairs", {"domain", domain_T}, {at::kInt});
    check_dims("count_pairs", {"counts", counts_DE}, 2);
    for (auto& t : {counts_DE, dropped_E, kept_TK}) {
        if (!t.defined()) continue;
        check_dtype("count_pairs", {"counts or kept", t}, {at::kLong});
        check_contiguous("count_pairs", {"counts or kept", t});
        check_same_device("count_pairs", {"ids", ids_TK}, {"counts or kept", t});
    }
    check_same_device("count_pairs", {"ids", ids_TK}, {"domain", domain_T});
    if (kept_TK.defined()) {
        check_shape("count_pairs", {"kept", kept_TK}, {ids_TK.size(0), ids_TK.size(1)});
        check_shape("count_pairs", {"dropped", dropped_E}, {counts_DE.size(1)});
    }
    Tensor ids = ids_TK.contiguous(), domain = domain_T.contiguous();
    MOE_BY_DEVICE("count_pairs", ids, count_pairs, ids, domain, kept_TK, counts_DE, dropped_E);
}
}  // namespace moe::kernels
