// Attention of a few new tokens a sequence over a cache of latents, as MLA decodes in its absorbed form: keys and values of all heads are one latent and one
// rotated part a token, kept in blocks of 64 tokens.
// Letters: B sequences, Q new tokens a sequence, H heads, L latent width, R rotated width, N blocks of the cache, M entries of a sequence's block table.
#pragma once
#include "core/tensor/check.h"

namespace moe::kernels {

/// Tokens of a block of the cache.
constexpr int64_t kCacheBlock = 64;

/// What is known of past tokens. Token t of sequence b lies in row t % 64 of block block_table[b][t / 64].
struct LatentCache {
    /// plain: a row is L + R numbers. fp8: a row is bytes: L E4M3 values, L / 128 fp32 scales (one for 128 values), R bf16 values; 656 of them for 512 and 64.
    enum class Format { plain, fp8 };
    Format format = Format::plain;
    int64_t latent = 0, rope = 0;      ///< L, R; R may be 0. fp8 wants L a multiple of 128
    Tensor rows;                       ///< plain [N, 64, L + R] fp64, fp32, bf16 or fp16; fp8 [N, 64, cache_row_bytes] uint8. Contiguous
    Tensor block_table;                ///< int32 [B, M]; entries past a sequence's length are not read
};

/// Bytes of a row in the fp8 format.
int64_t cache_row_bytes(int64_t latent, int64_t rope);

/// Rows of an empty cache, zeros: dtype is that of a plain cache and not read for fp8.
Tensor make_cache_rows(LatentCache::Format format, int64_t num_blocks, int64_t latent, int64_t rope, at::ScalarType dtype, at::Device device);

struct MlaDecoded {
    Tensor out;      ///< [B, Q, H, L] in q's dtype: Σ probability · latent; the caller multiplies by the value half of kv_b
    Tensor lse;      ///< [B, Q, H] fp32 (fp64 for fp64): logarithm of the sum of e^score; −inf where nothing is seen
};

/// score = scale · (q_latent · latent + q_rope · rope) with q_latent [B, Q, H, L] already multiplied by the key half of kv_b and q_rope [B, Q, H, R] already rotated,
/// softmax over the tokens seen. lengths int32 [B] counts the new tokens, whose rows are in the cache already: new token i sees the first length − Q + 1 + i.
/// A token that sees nothing gives zeros. q is fp64, fp32, bf16 or fp16, with a plain cache of its dtype or an fp8 cache; sums in at least fp32.
/// CUDA: bf16 with L 512 and R 64 at the speed of memory, all else correct but slow; lengths are never read by the host, and one longer than 64 M counts as 64 M.
/// Deterministic. No gradient. Throws moe::Error (shape, dtype, device, usage); on the CPU also for lengths and block numbers outside the cache.
/// Source: DeepSeek-V2 (2024), section 2.1 and appendix C; split softmax: Dao et al., "Flash-Decoding", 2023.
MlaDecoded mla_decode(const Tensor& q_latent, const Tensor& q_rope, const LatentCache& cache, const Tensor& lengths, double scale);

/// Writes new tokens into the cache: latent [T, L] (after its norm) and rope [T, R] (rotated) of token t become row `position[t]` of sequence `sequence[t]`, both int32 [T].
/// A token with a negative sequence or position is left out, so that padded batches need no other shapes. Rows of latent and rope may lie apart.
/// plain: the cache's dtype, copied. fp8: any of fp64, fp32, bf16, fp16; scale = amax / 448 of 128 values, values / scale rounded to nearest even; rope rounded to bf16.
/// Throws moe::Error (shape, dtype, device); on the CPU also for places outside the cache, which CUDA leaves out.
void append_latent(const LatentCache& cache, const Tensor& latent_TL, const Tensor& rope_TR, const Tensor& sequence_T, const Tensor& position_T);

}  // namespace moe::kernels
