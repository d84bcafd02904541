// Decoding with products of single warps (mma.sync): MT groups of 16 query rows a block, bf16 and FP8 caches, widths 512 and 64.
//
// A block takes the tiles of its part (work_sm90.cuh) one after another; the copy engine fills a ring of tiles in shared memory. Eight warps compute scores and
// probabilities, eight others add up values, each side a tile or two apart from the other, so that the waits of one are filled by the other's work. Each tile is
// read from shared memory twice, whatever the number of rows. Scores: the warps share out (16 rows, tokens); a lane's 16-byte load holds 8 or 16 columns of a
// token for several products in a row, so columns are contracted in a permuted order, and the queries are loaded in that order. Values: each warp owns 64
// columns of all rows.
// The sides talk by orders, of which two can be under way: one a tile, one at the end of a piece, one at the end.
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
constexpr int kSteps = (kLatent + kRope) / 16, kLatentSteps = kLatent / 16;              // products of depth 16 a score

enum class Order : int { first_tile, tile, write, stop };

template <bool FP8_, int MT_, int STAGES_, int SCORE_REGISTERS, int VALUE_REGISTERS> struct MmaShape {
    static constexpr bool FP8 = FP8_;
    static constexpr int TOKENS = 64, SIDE_WARPS = 8, MT = MT_, STAGES = STAGES_;
    static constexpr int kSideThreads = SIDE_WARPS * 32, kThreads = 2 * kSideThreads, kRows = 16 * MT;
    static constexpr int kSides = SIDE_WARPS / MT;              // warps beside each other along the tokens
    static constexpr int NT = TOKENS / 8 / kSides;              // groups of 8 tokens a warp scores
    static constexpr int kColumns = kLatent / SIDE_WARPS;       // value columns of a warp
    static constexpr int kRowBytes = FP8 ? kRowBytesFp8 : kRowBytesPlain, kTileBytes = TOKENS * kRowBytes;
    static constexpr int kPitch = TOKENS * 2 + 16;              // bytes of a row of probabilities: eight rows fall into different banks
    static constexpr int kHeldSteps = MT == 1 ? kLatentSteps : 0;      // products whose queries stay in registers; the others' are read again for every tile
    static constexpr int kScoreRegisters = SCORE_REGISTERS, kValueRegisters = VALUE_REGISTERS;
    static_assert(NT >= 1 && kSides * MT == SIDE_WARPS && SCORE_REGISTERS + VALUE_REGISTERS == 256);
};

template <class S> struct MmaShared {
    alignas(1024) uint8_t tiles[S::STAGES][S::kTileBytes];
    alignas(16) uint8_t probabilities[2][S::kRows * S::kPitch];
    uint4 queries[S::MT][kSteps - S::kHeldSteps][32];
    float tops[2][S::kSides][S::kRows];        // of each warp's tokens
    float factors[2][S::kRows];                // what sums must be multiplied by before a tile is added, or 1 / sum at the end
    uint64_t full[S::STAGES];                  // a tile is there
    uint64_t ready[2], taken[2];               // an order is given; it has been carried out
    Order order[2];
    Piece done[2];                             // what to write
    Piece piece;                               // of the scoring side
    bool more;
    Part part;                                 // walked through by thread 0
    Tiles ahead;                               // by the first thread of the other side
};

/// The copies' side of a kernel: one warp's lanes call it together, the first one starts the copies. The number of the next tile's block is read a tile ahead and
/// waited for only when it is needed, so it stays in a register.
struct Copies {
    int block = 0;

