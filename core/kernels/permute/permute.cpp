#include "core/kernels/permute/permute.h"

#include "core/kernels/common/autograd.h"
#include "core/kernels/common/dispatch.h"
#include "core/kernels/permute/permute_kernels.h"

#include <ATen/ops/empty.h>

#include <limits>

namespace moe::kernels {
namespace {
Tensor gather_rows(const Tensor& x_TD, const SortPlan& plan, bool fp8) {
    Tensor y_RD = at::empty({plan.R, x_TD.size(1)}, x_TD.options());
    auto copy = copy_to_fill(y_RD.size(0), y_RD.size(1), y_RD, fp8);
    MOE_BY_DEVICE("permute", x_TD, gather_rows, x_TD, plan, y_RD, copy);
    attach_rows(y_RD, copy);
    return y_RD;
}
Tensor add_rows(const Tensor& base_TD, const Tensor& more_TD, const Tensor& y_RD, const SortPlan& plan) {
    Tensor out_TD = at::empty({plan.T, y_RD.size(1)}, y_RD.options());
    MOE_BY_DEVICE("unpermute", y_RD, add_rows, base_TD, more_TD, y_RD, plan, out_TD);
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

Tensor whole(const Tensor& t) { return t.defined() ? t.contiguous() : t; }
std::optional<Tensor> given(const Tensor& t) { return t.defined() ? std::optional<Tensor>(t) : std::nullopt; }

/// Its outputs are rows, weights and, where asked for, x.
struct PermuteFunction : Function<PermuteFunction> {
    static Grads forward(AutogradContext* ctx, const Tensor& x_TD, const Tensor& weights_TK, const SortPlan& plan, bool and_input, bool fp8) {
        keep(ctx, "plan", plan);
        ctx->set_materialize_grads(false);
        Grads out = {gather_rows(x_TD, plan, fp8), gather_weights(weights_TK, plan)};
        if (and_input) out.push_back(x_TD);
        return out;
    }
    static Grads backward(AutogradContext* ctx, Grads grads) {
        const SortPlan& plan = kept<SortPlan>(ctx, "plan");
        Tensor dx_TD = grads.size() > 2 ? grads[2] : Tensor(), dweights_TK;
        if (grads[0].defined() && ctx->needs_input_grad(0)) dx_TD = add_rows(whole(dx_TD), {}, grads[0].contiguous(), plan);
        if (grads[1].defined() && ctx->needs_input_grad(1)) dweights_TK = scatter_weights(grads[1].contiguous(), plan);
        return {dx_TD, dweights_TK, Tensor(), Tensor(), Tensor()};
    }
};

struct UnpermuteFunction : Function<UnpermuteFunction> {
    static Tensor forward(AutogradContext* ctx, const std::optional<Tensor>& base_TD, const std::optional<Tensor>& more_TD, const Tensor& y_RD, const SortPlan& plan, bool fp8) {
        keep(ctx, "plan", plan);
        ctx->saved_data["fp8"] = fp8;
        ctx->saved_data["base"] = base_TD.has_value();
        ctx->saved_data["more"] = more_TD.has_value();
        return add_rows(base_TD.value_or(Tensor()), more_TD.value_or(Tensor()), y_RD, plan);
    }
    static Grads backward(AutogradContext* ctx, Grads grads) {
        Tensor d_TD = grads[0].contiguous();
        auto to = [&](const char* input) { return ctx->saved_data[input].toBool() ? d_TD : Tensor(); };
        return {to("base"), to("more"), gather_rows(d_TD, kept<SortPlan>(ctx, "plan"), ctx->saved_data["fp8"].toBool()), Tensor(), Tensor()};
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

static void check_permuted(const Tensor& x_TD, const Tensor& weights_TK, const SortPlan& plan) {
    check_dims("permute", {"x", x_TD}, 2);
    check_shape("permute", {"x", x_TD}, {plan.T, -1});
    check_float("permute", {"x", x_TD});
    check_shape("permute", {"weights", weights_TK}, {plan.T, plan.K});
    check_wide_float("permute", {"weights", weights_TK});
    check_same_device("permute", {"x", x_TD}, {"weights", weights_TK});
    check_same_device("permute", {"x", x_TD}, {"plan", plan.position_TK});
}

std::pair<Tensor, Tensor> permute(const Tensor& x_TD, const Tensor& weights_TK, const SortPlan& plan, bool fp8) {
    check_permuted(x_TD, weights_TK, plan);
    Tensor x = x_TD.contiguous(), weights = weights_TK.contiguous();
    if (!wants_grad(x) && !wants_grad(weights)) return {gather_rows(x, plan, fp8), gather_weights(weights, plan)};
    auto out = PermuteFunction::apply(x, weights, plan, false, fp8);
    return {out[0], out[1]};
}

std::tuple<Tensor, Tensor, Tensor> permute_and_input(const Tensor& x_TD, const Tensor& weights_TK, const SortPlan& plan, bool fp8) {
    check_permuted(x_TD, weights_TK, plan);
    Tensor x = x_TD.contiguous(), weights = weights_TK.contiguous();
    if (!wants_grad(x)) {
        auto [rows_RD, weights_R] = permute(x, weights, plan, fp8);
        return {rows_RD, weights_R, x};
    }
    auto out = PermuteFunction::apply(x, weights, plan, true, fp8);
    pass_rows(x, out[2]);
    return {out[0], out[1], out[2]};
}

Tensor unpermute(const Tensor& base_TD, const Tensor& y_RD, const SortPlan& plan, const Tensor& more_TD, bool fp8) {
    check_shape("unpermute", {"y", y_RD}, {plan.R, -1});
    check_float("unpermute", {"y", y_RD});
    check_same_device("unpermute", {"y", y_RD}, {"plan", plan.position_TK});
    Tensor y = y_RD.contiguous(), base = whole(base_TD), more = whole(more_TD);
    MOE_CHECK(base.defined() || !more.defined(), usage, "unpermute: base", "undefined", "defined where `more` is", "");
    bool wanted = wants_grad(y);
    for (Named t : {Named{"base", base}, Named{"more", more}}) {
        if (!t.tensor.defined()) continue;
        check_shape("unpermute", t, {plan.T, y.size(1)});
        check_same_dtype("unpermute", t, {"y", y});
        check_same_device("unpermute", t, {"y", y});
        wanted = wanted || wants_grad(t.tensor);
    }
    return wanted ? UnpermuteFunction::apply(given(base), given(more), y, plan, fp8) : add_rows(base, more, y, plan);
}
}  // namespace moe::kernels
