// Decoding with products of single warps (mma.sync): MT groups of 16 query rows a block, bf16 and FP8 caches, widths 512 and 64.
//
// A block takes the tiles of its part (work_sm90.cuh) one after another; a ring of tiles in shared memory is filled by the copy engine, STAGES − 1 tiles ahead.
// Each tile is read from shared memory twice, for the scores and for the values, whatever the number of rows. Scores: the warps share out (16 rows, tokens);
// a lane's 16-byte load holds the same 8 or 16 columns of a token for several products in a row, so the columns are contracted in a permuted order, and the
// queries are loaded in that order. Values: each warp owns 512 / WARPS columns of all rows. Between the two, probabilities go through shared memory.
//
// FP8: E4M3 values become fp16 without loss (one instruction for two); scales are per (token, 128 columns), so those of the scores are applied to the sums
// over 128 columns, and those of the values are multiplied into the probabilities. Queries and scales are brought near 1 by powers of two (per row; per warp
// as a running maximum), which fp16's range needs.
//
// Lanes: g = lane / 4 is a row or a column of a fragment, q = lane % 4 a pair of the other dim.
#pragma once
#include "core/kernels/mla_decode/instructions_sm90.cuh"
#include "core/kernels/mla_decode/work_sm90.cuh"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace moe::kernels::sm90 {
constexpr int kLatent = 512, kRope = 64, kRowBytesPlain = 2 * (kLatent + kRope), kRowBytesFp8 = kLatent + kLatent / 128 * 4 + 2 * kRope;
constexpr int kSteps = (kLatent + kRope) / 16;              // products of depth 16 a score

template <bool FP8_, int TOKENS_, int WARPS_, int MT_, int STAGES_, int BLOCKS_> struct MmaShape {
    static constexpr bool FP8 = FP8_;
    static constexpr int TOKENS = TOKENS_, WARPS = WARPS_, MT = MT_, STAGES = STAGES_, BLOCKS = BLOCKS_;      // BLOCKS: of a multiprocessor
    static constexpr int kThreads = WARPS * 32, kRows = 16 * MT;
    static constexpr int kSides = WARPS / MT;                   // warps beside each other along the tokens
    static constexpr int NT = TOKENS / 8 / kSides;              // groups of 8 tokens a warp scores
    static constexpr int kColumns = kLatent / WARPS;            // value columns of a warp
    static constexpr int kRowBytes = FP8 ? kRowBytesFp8 : kRowBytesPlain, kTileBytes = TOKENS * kRowBytes;
    static constexpr int kPitch = TOKENS * 2 + 16;              // bytes of a row of probabilities: eight rows fall into different banks
    static constexpr bool kQueriesInRegisters = MT == 1;
    // Places in shared memory.
    static constexpr int kProbabilities = STAGES * kTileBytes, kQueries = kProbabilities + kRows * kPitch;
    static constexpr int kTops = kQueries + (kQueriesInRegisters ? 0 : MT * kSteps * 512), kFactors = kTops + kSides * kRows * 4, kQueryFactors = kFactors + kRows * 4;
    static constexpr int kBarriers = kQueryFactors + kRows * 4, kShared = kBarriers + STAGES * 8;
    static_assert(NT >= 1 && kSides * MT == WARPS && kPitch % 16 == 0 && kTileBytes % 512 == 0);
};

__device__ inline float2 floats_of(uint32_t two_bf16) { return {__uint_as_float(two_bf16 << 16), __uint_as_float(two_bf16 & 0xffff0000u)}; }
__device__ inline uint32_t bf16_of(float a, float b) {
    __nv_bfloat162 x = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<uint32_t*>(&x);
}
__device__ inline uint32_t fp16_of(float a, float b) {
    __half2 x = __floats2half2_rn(a, b);
    return *reinterpret_cast<uint32_t*>(&x);
}
__device__ inline uint32_t times_fp16(uint32_t a, uint32_t b) {
    __half2 x = __hmul2(*reinterpret_cast<__half2*>(&a), *reinterpret_cast<__half2*>(&b));
    return *reinterpret_cast<uint32_t*>(&x);
}
/// The power of two at or below x > 0; at least 2^−126.
__device__ inline float power_below(float x) { return __uint_as_float(max(__float_as_uint(x) & 0x7f800000u, 0x00800000u)); }

