// Raw entry points of the draws: out [R, C] contiguous, fp32 or fp64. Four columns share one Philox block.
#pragma once
#include "core/kernels/dropout/dropout.h"

namespace moe::kernels {
/// A column is dropped where its 32-bit word is below `threshold` (2^32 · p); else it becomes `keep`.
void dropout_mask_cpu(const RandomRows& rows, uint32_t threshold, double keep, Tensor out_RC);
void dropout_mask_cuda(const RandomRows& rows, uint32_t threshold, double keep, Tensor out_RC);
void normal_rows_cpu(const RandomRows& rows, Tensor out_RC);
void normal_rows_cuda(const RandomRows& rows, Tensor out_RC);
}  // namespace moe::kernels
