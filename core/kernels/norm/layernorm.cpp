#include "core/kernels/norm/layernorm.h"

#include "core/kernels/common/autograd.h"
#include "core/tensor/check.h"

#include <ATen/ops/native_layer_norm.h>
#include <ATen/ops/native_layer_norm_backward.h>

namespace moe::kernels {
namespace {
struct LayerNormFunction : Function<LayerNormFunction> {
    static Tensor forward(AutogradContext* ctx, const Tensor& x_TD, const WeightPtr& gamma, const WeightPtr& beta, double eps) {
        auto [y_TD, mean_T, rstd_T] = at::native_layer_norm(x_TD, {x_TD.size(1)}, gamma->value, beta->value, eps);
        ctx->save_for_backward({x_TD, mean_T, rstd_T});
        hold_weight(ctx, gamma);
        ctx->saved_data["beta"] = c10::IValue::make_capsule(beta);
        return y_TD;
    }
    /// The gradients of gamma and beta come out of the same pass as dx, so they are made at once even where others are deferred.
    static Grads backward(AutogradContext* ctx, Grads grads) {
        WeightPtr gamma = held_weight(ctx), beta = c10::static_intrusive_pointer_cast<Weight>(ctx->saved_data.at("beta").toCapsule());
        auto saved = ctx->get_saved_variables();
        auto [dx_TD, dgamma_D, dbeta_D] = at::native_layer_norm_backward(grads[0].contiguous(), saved[0], {saved[0].size(1)}, saved[1], saved[2], gamma->value, beta->value, {true, true, true});
        if (gamma->grad.defined()) gamma->grad.add_(dgamma_D);
        if (beta->grad.defined()) beta->grad.add_(dbeta_D);
        return {dx_TD, Tensor(), Tensor(), Tensor()};
    }
};
}  // namespace

Tensor layernorm(const Tensor& x_TD, const WeightPtr& gamma_D, const WeightPtr& beta_D, double eps) {
    check_dims("layernorm", {"x", x_TD}, 2);
    check_float("layernorm", {"x", x_TD});
    for (auto& w : {gamma_D, beta_D}) {
        MOE_CHECK(w, state, "layernorm", "no weight", "a Weight", "");
        check_shape("layernorm", {w->name, w->value}, {x_TD.size(1)});
        check_same_dtype("layernorm", {"x", x_TD}, {w->name, w->value});
        check_same_device("layernorm", {"x", x_TD}, {w->name, w->value});
    }
    Tensor x = x_TD.contiguous();
    if (wants_grad(x)) return LayerNormFunction::apply(x, gamma_D, beta_D, eps);
    return std::get<0>(at::native_layer_norm(x, {x.size(1)}, gamma_D->value, beta_D->value, eps));
}
}  // namespace moe::kernels
