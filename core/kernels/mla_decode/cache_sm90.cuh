// What the fast kernels share: widths 512 and 64, copies of tiles into shared memory, orders from the warps that score to those that add up values, pairs of numbers.
#pragma once
#include "core/kernels/mla_decode/instructions_sm90.cuh"
#include "core/kernels/mla_decode/work_sm90.cuh"

#include <cuda_bf16.h>

namespace moe::kernels::sm90 {
constexpr int kLatent = 512, kRope = 64, kRowBytesPlain = 2 * (kLatent + kRope), kRowBytesFp8 = kLatent + kLatent / 128 * 4 + 2 * kRope;
constexpr int kSteps = (kLatent + kRope) / 16, kLatentSteps = kLatent / 16;              // products of depth 16 a score

/// Of which two can be under way: one a tile, one at the end of a piece, one at the end.
enum class Order : int { first_tile, tile, write, stop };

/// Queries of a sequence, rows row0 … row0 + rows − 1, into the L2 cache. A whole warp calls it.
__device__ inline void prefetch_queries(const MlaDecode& p, int b, int row0, int rows) {
    for (int row = row0 + threadIdx.x % 32; row < min(row0 + rows, p.Q * p.H); row += 32) {
        const int64_t token = b * p.Q + row / p.H, head = row % p.H;
        bulk_prefetch(static_cast<const __nv_bfloat16*>(p.q_latent) + token * p.latent_token + head * p.latent_head, kLatent * 2);
        bulk_prefetch(static_cast<const __nv_bfloat16*>(p.q_rope) + token * p.rope_token + head * p.rope_head, kRope * 2);
    }
}

/// The copies' side of a kernel over a bf16 cache: one warp's lanes call it together, the first one starts the copies. The number of the next tile's block is read
/// a tile ahead and waited for only when it is needed, so it stays in a register.
struct Copies {
    int block = 0;

    /// The next tile into shared memory.
    template <class S, class Shared> __device__ void start(const MlaDecode& p, Shared& shared, const CUtensorMap* map, int stage, int row0) {
        bool begins = false;
        if (threadIdx.x % 32 == 0 && shared.ahead.more()) {
            const uint32_t to = shared_address(shared.tiles[stage]), bar = shared_address(&shared.full[stage]);
            barrier_expect(bar, S::kTileBytes);
#pragma unroll 1
            for (int sub = 0; sub < kRowBytesPlain / 128; ++sub) tensor_load(to + sub * (kBlockTokens * 128), map, sub * 64, block * kBlockTokens, bar);
            begins = shared.ahead.step();
            next(p, shared);
        }
        if (!__any_sync(0xffffffffu, begins)) return;
        __syncwarp();
        prefetch_queries(p, shared.ahead.sequence(), row0, S::kRows);
    }
    template <class Shared> __device__ void next(const MlaDecode& p, const Shared& shared) {
        if (shared.ahead.more()) block = p.block_table[shared.ahead.entry(p.M)];
    }
};

__device__ inline float2 floats_of(uint32_t two_bf16) { return {__uint_as_float(two_bf16 << 16), __uint_as_float(two_bf16 & 0xffff0000u)}; }
__device__ inline uint32_t bf16_of(float a, float b) {
    __nv_bfloat162 x = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<uint32_t*>(&x);
}
/// Largest over the four lanes that share a row of a fragment.
__device__ inline float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ inline float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
}  // namespace moe::kernels::sm90
