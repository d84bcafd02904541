// Launchers of mla_decode and append_latent, see mla_decode_kernels.h.
// Letters: B sequences, Q new tokens a sequence, H heads, L latent width, R rope width, N cache blocks of 64 tokens, M entries of a sequence's block table.
#pragma once
#include "core/kernels/common/sm90.h"

#include <cstddef>

namespace moe::kernels::sm90 {

struct MlaDecode {
    Dtype dtype;                          ///< of q, out and a plain cache
    bool fp8;                             ///< rows of bytes: L E4M3 values, L / 128 fp32 scales, R bf16 values
    int B, Q, H, L, R, M;
    const void* q_latent;                 ///< [B·Q, H, L], rows as the strides say
    const void* q_rope;                   ///< [B·Q, H, R]
    int64_t latent_token, latent_head;    ///< strides in elements
    int64_t rope_token, rope_head;
    const void* rows;                     ///< [N, 64, L + R] or [N, 64, L + L / 128 · 4 + 2 · R] bytes
    int64_t N;
    const int32_t* block_table;           ///< [B, M]
    const int32_t* lengths;               ///< [B], new tokens included; more than 64 · M counts as 64 · M
    double scale;
    void* out;                            ///< [B·Q, H, L]
    void* lse;                            ///< [B·Q, H] fp64 for fp64, else fp32
    void* workspace;                      ///< mla_decode_workspace bytes, no initial value needed
    float scale_log2 = 0;                 ///< scale / ln 2: the launcher sets it
    int variant = 0;                      ///< 0: the launcher chooses; below: the general kernel; for comparisons: 1, 2 bf16 with 16 and 64 rows, 3, 4 FP8 with 16 and 32
};
/// Bytes of workspace for these shapes, strides and pointers; 0 where the general kernel runs.
size_t mla_decode_workspace(const MlaDecode& p);
cudaError_t mla_decode(const MlaDecode& p, cudaStream_t stream);

struct AppendLatent {
    Dtype dtype;                          ///< of latent and rope, and of a plain cache
    bool fp8;
    int64_t T;                            ///< new tokens
    int B, L, R, M;
    const void* latent;                   ///< [T, L], rows latent_stride apart
    const void* rope;                     ///< [T, R]
    int64_t latent_stride, rope_stride;
    void* rows;
    int64_t N;
    const int32_t* block_table;
    const int32_t* sequence;              ///< [T]
    const int32_t* position;              ///< [T]
};
cudaError_t append_latent(const AppendLatent& p, cudaStream_t stream);

}  // namespace moe::kernels::sm90
