// Launcher of cross_entropy, see head_loss_kernels.h. Letters: n rows, V vocabulary.
#pragma once
#include "core/kernels/common/sm90.h"

namespace moe::kernels::sm90 {

struct CrossEntropy {
    Dtype dtype;                  ///< of logits: fp32 or fp64
    int64_t n, V, ignore;
    const void* logits;           ///< [n, V]
    const int64_t* targets;       ///< [n]
    double scale;
    const double* device_scale;   ///< where given, in place of scale
    double* loss;                 ///< [n]
    void* dlogits;                ///< [n, V] at a pitch, may be logits itself, or null
    int64_t pitch;                ///< elements from row to row of dlogits
    Dtype dlogits_dtype;          ///< bf16, fp16 or logits' own
};
/// Loss and gradient of a target outside [0, V) that is not `ignore` are NaN: a kernel cannot throw.
cudaError_t cross_entropy(const CrossEntropy& p, cudaStream_t stream);
/// Whether all of a row of V logits of this many bytes each has been read before anything of its gradient is written.
bool cross_entropy_keeps_rows(int64_t bytes, int64_t V);

}  // namespace moe::kernels::sm90
