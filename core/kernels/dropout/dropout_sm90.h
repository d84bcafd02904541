// Launchers of the draws, see dropout_kernels.h.
#pragma once
#include "core/kernels/common/sm90.h"

namespace moe::kernels::sm90 {

struct Draws {
    bool fp64;                            ///< of out, else fp32
    uint64_t seed;
    uint32_t purpose, step, layer;
    int64_t first, group, stride;         ///< row r has number first + r / group · stride + r % group
    int64_t R, C;
    void* out;                            ///< [R, C]
};
cudaError_t dropout_mask(const Draws& p, uint32_t threshold, double keep, cudaStream_t stream);
cudaError_t normal_rows(const Draws& p, cudaStream_t stream);

}  // namespace moe::kernels::sm90
