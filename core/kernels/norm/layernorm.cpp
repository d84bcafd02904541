#include "core/kernels/norm/layernorm.h"

#include "core/kernels/common/autograd.h"
#include "core/kernels/common/dtype.h"

#include <ATen/ops/native_layer_norm.h>
#include <ATen/ops/native_layer_norm_backward.h>

namespace moe::kernels {
namespace {
/// {y, mean, 1/deviation} in at least fp32: LibTorch's own keeps the statistics of narrow rows in the rows' dtype on the CPU.
std::tuple<Tensor, Tensor, Tensor> wide_layernorm(const Tensor& x_TD, const Weight& gamma, const Weight& beta, double eps) {
    auto wide = wide_dtype(x_TD);
    return at::native_layer_norm(x_TD.to(wide), {x_TD.size(1)}, gamma.value.to(wide), beta.value.to(wide), eps);
}

struct LayerNormFunction : Function<LayerNormFunction> {
    static Tensor forward(AutogradContext* ctx, const Tensor& x_TD, const WeightPtr& gamma, const WeightPtr& beta, double eps) {
        auto [y_TD, mean_T, rstd_T] = wide_layernorm(x_TD, *gamma, *beta, eps);
        ctx->save_for_backward({x_TD, mean_T, rstd_T});
        hold_weight(ctx, gamma);
        ctx->saved_data["beta"] = c10::IValue::make_capsule(beta);
        return y_TD.to(x_TD.scalar_type());
    }
    /// The gradients of gamma and beta come out of the same pass as dx, so they are made at once even where others are deferred; they
    /// are never rounded to a narrow dtype.
    static Grads backward(AutogradContext* ctx, Grads grads) {
        WeightPtr gamma = held_weight(ctx), beta = c10::static_intrusive_pointer_cast<Weight>(ctx->saved_data.at("beta").toCapsule());
        auto saved = ctx->get_saved_variables();
        auto wide = wide_dtype(saved[0]);
        auto [dx_TD, dgamma_D, dbeta_D] = at::native_layer_norm_backward(grads[0].contiguous().to(wide), saved[0].to(wide), {saved[0].size(1)}, saved[1], saved[2], gamma->value.to(wide),
                                                                         beta->value.to(wide), {true, true, true});
        if (gamma->grad.defined()) gamma->grad.add_(dgamma_D);
        if (beta->grad.defined()) beta->grad.add_(dbeta_D);
        return {dx_TD.to(saved[0].scalar_type()), Tensor(), Tensor(), Tensor()};
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
    return std::get<0>(wide_layernorm(x, *gamma_D, *beta_D, eps)).to(x.scalar_type());
}
}  // namespace moe::kernels