    /// The next tile into shared memory at `to`.
    template <class S, class Shared> __device__ void start(const MlaDecode& p, Shared& shared, const CUtensorMap* map, int stage, int row0) {
        bool begins = false;
        if (threadIdx.x % 32 == 0 && shared.ahead.more()) {
            const uint32_t to = shared_address(shared.tiles[stage]), bar = shared_address(&shared.full[stage]);
            if constexpr (S::FP8) {
                const int bytes = shared.ahead.tokens() * kRowBytesFp8;
                barrier_expect(bar, bytes);
                bulk_load(to, static_cast<const uint8_t*>(p.rows) + int64_t(block) * (kBlockTokens * kRowBytesFp8), bytes, bar);
            } else {
                barrier_expect(bar, S::kTileBytes);
#pragma unroll 1
                for (int sub = 0; sub < kRowBytesPlain / 128; ++sub) tensor_load(to + sub * (kBlockTokens * 128), map, sub * 64, block * kBlockTokens, bar);
            }
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
    __device__ static void prefetch_queries(const MlaDecode& p, int b, int row0, int rows) {
        for (int row = row0 + threadIdx.x % 32; row < min(row0 + rows, p.Q * p.H); row += 32) {
            const int64_t token = b * p.Q + row / p.H, head = row % p.H;
            bulk_prefetch(static_cast<const __nv_bfloat16*>(p.q_latent) + token * p.latent_token + head * p.latent_head, kLatent * 2);
            bulk_prefetch(static_cast<const __nv_bfloat16*>(p.q_rope) + token * p.rope_token + head * p.rope_head, kRope * 2);
        }
    }
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

/// 1 / x for such a power; 0 for the largest.
__device__ inline float inverse_power(float x) { return __uint_as_float(0x7f000000u - __float_as_uint(x)); }

/// Largest over the four lanes that share g.
__device__ inline float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ inline float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

/// Queries of 16 rows in the permuted order: lane q holds columns 16 q … 16 q + 15 of each 64 (32 q … of each 128 for FP8's latent). Rows past the last are zero.
template <bool FP8> struct Queries {
    const uint4 *latent[2], *rope[2];          // of rows g and g + 8, null past the last
    int q;
    float inverse[2] = {1, 1};

    __device__ Queries(const MlaDecode& p, int b, int row0, int g, int q_) : q(q_) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = row0 + g + 8 * half, token = b * p.Q + row / p.H, head = row % p.H;
            const bool real = row < p.Q * p.H;
            latent[half] = real ? reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(p.q_latent) + token * p.latent_token + head * p.latent_head) : nullptr;
            rope[half] = real ? reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(p.q_rope) + token * p.rope_token + head * p.rope_head) : nullptr;
        }
    }
    /// Eight columns: those of products k and k + 1, k even.
    __device__ uint4 columns(int half, int k) const {
        if (!latent[half]) return uint4{0, 0, 0, 0};
        constexpr int kWide = FP8 ? 8 : 4;     // products that one lane's columns serve
        if (k >= kLatentSteps) return rope[half][2 * q + (k - kLatentSteps) / 2];
        return latent[half][k / kWide * (2 * kWide) + kWide / 2 * q + k % kWide / 2];
    }
    /// FP8: brings rows near 1 in later steps. Returns what the latent part's scores must be multiplied by.
    __device__ float2 normalise() {
        uint32_t top[2] = {0, 0};
#pragma unroll 8
        for (int k = 0; k < kLatentSteps; k += 2)
            for (int half = 0; half < 2; ++half) {
                const uint4 v = columns(half, k);
                for (uint32_t two : {v.x, v.y, v.z, v.w}) top[half] = larger(top[half], two);
            }
        return set_powers(top);
    }
    /// Sizes of two bf16 values as integers, which sort as the values do.
    __device__ static uint32_t larger(uint32_t top, uint32_t two) { return __vmaxu2(top, two & 0x7fff7fffu); }
    __device__ float2 set_powers(const uint32_t (&top)[2]) {
        auto power = [](uint32_t x) { return power_below(quad_max(fmaxf(floats_of(x).x, floats_of(x).y))); };
        const float2 powers{power(top[0]), power(top[1])};
        inverse[0] = inverse_power(powers.x), inverse[1] = inverse_power(powers.y);
        return powers;
    }
    __device__ static void scale(uint32_t& two, float by) { two = fp16_of(floats_of(two).x * by, floats_of(two).y * by); }
    /// Fragments of products k and k + 1.
    __device__ void step(int k, uint4& a, uint4& b) const {
        const uint4 x = columns(0, k), y = columns(1, k);
        a = uint4{x.x, y.x, x.y, y.y}, b = uint4{x.z, y.z, x.w, y.w};
        if (FP8 && k < kLatentSteps) {
            scale(a.x, inverse[0]), scale(a.y, inverse[1]), scale(a.z, inverse[0]), scale(a.w, inverse[1]);
            scale(b.x, inverse[0]), scale(b.y, inverse[1]), scale(b.z, inverse[0]), scale(b.w, inverse[1]);
        }
    }
};

