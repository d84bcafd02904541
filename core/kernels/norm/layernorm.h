#pragma once
#include "core/tensor/weight.h"

namespace moe::kernels {

/// y = (x − mean) / sqrt(var + eps) · gamma + beta over the last dim. x [T, D] fp64, fp32 or bf16, statistics in at least fp32; gamma,
/// beta [D] of x's dtype. Backward adds to both gradients. Made of LibTorch's own layer norm, on the CPU and on CUDA.
/// Source: Ba et al., "Layer normalization", 2016.
Tensor layernorm(const Tensor& x_TD, const WeightPtr& gamma_D, const WeightPtr& beta_D, double eps);

}  // namespace moe::kernels
