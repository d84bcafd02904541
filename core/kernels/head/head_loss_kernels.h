// Raw entry points of head_loss; its products are those of linear/linear_kernels.h.
#pragma once
#include "core/tensor/factor.h"

namespace moe::kernels {
using at::Tensor;

/// loss [n] (float64) = log Σ_v exp(logits) − logits[target], unscaled, 0 for kIgnore; logits [n, V] fp32 or fp64, targets
/// int64 [n]. Where dlogits [n, V] is defined it becomes (softmax − onehot) · scale, 0 for ignored rows; its dtype is logits'
/// or bf16 or fp16; its rows may lie where those of logits do: in the same dtype always, in a narrower one where overwrites_rows. Softmax in logits' dtype.
void cross_entropy_cpu(const Tensor& logits_NV, const Tensor& targets_N, const Factor& scale, Tensor loss_N, Tensor dlogits_NV);
void cross_entropy_cuda(const Tensor& logits_NV, const Tensor& targets_N, const Factor& scale, Tensor loss_N, Tensor dlogits_NV);
/// Whether a narrower gradient may overwrite its row of V logits of this dtype.
bool overwrites_rows_cpu(at::ScalarType logits, int64_t V);
bool overwrites_rows_cuda(at::ScalarType logits, int64_t V);
}  // namespace moe::kernels
