#pragma once
#include "core/tensor/weight.h"

#include <utility>

namespace moe::kernels {

/// How many products in E4M3 read what a norm makes: y, and in backward the gradient of x.
struct NormReaders { int y = 0, dx = 0; };

/// y = x / sqrt(mean(x²) + eps) · gamma over the last dim. x [T, D] fp64, fp32, bf16 or fp16, statistics in at least fp32; gamma.value
/// [D] of x's dtype. Backward adds to gamma.grad (fp64, fp32 or bf16) in an order that does not depend on timing.
/// readers: products in E4M3 that will read y and x's gradient (bf16); their copies are then made in the same passes and go with them (kernels/quantize: attach_rows).
/// Source: Zhang and Sennrich, "Root mean square layer normalization", 2019.
Tensor rmsnorm(const Tensor& x_TD, const WeightPtr& gamma_D, double eps, NormReaders readers = {});

/// {rmsnorm(x), x}: for a block that x also goes around. Backward makes both gradients of x in one pass, their sum rounded once.
std::pair<Tensor, Tensor> rmsnorm_and_input(const Tensor& x_TD, const WeightPtr& gamma_D, double eps, NormReaders readers = {});

}  // namespace moe::kernels