/// Largest over the four lanes that share g.
__device__ inline float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ inline float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

/// Queries of 16 rows as fragments in the permuted order: lane q holds columns 16 q … 16 q + 15 of each 64 (32 q … of each 128 for FP8's latent).
template <class S> struct Queries {
    uint32_t at[kSteps][4];

    /// Rows row0 + g and row0 + g + 8 of sequence b; rows past the last are zero. Returns what the latent part's scores must be multiplied by.
    __device__ float2 load(const MlaDecode& p, int b, int row0, int g, int q) {
        float2 factor{1, 1};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = row0 + g + 8 * half, token = b * p.Q + row / p.H, head = row % p.H;
            const bool real = row < p.Q * p.H;
            const uint32_t* latent = reinterpret_cast<const uint32_t*>(static_cast<const __nv_bfloat16*>(p.q_latent) + token * p.latent_token + head * p.latent_head);
            const uint32_t* rope = reinterpret_cast<const uint32_t*>(static_cast<const __nv_bfloat16*>(p.q_rope) + token * p.rope_token + head * p.rope_head);
            constexpr int kWide = S::FP8 ? 8 : 4;                // products that one lane's columns serve
#pragma unroll
            for (int k = 0; k < kSteps; k += 2) {
                const bool is_rope = k >= kLatent / 16;
                const int steps = is_rope ? 4 : kWide, column = is_rope ? 16 * q + 4 * (k - kLatent / 16) : k / steps * (16 * steps) + 4 * steps * q + 4 * (k % steps);
                const uint4 v = real ? *reinterpret_cast<const uint4*>((is_rope ? rope : latent) + column / 2) : uint4{0, 0, 0, 0};
                at[k][half] = v.x, at[k][half + 2] = v.y, at[k + 1][half] = v.z, at[k + 1][half + 2] = v.w;
            }
            if constexpr (S::FP8) {
                float top = 0;
#pragma unroll
                for (int k = 0; k < kLatent / 16; ++k)
                    for (int i = half; i < 4; i += 2) {
                        const float2 v = floats_of(at[k][i]);
                        top = fmaxf(top, fmaxf(fabsf(v.x), fabsf(v.y)));
                    }
                const float power = power_below(quad_max(top)), inverse = 1 / power;
#pragma unroll
                for (int k = 0; k < kLatent / 16; ++k)
                    for (int i = half; i < 4; i += 2) {
                        const float2 v = floats_of(at[k][i]);
                        at[k][i] = fp16_of(v.x * inverse, v.y * inverse);
                    }
                (half ? factor.y : factor.x) = power;
            }
        }
        return factor;
    }
};

