#pragma once
#include "core/tensor/weight.h"

namespace moe::kernels {

/// y = silu(gate) · up, times row_weight of its row where that is defined. gate and up are the halves of the last dim:
/// gate_up [R, 2F] → [R, F] in gate_up's dtype; row_weight [R] fp32 or fp64 (a routing weight), or undefined. R may be 0.
/// Backward gives gate_up's and row_weight's gradients. Source: Shazeer, "GLU variants improve transformer", 2020.
/// fp8: a product in E4M3 made gate_up and another reads y (both bf16): the copies of y and of gate_up's gradient are made in the same passes and go with them (kernels/quantize: attach_rows).
Tensor swiglu(const Tensor& gate_up_R2F, const Tensor& row_weight_R = {}, bool fp8 = false);

}  // namespace moe::kernels
