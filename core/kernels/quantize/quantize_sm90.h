// Launchers of the quantisers. Everything starts at a multiple of 16 bytes.
#pragma once
#include "core/kernels/common/sm90.h"

namespace moe::kernels::sm90 {
/// Where a kernel that makes bf16 rows leaves their E4M3 copy as well: q [R, K] and scales [ceil(K / 128), pitch], both starting at multiples of 16 bytes, K % 8 == 0. No q: no copy is wanted.
struct RowsCopy {
    void* q = nullptr;
    float* scales = nullptr;
    int64_t pitch = 0;
};

/// x [R, K] of fp32 or bf16, K % 8 == 0, to q [R, K] and scales [ceil(K / 128), scale_pitch]; rows from *used on may stay as they are (nullptr: all count).
cudaError_t quantize_rows(const void* x, Dtype dtype, int64_t rows, int64_t columns, void* q, float* scales, int64_t scale_pitch, const int* used, cudaStream_t stream);
/// w [E, O, I] of fp32 or bf16, O and I multiples of 16, to q [E, O, I], its transpose [E, I, O] and scales [E, ceil(O / 128), ceil(I / 128)].
cudaError_t quantize_weight(const void* w, Dtype dtype, int64_t experts, int64_t out, int64_t in, void* q, void* transposed, float* scales, cudaStream_t stream);
}  // namespace moe::kernels::sm90