template <class S> struct MmaBlock {
    const MlaDecode& p;
    uint8_t* shared;
    int warp, lane, g, q, mt, side;

    __device__ MmaBlock(const MlaDecode& p_, uint8_t* shared_)
        : p(p_), shared(shared_), warp(threadIdx.x / 32), lane(threadIdx.x % 32), g(lane / 4), q(lane % 4), mt(warp % S::MT), side(warp / S::MT) {}

    __device__ float* floats(int place) const { return reinterpret_cast<float*>(shared + place); }
    __device__ uint32_t full(int stage) const { return shared_address(shared + S::kBarriers + 8 * stage); }

    __device__ void start_copy(const CUtensorMap* map, Tiles& tiles, int stage) const {
        int64_t row;
        int tokens;
        if (!tiles.next(row, tokens)) return;
        const uint32_t to = shared_address(shared + stage * S::kTileBytes), bar = full(stage);
        if constexpr (S::FP8) {
            barrier_expect(bar, tokens * S::kRowBytes);
            bulk_load(to, static_cast<const uint8_t*>(p.rows) + row * S::kRowBytes, tokens * S::kRowBytes, bar);
        } else {
            barrier_expect(bar, S::kTileBytes);
#pragma unroll 1
            for (int sub = 0; sub < kRowBytesPlain / 128; ++sub) tensor_load(to + sub * (S::TOKENS * 128), map, sub * 64, int(row), bar);
        }
    }

    /// Rows of a tile that no token wrote may hold anything, NaN too: zeros, which probabilities of 0 leave alone.
    __device__ void clear_rest(uint8_t* tile, int tokens) const {
        constexpr int kParts = S::FP8 ? 1 : kRowBytesPlain / 128, kPart = S::kTileBytes / kParts;      // bf16: 64 columns of all rows lie together
#pragma unroll 1
        for (int i = tokens * (kPart / S::TOKENS) + int(threadIdx.x) * 16; i < kPart; i += S::kThreads * 16)
#pragma unroll 1
            for (int part = 0; part < kParts; ++part) *reinterpret_cast<uint4*>(tile + part * kPart + i) = uint4{0, 0, 0, 0};
        fence_for_engines();
        __syncthreads();
    }

    // ---- scores

    __device__ void query_step(const Queries<S>& queries, int k, uint32_t (&a)[4]) const {
        if constexpr (S::kQueriesInRegisters) {
            for (int i = 0; i < 4; ++i) a[i] = queries.at[k][i];
        } else {
            const uint4 v = reinterpret_cast<const uint4*>(shared + S::kQueries)[(mt * kSteps + k) * 32 + lane];
            a[0] = v.x, a[1] = v.y, a[2] = v.z, a[3] = v.w;
        }
    }
    __device__ static void spread(uint4 v, uint32_t* r) { r[0] = v.x, r[1] = v.y, r[2] = v.z, r[3] = v.w; }

    /// 64 columns of bf16: four products of depth 16. chunk(e): this lane's 16 bytes, e = 0, 1, of group nt's token.
    template <int CHAINS, class Chunk> __device__ void score_64(const Queries<S>& queries, int k0, float (&c)[CHAINS][S::NT][4], Chunk chunk) const {
        uint32_t b[S::NT][8];
#pragma unroll
        for (int nt = 0; nt < S::NT; ++nt) spread(chunk(nt, 0), b[nt]), spread(chunk(nt, 1), b[nt] + 4);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            uint32_t a[4];
            query_step(queries, k0 + i, a);
#pragma unroll
            for (int nt = 0; nt < S::NT; ++nt) multiply_bf16(c[i % CHAINS][nt], a, b[nt][2 * i], b[nt][2 * i + 1]);
        }
    }

    /// s[nt] = the 16 rows' products with the 8 tokens from (side · NT + nt) · 8 on.
    __device__ void scores(const uint8_t* tile, const Queries<S>& queries, float2 factor, float (&s)[S::NT][4]) const {
        constexpr int CHAINS = S::NT == 1 ? 4 : S::NT == 2 ? 2 : 1;      // sums side by side: a product waits for the one before it in its sum
        const int token = side * S::NT * 8 + g;
        float c[CHAINS][S::NT][4];
        auto clear = [&] {
#pragma unroll
            for (int i = 0; i < CHAINS * S::NT * 4; ++i) (&c[0][0][0])[i] = 0;
        };
        clear();
        if constexpr (!S::FP8) {
#pragma unroll
            for (int sub = 0; sub < kRowBytesPlain / 128; ++sub)
                score_64(queries, sub * 4, c, [&](int nt, int e) {
                    return *reinterpret_cast<const uint4*>(tile + sub * (S::TOKENS * 128) + (token + nt * 8) * 128 + (((2 * q + e) ^ g) << 4));
                });
#pragma unroll
            for (int nt = 0; nt < S::NT; ++nt)
                for (int i = 0; i < 4; ++i) {
                    s[nt][i] = c[0][nt][i];
                    for (int chain = 1; chain < CHAINS; ++chain) s[nt][i] += c[chain][nt][i];
                }
        } else {
            const uint8_t* row = tile + token * kRowBytesFp8;
#pragma unroll
            for (int nt = 0; nt < S::NT; ++nt)
                for (int i = 0; i < 4; ++i) s[nt][i] = 0;
#pragma unroll
            for (int group0 = 0; group0 < kLatent / 128; group0 += CHAINS) {
                if (group0) clear();
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    uint32_t b[CHAINS][S::NT][4];
#pragma unroll
                    for (int chain = 0; chain < CHAINS; ++chain)
                        for (int nt = 0; nt < S::NT; ++nt)
                            spread(*reinterpret_cast<const uint4*>(row + nt * 8 * kRowBytesFp8 + (group0 + chain) * 128 + q * 32 + half * 16), b[chain][nt]);
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        for (int chain = 0; chain < CHAINS; ++chain) {
                            uint32_t a[4];
                            query_step(queries, (group0 + chain) * 8 + half * 4 + i, a);
                            for (int nt = 0; nt < S::NT; ++nt) multiply_fp16(c[chain][nt], a, halves_of_e4m3(b[chain][nt][i] & 0xffff), halves_of_e4m3(b[chain][nt][i] >> 16));
                        }
                }
#pragma unroll
                for (int nt = 0; nt < S::NT; ++nt)
                    for (int chain = 0; chain < CHAINS; ++chain)
                        for (int i = 0; i < 2; ++i) {           // columns of a product's result are tokens 2 q and 2 q + 1
                            const float scale = *reinterpret_cast<const float*>(tile + ((side * S::NT + nt) * 8 + 2 * q + i) * kRowBytesFp8 + kLatent + (group0 + chain) * 4);
                            s[nt][i] += c[chain][nt][i] * scale, s[nt][i + 2] += c[chain][nt][i + 2] * scale;
                        }
            }
            float r[1][S::NT][4];
#pragma unroll
            for (int i = 0; i < S::NT * 4; ++i) (&r[0][0][0])[i] = 0;
            score_64(queries, kLatent / 16, r, [&](int nt, int e) {
                return *reinterpret_cast<const uint4*>(row + nt * 8 * kRowBytesFp8 + kLatent + kLatent / 128 * 4 + q * 32 + e * 16);
            });
#pragma unroll
            for (int nt = 0; nt < S::NT; ++nt)
                for (int i = 0; i < 4; ++i) s[nt][i] = s[nt][i] * (i < 2 ? factor.x : factor.y) + r[0][nt][i];
        }
    }

    // ---- values

    __device__ void probability_step(int m, int k, uint32_t (&a)[4]) const {
        load_matrices(a, shared_address(shared + S::kProbabilities + (m * 16 + lane % 16) * S::kPitch + k * 32 + lane / 16 * 16));
    }

    /// o += probabilities · this warp's columns.
    __device__ void values_bf16(const uint8_t* tile, float (&o)[S::MT][S::kColumns / 8][4]) const {
        const uint32_t base = shared_address(tile) + lane % 16 * 128;
#pragma unroll
        for (int k = 0; k < S::TOKENS / 16; ++k) {
            uint32_t a[S::MT][4];
#pragma unroll
            for (int m = 0; m < S::MT; ++m) probability_step(m, k, a[m]);
#pragma unroll
            for (int j = 0; j < S::kColumns / 16; ++j) {
                const int column = warp * S::kColumns + 16 * j;
                uint32_t b[4];
                load_transposed(b, base + column / 64 * (S::TOKENS * 128) + k * 2048 + (((column % 64 / 8 + lane / 16) ^ lane % 8) << 4));
#pragma unroll
                for (int m = 0; m < S::MT; ++m) multiply_bf16(o[m][2 * j], a[m], b[0], b[1]), multiply_bf16(o[m][2 * j + 1], a[m], b[2], b[3]);
            }
        }
    }

    /// Scales of this lane's tokens of each product as fp16 multiples of `power`, the running maximum's power of two. Returns old power / new power.
    __device__ float value_scales(const uint8_t* tile, float& power, uint32_t (&scales)[S::TOKENS / 16][2]) const {
        const float* at = reinterpret_cast<const float*>(tile + 2 * q * kRowBytesFp8 + kLatent + warp * S::kColumns / 128 * 4);
        constexpr int kRow = kRowBytesFp8 / 4;
        float x[S::TOKENS / 16][4], top = 0;
#pragma unroll
        for (int k = 0; k < S::TOKENS / 16; ++k)
            for (int i = 0; i < 4; ++i) {                       // tokens 2 q, 2 q + 1, 2 q + 8, 2 q + 9 of 16
                x[k][i] = at[(k * 16 + i / 2 * 8 + i % 2) * kRow];
                top = fmaxf(top, x[k][i]);
            }
        const float above = fmaxf(power, power_below(quad_max(top))), ratio = power / above, inverse = 1 / above;
        power = above;
#pragma unroll
        for (int k = 0; k < S::TOKENS / 16; ++k)
            for (int i = 0; i < 2; ++i) scales[k][i] = fp16_of(x[k][2 * i] * inverse, x[k][2 * i + 1] * inverse);
        return ratio;
    }
    __device__ void values_fp8(const uint8_t* tile, const uint32_t (&scales)[S::TOKENS / 16][2], float (&o)[S::MT][S::kColumns / 8][4]) const {
        const uint32_t base = shared_address(tile) + lane % 16 * kRowBytesFp8 + warp * S::kColumns + lane / 16 * 16;
#pragma unroll
        for (int k = 0; k < S::TOKENS / 16; ++k) {
            uint32_t a[S::MT][4];
#pragma unroll
            for (int m = 0; m < S::MT; ++m) {
                probability_step(m, k, a[m]);
                for (int i = 0; i < 4; ++i) a[m][i] = times_fp16(a[m][i], scales[k][i / 2]);
            }
#pragma unroll
            for (int j = 0; j < S::kColumns / 32; ++j) {
                uint32_t b[4];                                  // pairs of columns, transposed: bytes (t, d), (t, d + 1), (t + 1, d), (t + 1, d + 1)
                load_transposed(b, base + k * 16 * kRowBytesFp8 + j * 32);
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const uint32_t low = __byte_perm(b[2 * i], 0, 0x3120), high = __byte_perm(b[2 * i + 1], 0, 0x3120);      // column d's two tokens, then d + 1's
                    const uint32_t even0 = halves_of_e4m3(low & 0xffff), odd0 = halves_of_e4m3(low >> 16), even1 = halves_of_e4m3(high & 0xffff), odd1 = halves_of_e4m3(high >> 16);
#pragma unroll
                    for (int m = 0; m < S::MT; ++m) multiply_fp16(o[m][4 * j + 2 * i], a[m], even0, even1), multiply_fp16(o[m][4 * j + 2 * i + 1], a[m], odd0, odd1);
                }
            }
        }
    }

    // ---- results

    /// Two or four neighbouring columns of a row.
    template <class Store> __device__ void each_result(const float (&o)[S::MT][S::kColumns / 8][4], int m, int half, Store store) const {
#pragma unroll
        for (int n = 0; n < S::kColumns / 8; n += 2) {
            const float *x = o[m][n] + 2 * half, *y = o[m][n + 1] + 2 * half;
            if constexpr (S::FP8) {                             // o[n] holds even columns of 16, o[n + 1] the odd ones
                store(warp * S::kColumns + 8 * n + 4 * q, x[0], y[0]);
                store(warp * S::kColumns + 8 * n + 4 * q + 2, x[1], y[1]);
            } else {
                store(warp * S::kColumns + 8 * n + 2 * q, x[0], x[1]);
                store(warp * S::kColumns + 8 * n + 8 + 2 * q, y[0], y[1]);
            }
        }
    }
    __device__ void write(const Piece& piece, const Partials& partials, int worker, int row0, const float (&o)[S::MT][S::kColumns / 8][4], float power) const {
        const int R = p.Q * p.H;
#pragma unroll
        for (int m = 0; m < S::MT; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = m * 16 + g + 8 * half;
                if (row0 + row >= R) continue;
                const float factor = floats(S::kFactors)[row] * power;
                if (piece.whole()) {
                    __nv_bfloat16* out = static_cast<__nv_bfloat16*>(p.out) + (int64_t(piece.b) * R + row0 + row) * kLatent;
                    each_result(o, m, half, [&](int column, float a, float b) { *reinterpret_cast<uint32_t*>(out + column) = bf16_of(a * factor, b * factor); });
                } else {
                    float* out = partials.out + partials.row(worker, piece.slot(), row0 + row) * kLatent;
                    each_result(o, m, half, [&](int column, float a, float b) { *reinterpret_cast<float2*>(out + column) = {a * factor, b * factor}; });
                }
            }
    }
    __device__ void write_lse(const Piece& piece, const Partials& partials, int worker, int row, float lse2) const {
        const int R = p.Q * p.H;
        if (row >= R) return;
        if (piece.whole()) static_cast<float*>(p.lse)[int64_t(piece.b) * R + row] = lse2 * 0.6931471805599453f;
        else partials.lse2[partials.row(worker, piece.slot(), row)] = lse2;
    }
};