template <class S> struct MmaBlock {
    const MlaDecode& p;
    MmaShared<S>& shared;
    int workers, worker, row0;
    int warp, lane, g, q;                      // warp: of its side

    __device__ MmaBlock(const MlaDecode& p_, MmaShared<S>& shared_, int workers_)
        : p(p_), shared(shared_), workers(workers_), warp(threadIdx.x / 32 % S::SIDE_WARPS), lane(threadIdx.x % 32), g(lane / 4), q(lane % 4) {
        const int groups = gridDim.x / workers;
        worker = blockIdx.x / groups, row0 = blockIdx.x % groups * S::kRows;
    }

    /// Rows of a tile that no token wrote may hold anything, NaN too: zeros, which probabilities of 0 leave alone.
    __device__ void clear_rest(uint8_t* tile, int tokens) const {
        constexpr int kParts = S::FP8 ? 1 : kRowBytesPlain / 128, kPart = S::kTileBytes / kParts;      // bf16: 64 columns of all rows lie together
#pragma unroll 1
        for (int i = tokens * (kPart / S::TOKENS) + int(threadIdx.x) * 16; i < kPart; i += S::kSideThreads * 16)
#pragma unroll 1
            for (int part = 0; part < kParts; ++part) *reinterpret_cast<uint4*>(tile + part * kPart + i) = uint4{0, 0, 0, 0};
        fence_for_engines();
        named_barrier<1, S::kSideThreads>();
    }

    // ---- scores

    __device__ int mt() const { return warp % S::MT; }
    __device__ int side() const { return warp / S::MT; }

    /// The piece's queries. Returns what the latent part's scores must be multiplied by.
    __device__ float2 load_queries(uint32_t (&held)[S::MT == 1 ? kLatentSteps : 1][4]) const {
        Queries<S::FP8> rows(p, shared.piece.b, row0 + mt() * 16, g, q);
        float2 factor{1, 1};
        if constexpr (S::kHeldSteps > 0) {                       // all loads at once, straight to where they stay
#pragma unroll
            for (int k = 0; k < kLatentSteps; k += 2) {
                const uint4 x = rows.columns(0, k), y = rows.columns(1, k);
                spread(uint4{x.x, y.x, x.y, y.y}, held[k]), spread(uint4{x.z, y.z, x.w, y.w}, held[k + 1]);
            }
            if (warp == 0)
                for (int k = kLatentSteps; k < kSteps; k += 2) rows.step(k, shared.queries[0][k - kLatentSteps][lane], shared.queries[0][k + 1 - kLatentSteps][lane]);
            if constexpr (S::FP8) {
                uint32_t top[2] = {0, 0};
#pragma unroll
                for (int k = 0; k < kLatentSteps; ++k)
                    for (int i = 0; i < 4; ++i) top[i % 2] = rows.larger(top[i % 2], held[k][i]);
                factor = rows.set_powers(top);
#pragma unroll
                for (int k = 0; k < kLatentSteps; ++k)
                    for (int i = 0; i < 4; ++i) rows.scale(held[k][i], rows.inverse[i % 2]);
            }
        } else {
            if constexpr (S::FP8) factor = rows.normalise();
#pragma unroll 4
            for (int k = 2 * side(); k < kSteps; k += 2 * S::kSides) rows.step(k, shared.queries[mt()][k][lane], shared.queries[mt()][k + 1][lane]);
        }
        named_barrier<1, S::kSideThreads>();
        return factor;
    }
    template <class Held> __device__ void query_step(const Held& held, int k, uint32_t (&a)[4]) const {
        if (k < S::kHeldSteps) {
            for (int i = 0; i < 4; ++i) a[i] = held[k < S::kHeldSteps ? k : 0][i];
        } else {
            spread(shared.queries[mt()][k - S::kHeldSteps][lane], a);
        }
    }
    __device__ static void spread(uint4 v, uint32_t* r) { r[0] = v.x, r[1] = v.y, r[2] = v.z, r[3] = v.w; }

    /// 64 columns of bf16: four products of depth 16. chunk(e): this lane's 16 bytes, e = 0, 1, of group nt's token.
    template <int CHAINS, class Held, class Chunk> __device__ void score_64(const Held& queries, int k0, float (&c)[CHAINS][S::NT][4], Chunk chunk) const {
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

    /// s[nt] = the 16 rows' products with the 8 tokens from (side() · NT + nt) · 8 on.
    template <class Held> __device__ void scores(const uint8_t* tile, const Held& queries, float2 factor, float (&s)[S::NT][4]) const {
        constexpr int CHAINS = S::NT == 1 ? 4 : S::NT == 2 ? 2 : 1;      // sums side by side: a product waits for the one before it in its sum
        const int token = side() * S::NT * 8 + g;
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
                            const float scale = *reinterpret_cast<const float*>(tile + ((side() * S::NT + nt) * 8 + 2 * q + i) * kRowBytesFp8 + kLatent + (group0 + chain) * 4);
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

    __device__ void probability_step(int slot, int m, int k, uint32_t (&a)[4]) const {
        load_matrices(a, shared_address(shared.probabilities[slot]) + (m * 16 + lane % 16) * S::kPitch + k * 32 + lane / 16 * 16);
    }

    /// o += probabilities · this warp's columns.
    __device__ void values_bf16(const uint8_t* tile, int slot, float (&o)[S::MT][S::kColumns / 8][4]) const {
        const uint32_t base = shared_address(tile) + lane % 16 * 128;
#pragma unroll
        for (int k = 0; k < S::TOKENS / 16; ++k) {
            uint32_t a[S::MT][4];
#pragma unroll
            for (int m = 0; m < S::MT; ++m) probability_step(slot, m, k, a[m]);
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
        const float above = fmaxf(power, power_below(quad_max(top))), inverse = inverse_power(above), ratio = power * inverse;
        power = above;
#pragma unroll
        for (int k = 0; k < S::TOKENS / 16; ++k)
            for (int i = 0; i < 2; ++i) scales[k][i] = fp16_of(x[k][2 * i] * inverse, x[k][2 * i + 1] * inverse);
        return ratio;
    }
    __device__ void values_fp8(const uint8_t* tile, int slot, const uint32_t (&scales)[S::TOKENS / 16][2], float (&o)[S::MT][S::kColumns / 8][4]) const {
        const uint32_t base = shared_address(tile) + lane % 16 * kRowBytesFp8 + warp * S::kColumns + lane / 16 * 16;
#pragma unroll
        for (int k = 0; k < S::TOKENS / 16; ++k) {
            uint32_t a[S::MT][4];
#pragma unroll
            for (int m = 0; m < S::MT; ++m) {
                probability_step(slot, m, k, a[m]);
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
    __device__ void write(int slot, const float (&o)[S::MT][S::kColumns / 8][4], float power) const {
        const int R = p.Q * p.H;
        const Piece piece = shared.done[slot];
        const Partials partials(p.workspace, workers, R, kLatent);
#pragma unroll
        for (int m = 0; m < S::MT; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = m * 16 + g + 8 * half;
                if (row0 + row >= R) continue;
                const float factor = shared.factors[slot][row] * power;
                if (piece.whole()) {
                    __nv_bfloat16* out = static_cast<__nv_bfloat16*>(p.out) + (int64_t(piece.b) * R + row0 + row) * kLatent;
                    each_result(o, m, half, [&](int column, float a, float b) { *reinterpret_cast<uint32_t*>(out + column) = bf16_of(a * factor, b * factor); });
                } else {
                    float* out = partials.out + partials.row(worker, piece.slot(), row0 + row) * kLatent;
                    each_result(o, m, half, [&](int column, float a, float b) { *reinterpret_cast<float2*>(out + column) = float2{a * factor, b * factor}; });
                }
            }
    }
    __device__ void write_lse(int row, float lse2) const {
        const int R = p.Q * p.H;
        const Piece& piece = shared.piece;
        const Partials partials(p.workspace, workers, R, kLatent);
        if (row >= R) return;
        if (piece.whole()) static_cast<float*>(p.lse)[int64_t(piece.b) * R + row] = lse2 * 0.6931471805599453f;
        else partials.lse2[partials.row(worker, piece.slot(), row)] = lse2;
    }

    // ---- the two sides

    __device__ void score_side() const {
        const float scale = p.scale_log2;                              // powers of two instead of e
        uint32_t queries[S::MT == 1 ? kLatentSteps : 1][4];
        int stage = 0, parity = 0;
        unsigned orders = 0;                                           // given so far; the next takes slot orders % 2
        auto wait_for_slot = [&] {
            if (orders >= 2) barrier_wait(shared_address(&shared.taken[orders & 1]), (orders / 2 - 1) & 1);
        };
        auto give = [&](Order order) {
            if (threadIdx.x == 0) shared.order[orders & 1] = order;
            warp_arrive(shared.ready[orders & 1]);
            ++orders;
        };
        while (true) {
            named_barrier<1, S::kSideThreads>();                       // everybody is done with the last piece
            if (threadIdx.x == 0) shared.more = shared.part.next(shared.piece);
            named_barrier<1, S::kSideThreads>();
            if (!shared.more) break;
            const float2 factor = load_queries(queries);
            float top[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
            int left = shared.piece.length - shared.piece.first * S::TOKENS;      // tokens from this tile on
            const int all = shared.piece.end - shared.piece.first, row = row0 + mt() * 16 + g;
            for (int tiles = 0; tiles < all; ++tiles, left -= S::TOKENS) {
                uint8_t* tile = shared.tiles[stage];
                const int slot = orders & 1;
                barrier_wait(shared_address(&shared.full[stage]), parity);
                if (left < S::TOKENS) clear_rest(tile, left);

                float s[S::NT][4];
                scores(tile, queries, factor, s);
                // A new token sees itself and what comes before it; the length counts all of them.
                const int first = side() * S::NT * 8 + 2 * q, seen = left - p.Q + 1;
                if (seen < S::TOKENS) {
                    const int limit[2] = {seen + row / p.H - first, seen + (row + 8) / p.H - first};
#pragma unroll
                    for (int nt = 0; nt < S::NT; ++nt)
                        for (int i = 0; i < 4; ++i)
                            if (nt * 8 + i % 2 >= limit[i / 2]) s[nt][i] = -INFINITY;
                }
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    float local = fmaxf(s[0][2 * h], s[0][2 * h + 1]);
#pragma unroll
                    for (int nt = 1; nt < S::NT; ++nt) local = fmaxf(local, fmaxf(s[nt][2 * h], s[nt][2 * h + 1]));
                    local = quad_max(local);
                    if (q == 0) shared.tops[slot][side()][mt() * 16 + g + 8 * h] = local * scale;
                }
                named_barrier<1, S::kSideThreads>();
                float change[2];
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    float above = top[h];
#pragma unroll
                    for (int other = 0; other < S::kSides; ++other) above = fmaxf(above, shared.tops[slot][other][mt() * 16 + g + 8 * h]);
                    const float base = above == -INFINITY ? 0 : above;
                    change[h] = exp2_approx(top[h] - base);
                    top[h] = above;
                    float added = 0;
#pragma unroll
                    for (int nt = 0; nt < S::NT; ++nt) {
                        float &a = s[nt][2 * h], &b = s[nt][2 * h + 1];
                        a = exp2_approx(a * scale - base), b = exp2_approx(b * scale - base);
                        added += a + b;
                    }
                    sum[h] = sum[h] * change[h] + added;
                }
                wait_for_slot();
                uint8_t* to = shared.probabilities[slot] + (mt() * 16 + g) * S::kPitch + (side() * S::NT * 8 + 2 * q) * 2;
#pragma unroll
                for (int nt = 0; nt < S::NT; ++nt)
                    for (int h = 0; h < 2; ++h)
                        *reinterpret_cast<uint32_t*>(to + h * 8 * S::kPitch + nt * 16) = S::FP8 ? fp16_of(s[nt][2 * h], s[nt][2 * h + 1]) : bf16_of(s[nt][2 * h], s[nt][2 * h + 1]);
                if (side() == 0 && q == 0) shared.factors[slot][mt() * 16 + g] = change[0], shared.factors[slot][mt() * 16 + g + 8] = change[1];
                give(tiles == 0 ? Order::first_tile : Order::tile);
                if (++stage == S::STAGES) stage = 0, parity ^= 1;
            }

            // The rows' sums over all warps, then 1 / sum for the other side.
            const int slot = orders & 1;
            for (int h = 0; h < 2; ++h) {
                sum[h] = quad_sum(sum[h]);
                if (q == 0) shared.tops[slot][side()][mt() * 16 + g + 8 * h] = sum[h];
            }
            named_barrier<1, S::kSideThreads>();
            wait_for_slot();
            if (threadIdx.x == 0) shared.done[slot] = shared.piece;
            if (side() == 0 && q == 0)
                for (int h = 0; h < 2; ++h) {
                    float total = 0;
                    for (int other = 0; other < S::kSides; ++other) total += shared.tops[slot][other][mt() * 16 + g + 8 * h];
                    shared.factors[slot][mt() * 16 + g + 8 * h] = total == 0 ? 0 : 1 / total;      // a NaN stays one
                    write_lse(row + 8 * h, total == 0 ? -INFINITY : top[h] + log2f(total));
                }
            give(Order::write);
        }
        wait_for_slot();
        give(Order::stop);
    }

    __device__ void value_side(const CUtensorMap* map) const {
        float o[S::MT][S::kColumns / 8][4], power = 1;
        int stage = 0, parity = 0;
        Copies copies;
        if (warp == 0) {
            copies.next(p, shared);
            for (int first = 0; first < S::STAGES; ++first) copies.start<S>(p, shared, map, first, row0);
        }
        for (unsigned orders = 0;; ++orders) {
            const int slot = orders & 1;
            barrier_wait(shared_address(&shared.ready[slot]), orders / 2 & 1);
            const Order order = shared.order[slot];
            if (order == Order::stop) break;
            if (order == Order::write) {
                write(slot, o, power);
                warp_arrive(shared.taken[slot]);
                continue;
            }
            barrier_wait(shared_address(&shared.full[stage]), parity);
            const uint8_t* tile = shared.tiles[stage];
            if (order == Order::first_tile) {
                power = S::FP8 ? power_below(0) : 1;
#pragma unroll
                for (int i = 0; i < S::MT * S::kColumns / 8 * 4; ++i) (&o[0][0][0])[i] = 0;
            }
            uint32_t scales[S::TOKENS / 16][2];
            float ratio = 1;
            if constexpr (S::FP8) ratio = value_scales(tile, power, scales);
#pragma unroll
            for (int m = 0; m < S::MT; ++m) {
                const float c0 = shared.factors[slot][m * 16 + g] * ratio, c1 = shared.factors[slot][m * 16 + g + 8] * ratio;
                if (__any_sync(0xffffffffu, c0 != 1 || c1 != 1)) {
#pragma unroll
                    for (int n = 0; n < S::kColumns / 8; ++n) o[m][n][0] *= c0, o[m][n][1] *= c0, o[m][n][2] *= c1, o[m][n][3] *= c1;
                }
            }
            if constexpr (S::FP8) values_fp8(tile, slot, scales, o);
            else values_bf16(tile, slot, o);
            warp_arrive(shared.taken[slot]);
            if (warp == 0) {                                           // when all warps of this side are done, so is the tile
                barrier_wait(shared_address(&shared.taken[slot]), orders / 2 & 1);
                copies.start<S>(p, shared, map, stage, row0);
            }
            if (++stage == S::STAGES) stage = 0, parity ^= 1;
        }
    }
};

template <class S> __global__ void __launch_bounds__(S::kThreads, 1) mma_kernel(const __grid_constant__ CUtensorMap map, const __grid_constant__ MlaDecode p, int most_workers) {
    extern __shared__ __align__(1024) uint8_t raw_shared[];
    MmaShared<S>& shared = *reinterpret_cast<MmaShared<S>*>(raw_shared);      // at a multiple of 1024, as swizzled tiles need: there is no other shared memory
    const MmaBlock<S> block(p, shared, most_workers);
    if (threadIdx.x == 0) {
        if (!S::FP8) prefetch_map(&map);
        for (auto& full : shared.full) barrier_init(shared_address(&full), 1);
        for (int slot = 0; slot < 2; ++slot) barrier_init(shared_address(&shared.ready[slot]), S::SIDE_WARPS * kWarpArrivals), barrier_init(shared_address(&shared.taken[slot]), S::SIDE_WARPS * kWarpArrivals);
        barrier_init_done();
    }
    wait_for_kernel_before();
    let_next_kernel_start();                   // after the wait: what the next kernel reads at once has been written by then
    if (threadIdx.x / 32 == S::SIDE_WARPS) {
        const Part part(p, block.worker, most_workers);
        if (threadIdx.x % 32 == 0) shared.part = part, shared.ahead = Tiles(part);
    }
    __syncthreads();
    if (threadIdx.x < S::kSideThreads) {
        set_registers<S::kScoreRegisters, 128>();
        block.score_side();
    } else {
        set_registers<S::kValueRegisters, 128>();
        block.value_side(&map);
    }
}
}  // namespace moe::kernels::sm90
