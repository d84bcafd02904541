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
    void* dlogits;                ///< [n, V], may be logits itself, or null
    Dtype dlogits_dtype;          ///< bf16, fp16 or logits' own
};
/// Loss and gradient of a target outside [0, V) that is not `ignore` are NaN: a kernel cannot throw.
cudaError_t cross_entropy(const CrossEntropy& p, cudaStream_t stream);

}  // namespace moe::kernels::sm90