template <class S> __global__ void __launch_bounds__(S::kThreads, S::BLOCKS) mma_kernel(const __grid_constant__ CUtensorMap map, const __grid_constant__ MlaDecode p, int workers) {
    extern __shared__ __align__(1024) uint8_t raw_shared[];
    let_next_kernel_start();
    uint8_t* shared = raw_shared;              // at a multiple of 1024, as swizzled tiles need: there is no other shared memory
    const MmaBlock<S> block(p, shared);
    const int groups = gridDim.x / workers, worker = blockIdx.x / groups, row0 = blockIdx.x % groups * S::kRows;
    const int g = block.g, q = block.q, mt = block.mt;
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < S::STAGES; ++stage) barrier_init(block.full(stage), 1);
        barrier_init_done();
    }
    Part part(p, S::TOKENS, worker, workers);
    Tiles tiles(p, part, S::TOKENS);
    __syncthreads();
    if (threadIdx.x == 0)
        for (int stage = 0; stage < S::STAGES; ++stage) block.start_copy(&map, tiles, stage);

    const Partials partials(p.workspace, workers, p.Q * p.H, kLatent);
    const float scale = p.scale_log2;                                  // powers of two instead of e
    Queries<S> queries;
    int stage = 0, parity = 0, freed = -1;                             // freed: the stage whose tile is done but for warps that lag
    for (Piece piece; part.next(piece);) {
        float o[S::MT][S::kColumns / 8][4], power = S::FP8 ? power_below(0) : 1;
#pragma unroll
        for (int i = 0; i < S::MT * S::kColumns / 8 * 4; ++i) (&o[0][0][0])[i] = 0;
        float top[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
        float2 factor{1, 1};
        if constexpr (S::kQueriesInRegisters) {
            factor = queries.load(p, piece.b, row0, g, q);
        } else {
            if (block.side == 0) {
                const float2 f = queries.load(p, piece.b, row0 + mt * 16, g, q);
#pragma unroll
                for (int k = 0; k < kSteps; ++k)
                    reinterpret_cast<uint4*>(shared + S::kQueries)[(mt * kSteps + k) * 32 + block.lane] = {queries.at[k][0], queries.at[k][1], queries.at[k][2], queries.at[k][3]};
                if (q == 0) block.floats(S::kQueryFactors)[mt * 16 + g] = f.x, block.floats(S::kQueryFactors)[mt * 16 + g + 8] = f.y;
            }
            __syncthreads();
            factor = {block.floats(S::kQueryFactors)[mt * 16 + g], block.floats(S::kQueryFactors)[mt * 16 + g + 8]};
        }
        // A new token sees itself and what comes before it; the length counts all of them.
        const int row = row0 + mt * 16 + g;
        const int limit[2] = {piece.length - p.Q + 1 + row / p.H, piece.length - p.Q + 1 + (row + 8) / p.H};

        for (int t = piece.first; t < piece.end; ++t) {
            uint8_t* tile = shared + stage * S::kTileBytes;
            barrier_wait(block.full(stage), parity);
            const int tokens = piece.length - t * S::TOKENS;
            if (tokens < S::TOKENS) block.clear_rest(tile, tokens);

            float s[S::NT][4];
            block.scores(tile, queries, factor, s);
            float local[2] = {-INFINITY, -INFINITY};
            const int first = t * S::TOKENS + block.side * S::NT * 8 + 2 * q;
#pragma unroll
            for (int nt = 0; nt < S::NT; ++nt)
                for (int i = 0; i < 4; ++i) {
                    s[nt][i] = first + nt * 8 + i % 2 < limit[i / 2] ? s[nt][i] * scale : -INFINITY;
                    local[i / 2] = fmaxf(local[i / 2], s[nt][i]);
                }
            float* tops = block.floats(S::kTops);
            for (int h = 0; h < 2; ++h) {
                local[h] = quad_max(local[h]);
                if (q == 0) tops[block.side * S::kRows + mt * 16 + g + 8 * h] = local[h];
            }
            __syncthreads();
            if (threadIdx.x == 0 && freed >= 0) block.start_copy(&map, tiles, freed);

            float change[2];
            for (int h = 0; h < 2; ++h) {
                float above = top[h];
#pragma unroll
                for (int side = 0; side < S::kSides; ++side) above = fmaxf(above, tops[side * S::kRows + mt * 16 + g + 8 * h]);
                const float base = above == -INFINITY ? 0 : above;
                change[h] = exp2_approx(top[h] - base);
                top[h] = above;
                sum[h] *= change[h];
#pragma unroll
                for (int nt = 0; nt < S::NT; ++nt) {
                    const float a = exp2_approx(s[nt][2 * h] - base), b = exp2_approx(s[nt][2 * h + 1] - base);
                    sum[h] += a + b;
                    *reinterpret_cast<uint32_t*>(shared + S::kProbabilities + (mt * 16 + g + 8 * h) * S::kPitch + ((block.side * S::NT + nt) * 8 + 2 * q) * 2) = S::FP8 ? fp16_of(a, b) : bf16_of(a, b);
                }
                if (!S::kQueriesInRegisters && block.side == 0 && q == 0) block.floats(S::kFactors)[mt * 16 + g + 8 * h] = change[h];
            }
            __syncthreads();

            uint32_t scales[S::TOKENS / 16][2];
            float ratio = 1;
            if constexpr (S::FP8) ratio = block.value_scales(tile, power, scales);
#pragma unroll
            for (int m = 0; m < S::MT; ++m) {
                const float *factors = block.floats(S::kFactors) + m * 16 + g, c0 = (S::kQueriesInRegisters ? change[0] : factors[0]) * ratio, c1 = (S::kQueriesInRegisters ? change[1] : factors[8]) * ratio;
                if (__any_sync(0xffffffffu, c0 != 1 || c1 != 1)) {
#pragma unroll
                    for (int n = 0; n < S::kColumns / 8; ++n) o[m][n][0] *= c0, o[m][n][1] *= c0, o[m][n][2] *= c1, o[m][n][3] *= c1;
                }
            }
            if constexpr (S::FP8) block.values_fp8(tile, scales, o);
            else block.values_bf16(tile, o);
            freed = stage;
            if (++stage == S::STAGES) stage = 0, parity ^= 1;
        }

        // The rows' sums over all warps, then 1 / sum for everybody.
        float* sums = block.floats(S::kTops);
        for (int h = 0; h < 2; ++h) {
            sum[h] = quad_sum(sum[h]);
            if (q == 0) sums[block.side * S::kRows + mt * 16 + g + 8 * h] = sum[h];
        }
        __syncthreads();
        if (threadIdx.x == 0 && freed >= 0) block.start_copy(&map, tiles, freed);
        freed = -1;
        if (block.side == 0 && q == 0)
            for (int h = 0; h < 2; ++h) {
                float all = 0;
                for (int side = 0; side < S::kSides; ++side) all += sums[side * S::kRows + mt * 16 + g + 8 * h];
                block.floats(S::kFactors)[mt * 16 + g + 8 * h] = all > 0 ? 1 / all : 0;
                block.write_lse(piece, partials, worker, row + 8 * h, all > 0 ? top[h] + log2f(all) : -INFINITY);
            }
        __syncthreads();
        block.write(piece, partials, worker, row0, o, power);
    }
}
}  // namespace moe::kernels::sm90
