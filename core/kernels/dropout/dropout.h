// Random numbers of a step's tokens, by key: never saved, never dependent on what ran before.
// Letters: R rows, C columns.
#pragma once
#include "core/base/random.h"

#include <ATen/core/Tensor.h>

namespace moe::kernels {
using at::Tensor;

/// Names the rows of a matrix in a stream of draws: row r has number first + r / group · stride + r % group. Tokens are group = stride
/// = 1; the H local of all heads of a token are group H, stride all, first = token · all + first head.
struct RandomRows {
    RandomKey key;
    int64_t first = 0, group = 1, stride = 1;
};

/// Multipliers [R, C] of dropout: 0 with probability p, else 1 / (1 − p). dtype fp64 or fp32. C at most 2^18. Element (r, c) depends on
/// the key, the row's number and c only. Throws moe::Error (usage) for p outside [0, 1), (shape).
Tensor dropout_mask(int64_t R, int64_t C, double p, const RandomRows& rows, at::ScalarType dtype, at::Device device);

/// x · dropout_mask, in x's dtype; x [R, C] fp64, fp32 or bf16. Backward draws the mask again.
Tensor dropout(const Tensor& x_RC, double p, const RandomRows& rows);

/// Standard normal values [R, C], fp64 or fp32, as dropout_mask draws. Source: Box and Muller, 1958.
Tensor normal_rows(int64_t R, int64_t C, const RandomRows& rows, at::ScalarType dtype, at::Device device);

}  // namespace moe::kernels
