// Launchers of rmsnorm, see rmsnorm_kernels.h.
#pragma once
#include "core/kernels/common/sm90.h"
#include "core/kernels/quantize/quantize_sm90.h"

namespace moe::kernels::sm90 {

struct RmsNorm {
    Dtype dtype;              ///< of x, gamma, y, dy, dx
    int64_t T, D;
    double eps;
    const void* x;            ///< [T, D]
    const void* gamma;        ///< [D]
    void* y;                  ///< [T, D]
    RowsCopy copy;            ///< of y, or of dx in backward; bf16 by 16 bytes only
    void* rstd;               ///< [T] fp64 for fp64, else fp32
    const void* dy;           ///< [T, D]
    const void* more;         ///< [T, D] that dx also gets, or null
    void* dx;                 ///< [T, D]
    void* partial;            ///< [rmsnorm_parts(T), D] as rstd, or null: no gradient of gamma
    void* dgamma;             ///< [D], added to, or null
    Dtype dgamma_dtype;       ///< fp32, fp64 or bf16
};
/// Blocks of the backward pass, each with its part of gamma's gradient. A function of T alone: the order of the sum is too.
int rmsnorm_parts(int64_t T);
/// Widest row of the backward pass: a row of sums must fit into shared memory.
int64_t rmsnorm_widest(Dtype dtype);
cudaError_t rmsnorm_forward(const RmsNorm& p, cudaStream_t stream);
cudaError_t rmsnorm_backward(const RmsNorm& p, cudaStream_t stream);

}  // namespace moe::kernels::sm90
