// Raw entry points of swiglu: contiguous tensors of one device, outputs made by the caller.
#pragma once
#include <ATen/core/Tensor.h>

namespace moe::kernels {
using at::Tensor;

/// y [R, F] = silu(gate) · up · row_weight; gate_up [R, 2F] and y of one dtype; row_weight [R] fp32 or fp64, or undefined: 1.
void swiglu_forward_cpu(const Tensor& gate_up_R2F, const Tensor& row_weight_R, Tensor y_RF);
void swiglu_forward_cuda(const Tensor& gate_up_R2F, const Tensor& row_weight_R, Tensor y_RF);

/// dgate_up [R, 2F] in gate_up's dtype; drow_weight [R] in row_weight's dtype, or undefined: not wanted.
void swiglu_backward_cpu(const Tensor& dy_RF, const Tensor& gate_up_R2F, const Tensor& row_weight_R, Tensor dgate_up_R2F, Tensor drow_weight_R);
void swiglu_backward_cuda(const Tensor& dy_RF, const Tensor& gate_up_R2F, const Tensor& row_weight_R, Tensor dgate_up_R2F, Tensor drow_weight_R);
}  // namespace moe::kernels
