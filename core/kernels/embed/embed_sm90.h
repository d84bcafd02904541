// Launchers of embed, see embed_kernels.h.
#pragma once
#include "core/kernels/common/sm90.h"

namespace moe::kernels::sm90 {

struct Embed {
    Dtype dtype;                  ///< of w, y, dy
    int64_t T, V, D;
    const int64_t* ids;           ///< [T]; backward: sorted
    const void* w;                ///< [V, D]
    void* y;                      ///< [T, D]
    const int64_t* order;         ///< [T] the token of each sorted id, ascending where ids are equal
    const void* dy;               ///< [T, D]
    void* dw;                     ///< [V, D], added to
    Dtype dw_dtype;               ///< fp32, fp64 or bf16, which is rounded once
    double* squares;              ///< where wanted [embed_square_parts()]: their sum becomes that of the squares of the rows of dw added to
};
/// A row of an id outside [0, V) becomes NaN: a kernel cannot throw, and a NaN loss is noticed at once.
cudaError_t embed_forward(const Embed& p, cudaStream_t stream);
int64_t embed_square_parts(const Embed& p);
/// Adds each run of equal ids by one block, in token order. Ids outside [0, V) are left out.
cudaError_t embed_add_grad(const Embed& p, cudaStream_t stream);

}  // namespace moe::kernels::sm90
