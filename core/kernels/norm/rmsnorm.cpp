#include "core/kernels/norm/rmsnorm.h"

#include "core/kernels/common/autograd.h"
#include "core/kernels/common/dispatch.h"
#include "core/kernels/common/dtype.h"
#include "core/kernels/norm/rmsnorm_kernels.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

namespace moe::kernels {
namespace {
/// {y, rstd}
std::pair<Tensor, Tensor> rms_forward(const Tensor& x_TD, const Tensor& gamma_D, double eps) {
    Tensor y_TD = at::empty_like(x_TD), rstd_T = at::empty({x_TD.size(0)}, x_TD.options().dtype(wide_dtype(x_TD)));
    MOE_BY_DEVICE("rmsnorm", x_TD, rmsnorm_forward, x_TD, gamma_D, eps, y_TD, rstd_T);
    return {y_TD, rstd_T};
}

struct RmsNormFunction : Function<RmsNormFunction> {
    static Tensor forward(AutogradContext* ctx, const Tensor& x_TD, const WeightPtr& gamma, double eps) {
        auto [y_TD, rstd_T] = rms_forward(x_TD, gamma->value, eps);
        ctx->save_for_backward({x_TD, rstd_T});
        hold_weight(ctx, gamma);
        return y_TD;
    }
    /// gamma's gradient comes out of the same pass as dx, so it is made at once even where others are deferred.
    static Grads backward(AutogradContext* ctx, Grads grads) {
        WeightPtr gamma = held_weight(ctx);
        auto saved = ctx->get_saved_variables();
        Tensor x_TD = saved[0], rstd_T = saved[1], dy_TD = grads[0].contiguous(), dx_TD = at::empty_like(x_TD);
        MOE_BY_DEVICE("rmsnorm", x_TD, rmsnorm_backward, dy_TD, x_TD, gamma->value, rstd_T, dx_TD, gamma->grad);
        return {dx_TD, Tensor(), Tensor()};
    }
};
}  // namespace

Tensor rmsnorm(const Tensor& x_TD, const WeightPtr& gamma_D, double eps) {
    check_dims("rmsnorm", {"x", x_TD}, 2);
    check_float("rmsnorm", {"x", x_TD});
    MOE_CHECK(gamma_D, state, "rmsnorm", "no weight", "a Weight", "");
    check_shape("rmsnorm", {"gamma", gamma_D->value}, {x_TD.size(1)});
    check_same_dtype("rmsnorm", {"x", x_TD}, {"gamma", gamma_D->value});
    check_same_device("rmsnorm", {"x", x_TD}, {"gamma", gamma_D->value});
    check_contiguous("rmsnorm", {"gamma", gamma_D->value});
    if (gamma_D->grad.defined()) check_main_float("rmsnorm", {"gamma.grad", gamma_D->grad});
    Tensor x = x_TD.contiguous();
    return wants_grad(x) ? RmsNormFunction::apply(x, gamma_D, eps) : rms_forward(x, gamma_D->value, eps).first;
}
}  // namespace moe::kernels
