#ifdef MOE_WITH_CUDA
#include "core/kernels/norm/rmsnorm_kernels.h"

#include "core/kernels/common/cuda_check.h"
#include "core/kernels/norm/rmsnorm_sm90.h"
#include "core/kernels/quantize/fused_copy.h"

#include <ATen/ops/empty.h>

namespace moe::kernels {

void rmsnorm_forward_cuda(const Tensor& x_TD, const Tensor& gamma_D, double eps, Tensor y_TD, Tensor rstd_T, const QuantizedRows& copy) {
    OnDevice on(x_TD);
    sm90::RmsNorm p{};
    p.dtype = sm90_dtype("rmsnorm", x_TD), p.T = x_TD.size(0), p.D = x_TD.size(1), p.eps = eps;
    p.x = in_pointer(x_TD), p.gamma = in_pointer(gamma_D), p.y = out_pointer(y_TD), p.rstd = out_pointer(rstd_T);
    p.copy = fused_copy(copy, {x_TD, gamma_D, y_TD});
    MOE_CUDA_CHECK(sm90::rmsnorm_forward(p, on.stream));
    if (!p.copy.q) fill_copy_cuda(y_TD, copy);
}

void rmsnorm_backward_cuda(const Tensor& dy_TD, const Tensor& x_TD, const Tensor& gamma_D, const Tensor& rstd_T, const Tensor& more_TD, Tensor dx_TD, Tensor dgamma_D,
                           const QuantizedRows& copy) {
    OnDevice on(x_TD);
    sm90::RmsNorm p{};
    p.dtype = sm90_dtype("rmsnorm", x_TD), p.T = x_TD.size(0), p.D = x_TD.size(1);
    p.x = in_pointer(x_TD), p.gamma = in_pointer(gamma_D), p.dy = in_pointer(dy_TD), p.dx = out_pointer(dx_TD), p.more = in_pointer(more_TD), p.rstd = const_cast<void*>(in_pointer(rstd_T));
    Tensor partial;
    if (dgamma_D.defined()) {
        MOE_CHECK(p.D <= sm90::rmsnorm_widest(p.dtype), shape, "rmsnorm: width on CUDA", std::to_string(p.D), fmt::format("at most {}", sm90::rmsnorm_widest(p.dtype)), "");
        partial = at::empty({sm90::rmsnorm_parts(p.T), p.D}, rstd_T.options());
        p.partial = out_pointer(partial), p.dgamma = out_pointer(dgamma_D), p.dgamma_dtype = sm90_dtype("rmsnorm", dgamma_D);
    }
    p.copy = fused_copy(copy, {dy_TD, x_TD, gamma_D, dx_TD, more_TD.defined() ? more_TD : dx_TD});
    MOE_CUDA_CHECK(sm90::rmsnorm_backward(p, on.stream));
    if (!p.copy.q) fill_copy_cuda(dx_TD, copy);
}
}  // namespace moe::kernels
#endif
