// fp32 numbers as sums of three bf16 ones, for products of bf16 with fp32 on the tensor cores.
#pragma once
#include "core/kernels/common/sm90.h"

namespace moe::kernels::sm90 {

/// x [rows, cols] fp32 = first + second + third to 24 bits: each the bf16 nearest to what is left. The part of column c of row r goes to
/// part[i] + r * stride + c; a null pointer skips one. NaN and infinities stay in the first.
struct Split {
    int64_t rows, cols, stride;
    const float* x;
    void* part[3];                ///< bf16
};
cudaError_t split(const Split& p, cudaStream_t stream);

}  // namespace moe::kernels::sm90
