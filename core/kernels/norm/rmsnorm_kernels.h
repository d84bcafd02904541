// Raw entry points of rmsnorm: contiguous tensors of one device, outputs made by the caller.
#pragma once
#include "core/kernels/quantize/quantize.h"

namespace moe::kernels {
using at::Tensor;

/// y [T, D] = x · rstd · gamma; rstd [T] = 1 / sqrt(mean(x²) + eps). x, gamma [D], y: one dtype of fp64, fp32, bf16, fp16; rstd fp64
/// for fp64, else fp32. T may be 0. copy: y's in E4M3, or undefined.
void rmsnorm_forward_cpu(const Tensor& x_TD, const Tensor& gamma_D, double eps, Tensor y_TD, Tensor rstd_T, const QuantizedRows& copy = {});
void rmsnorm_forward_cuda(const Tensor& x_TD, const Tensor& gamma_D, double eps, Tensor y_TD, Tensor rstd_T, const QuantizedRows& copy = {});

/// dx [T, D] in x's dtype, more [T, D] of that dtype added to it where it is defined; dgamma [D] fp64, fp32 or bf16 is added to (rounded once), or undefined: none. The order of dgamma's sum depends on T
/// and D only. copy: dx's in E4M3, or undefined.
void rmsnorm_backward_cpu(const Tensor& dy_TD, const Tensor& x_TD, const Tensor& gamma_D, const Tensor& rstd_T, const Tensor& more_TD, Tensor dx_TD, Tensor dgamma_D, const QuantizedRows& copy = {});
void rmsnorm_backward_cuda(const Tensor& dy_TD, const Tensor& x_TD, const Tensor& gamma_D, const Tensor& rstd_T, const Tensor& more_TD, Tensor dx_TD, Tensor dgamma_D, const QuantizedRows& copy = {});
}  // namespace moe::kernels
