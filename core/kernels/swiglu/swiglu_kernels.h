// Raw entry points of swiglu: contiguous tensors of one device, outputs made by the caller.
#pragma once
#include "core/kernels/quantize/quantize.h"

namespace moe::kernels {
using at::Tensor;

/// y [R, F] = silu(gate) · up · row_weight; gate_up [R, 2F] and y of one dtype; row_weight [R] fp32 or fp64, or undefined: 1. copy: y's in E4M3, or undefined.
void swiglu_forward_cpu(const Tensor& gate_up_R2F, const Tensor& row_weight_R, Tensor y_RF, const QuantizedRows& copy = {});
void swiglu_forward_cuda(const Tensor& gate_up_R2F, const Tensor& row_weight_R, Tensor y_RF, const QuantizedRows& copy = {});

/// dgate_up [R, 2F] in gate_up's dtype, which may be gate_up itself; drow_weight [R] in row_weight's dtype, or undefined: not wanted. copy: dgate_up's in E4M3, or undefined.
void swiglu_backward_cpu(const Tensor& dy_RF, const Tensor& gate_up_R2F, const Tensor& row_weight_R, Tensor dgate_up_R2F, Tensor drow_weight_R, const QuantizedRows& copy = {});
void swiglu_backward_cuda(const Tensor& dy_RF, const Tensor& gate_up_R2F, const Tensor& row_weight_R, Tensor dgate_up_R2F, Tensor drow_weight_R, const QuantizedRows& copy = {});
}  // namespace moe::kernels
