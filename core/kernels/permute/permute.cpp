#include "core/kernels/permute/permute.h"

#include "core/kernels/common/autograd.h"
#include "core/kernels/common/dispatch.h"
#include "core/kernels/permute/permute_kernels.h"

#include <ATen/ops/empty.h>

#include <limits>

namespace moe::kernels {
namespace {
Tensor gather_rows(const Tensor& x_TD, const SortPlan& plan) {
    Tensor y_RD = at::empty({plan.R, x_TD.size(1)}, x_TD.options());
    MOE_BY_DEVICE("permute", x_TD, gather_rows, x_TD, plan, y_RD);
    return y_RD;
}
Tensor add_rows(const Tensor& base_TD, const Tensor& y_RD, const SortPlan& plan) {
    Tensor out_TD = at::empty({plan.T, y_RD.size(1)}, y_RD.options());
    MOE_BY_DEVICE("unpermute", y_RD, add_rows, base_TD, y_RD, plan, out_TD);
    return out_TD;
}
Tensor gather_weights(const Tensor& weights_TK, const SortPlan& plan) {
    Tensor rows_R = at::empty({plan.R}, weights_TK.options());
    MOE_BY_DEVICE("permute", weights_TK, gather_weights, weights_TK, plan, rows_R);
    return rows_R;
}
Tensor scatter_weights(const Tensor& rows_R, const SortPlan& plan) {
    Tensor weights_TK = at::empty({plan.T, plan.K}, rows_R.options());
    MOE_BY_DEVICE("permute", rows_R, scatter_weights, rows_R, plan, weights_TK);
    return weights_TK;
}

struct PermuteFunction : Function<PermuteFunction> {
    static Grads forward(AutogradContext* ctx, const Tensor& x_TD, const Tensor& weights_TK, const SortPlan& plan) {
        keep(ctx, "plan", plan);
        ctx->set_materialize_grads(false);
        return {gather_rows(x_TD, plan), gather_weights(weights_TK, plan)};
    }
    static Grads backward(AutogradContext* ctx, Grads grads) {
        const SortPlan& plan = kept<SortPlan>(ctx, "plan");
        Tensor dx_TD, dweights_TK;
        if (grads[0].defined() && ctx->needs_input_grad(0)) dx_TD = add_rows(Tensor(), grads[0].contiguous(), plan);
        if (grads[1].defined() && ctx->needs_input_grad(1)) dweights_TK = scatter_weights(grads[1].contiguous(), plan);
        return {dx_TD, dweights_TK, Tensor()};
    }
};

struct UnpermuteFunction : Function<UnpermuteFunction> {
    static Tensor forward(AutogradContext* ctx, const std::optional<Tensor>& base_TD, const Tensor& y_RD, const SortPlan& plan) {
        keep(ctx, "plan", plan);
        ctx->saved_data["base"] = base_TD.has_value();
        return add_rows(base_TD.value_or(Tensor()), y_RD, plan);
    }
    static Grads backward(AutogradContext* ctx, Grads grads) {
        Tensor d_TD = grads[0].contiguous();
        return {ctx->saved_data["base"].toBool() ? d_TD : Tensor(), gather_rows(d_TD, kept<SortPlan>(ctx, "plan")), Tensor()};
    }
};
}  // namespace

SortPlan sort_by_expert(const Tensor& ids_TK, int64_t num_experts, int64_t align) {
    check_dims("sort_by_expert", {"ids", ids_TK}, 2);
    check_dtype("sort_by_expert", {"ids", ids_TK}, {at::kLong});
    constexpr int64_t kMost = std::numeric_limits<int32_t>::max();     // also of either alone: their product must fit 64 bits
    MOE_CHECK(num_experts > 0 && num_experts <= kMost, usage, "sort_by_expert: num_experts", std::to_string(num_experts), "at least 1, below 2^31", "");
    MOE_CHECK(align > 0 && align <= kMost, usage, "sort_by_expert: align", std::to_string(align), "at least 1, below 2^31", "");
    MOE_CHECK(ids_TK.numel() + num_experts * (align - 1) <= kMost, shape, "sort_by_expert: ids", shape_text(ids_TK.sizes()), "fewer than 2^31 pairs", "use a smaller micro-batch");
    Tensor ids = ids_TK.contiguous();
    return MOE_BY_DEVICE("sort_by_expert", ids, sort_by_expert, ids, num_experts, align);
}

std::pair<Tensor, Tensor> permute(const Tensor& x_TD, const Tensor& weights_TK, const SortPlan& plan) {
    check_dims("permute", {"x", x_TD}, 2);
    check_shape("permute", {"x", x_TD}, {plan.T, -1});
    check_float("permute", {"x", x_TD});
    check_shape("permute", {"weights", weights_TK}, {plan.T, plan.K});
    check_wide_float("permute", {"weights", weights_TK});
    check_same_device("permute", {"x", x_TD}, {"weights", weights_TK});
    check_same_device("permute", {"x", x_TD}, {"plan", plan.position_TK});
    Tensor x = x_TD.contiguous(), weights = weights_TK.contiguous();
    if (!wants_grad(x) && !wants_grad(weights)) return {gather_rows(x, plan), gather_weights(weights, plan)};
    auto out = PermuteFunction::apply(x, weights, plan);
    return {out[0], out[1]};
}

Tensor unpermute(const Tensor& base_TD, const Tensor& y_RD, const SortPlan& plan) {
    check_shape("unpermute", {"y", y_RD}, {plan.R, -1});
    check_float("unpermute", {"y", y_RD});
    check_same_device("unpermute", {"y", y_RD}, {"plan", plan.position_TK});
    Tensor y = y_RD.contiguous(), base = base_TD;
    if (base.defined()) {
        check_shape("unpermute", {"base", base}, {plan.T, y.size(1)});
        check_same_dtype("unpermute", {"base", base}, {"y", y});
        check_same_device("unpermute", {"base", base}, {"y", y});
        base = base.contiguous();
    }
    if (!wants_grad(y) && !(base.defined() && wants_grad(base))) return add_rows(base, y, plan);
    return UnpermuteFunction::apply(base.defined() ? std::optional<Tensor>(base) : std::nullopt, y, plan);
}
}  // namespace moe::kernels
