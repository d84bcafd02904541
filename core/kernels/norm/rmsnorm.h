#pragma once
#include "core/tensor/weight.h"

#include <utility>

namespace moe::kernels {

/// y = x / sqrt(mean(x²) + eps) · gamma over the last dim. x [T, D] fp64, fp32, bf16 or fp16, statistics in at least fp32; gamma.value
/// [D] of x's dtype. Backward adds to gamma.grad (fp64, fp32 or bf16) in an order that does not depend on timing.
/// fp8_readers: products in E4M3 that will read y (bf16); its copy is then made in the same pass and goes with it (kernels/quantize: attach_rows).
/// Source: Zhang and Sennrich, "Root mean square layer normalization", 2019.
Tensor rmsnorm(const Tensor& x_TD, const WeightPtr& gamma_D, double eps, int fp8_readers = 0);

/// {rmsnorm(x), x}: for a block that x also goes around. Backward makes both gradients of x in one pass, their sum rounded once.
std::pair<Tensor, Tensor> rmsnorm_and_input(const Tensor& x_TD, const WeightPtr& gamma_D, double eps, int fp8_readers = 0);

}  // namespace moe::kernels
