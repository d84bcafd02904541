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
std::pair<Tensor, Tensor> rms_forward(const Tensor& x_TD, const Tensor& gamma_D, double eps, NormReaders readers) {
    Tensor y_TD = at::empty_like(x_TD), rstd_T = at::empty({x_TD.size(0)}, x_TD.options().dtype(wide_dtype(x_TD)));
    auto copy = copy_to_fill(x_TD.size(0), x_TD.size(1), x_TD, readers.y > 0);
    MOE_BY_DEVICE("rmsnorm", x_TD, rmsnorm_forward, x_TD, gamma_D, eps, y_TD, rstd_T, copy);
    attach_rows(y_TD, copy, readers.y);
    return {y_TD, rstd_T};
}

/// y, with what backward reads kept in ctx.
Tensor keep_forward(AutogradContext* ctx, const Tensor& x_TD, const WeightPtr& gamma, double eps, NormReaders readers) {
    auto [y_TD, rstd_T] = rms_forward(x_TD, gamma->value, eps, readers);
    ctx->save_for_backward({x_TD, rstd_T});
    hold_weight(ctx, gamma);
    ctx->saved_data["dx_readers"] = readers.dx;
    return y_TD;
}

/// dx, with more_TD added where it is defined. gamma's gradient comes out of the same pass, so it is made at once even where others are deferred.
Tensor rms_backward(AutogradContext* ctx, const Tensor& dy_TD, const Tensor& more_TD) {
    WeightPtr gamma = held_weight(ctx);
    auto saved = ctx->get_saved_variables();
    Tensor x_TD = saved[0], rstd_T = saved[1], dx_TD = at::empty_like(x_TD);
    const int readers = int(ctx->saved_data["dx_readers"].toInt());
    auto copy = copy_to_fill(x_TD.size(0), x_TD.size(1), x_TD, readers > 0);
    MOE_BY_DEVICE("rmsnorm", x_TD, rmsnorm_backward, dy_TD.contiguous(), x_TD, gamma->value, rstd_T, more_TD.defined() ? more_TD.contiguous() : more_TD, dx_TD, gamma->grad, copy);
    attach_rows(dx_TD, copy, readers);
    return dx_TD;
}

struct RmsNormFunction : Function<RmsNormFunction> {
    static Tensor forward(AutogradContext* ctx, const Tensor& x_TD, const WeightPtr& gamma, double eps, NormReaders readers) { return keep_forward(ctx, x_TD, gamma, eps, readers); }
    static Grads backward(AutogradContext* ctx, Grads grads) { return {rms_backward(ctx, grads[0], {}), Tensor(), Tensor(), Tensor()}; }
};

struct RmsNormAndInputFunction : Function<RmsNormAndInputFunction> {
    static Grads forward(AutogradContext* ctx, const Tensor& x_TD, const WeightPtr& gamma, double eps, NormReaders readers) {
        ctx->set_materialize_grads(false);
        return {keep_forward(ctx, x_TD, gamma, eps, readers), x_TD};
    }
    static Grads backward(AutogradContext* ctx, Grads grads) { return {grads[0].defined() ? rms_backward(ctx, grads[0], grads[1]) : grads[1], Tensor(), Tensor(), Tensor()}; }
};

Tensor checked(const Tensor& x_TD, const WeightPtr& gamma_D) {
    check_dims("rmsnorm", {"x", x_TD}, 2);
    check_float("rmsnorm", {"x", x_TD});
    MOE_CHECK(gamma_D, state, "rmsnorm", "no weight", "a Weight", "");
    check_shape("rmsnorm", {"gamma", gamma_D->value}, {x_TD.size(1)});
    check_same_dtype("rmsnorm", {"x", x_TD}, {"gamma", gamma_D->value});
    check_same_device("rmsnorm", {"x", x_TD}, {"gamma", gamma_D->value});
    check_contiguous("rmsnorm", {"gamma", gamma_D->value});
    if (gamma_D->grad.defined()) check_main_float("rmsnorm", {"gamma.grad", gamma_D->grad});
    return x_TD.contiguous();
}
}  // namespace

Tensor rmsnorm(const Tensor& x_TD, const WeightPtr& gamma_D, double eps, NormReaders readers) {
    Tensor x = checked(x_TD, gamma_D);
    return wants_grad(x) ? RmsNormFunction::apply(x, gamma_D, eps, readers) : rms_forward(x, gamma_D->value, eps, readers).first;
}

std::pair<Tensor, Tensor> rmsnorm_and_input(const Tensor& x_TD, const WeightPtr& gamma_D, double eps, NormReaders readers) {
    Tensor x = checked(x_TD, gamma_D);
    if (!wants_grad(x)) return {rms_forward(x, gamma_D->value, eps, readers).first, x};
    auto out = RmsNormAndInputFunction::apply(x, gamma_D, eps, readers);
    return {out[0], out[1]};
}
}  // namespace moe::kernels
