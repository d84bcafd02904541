// Decoding with products of warpgroups (wgmma) over an FP8 cache, widths 512 and 64: ROWS query rows (new tokens times heads) a block.
//
// Both products have the cache on the side whose 64 rows a product always has, so that few query rows waste nothing, and take it from registers, so that it need
// not be written back to shared memory once it is fp16: scores Sᵀ [64 tokens, ROWS] = cache · queriesᵀ, values Oᵀ [512 columns, ROWS] = cacheᵀ · probabilitiesᵀ.
// E4M3 values become fp16 without loss, one instruction for two. Scales are per (token, 128 columns): the scores' are applied to the sums over 128 columns, the
// values' are multiplied into the probabilities, of which there are four copies.
//
// Three warpgroups and a warp. The first group computes scores and probabilities, the other two own half of the value columns each, the warp starts the copies.
// A value group brings its part of a tile into registers before it waits for the tile's probabilities, and every side walks through the same tiles by itself.
//
// A lane's 16-byte load holds 16 columns of a token for four products in a row, so columns are contracted in a permuted order, and queries are stored in that order.
// Ranges: fp16 holds queries divided by their row's power of two, and probabilities times 2^13 times scale / power, a running maximum of all scales: what is
// 2^-27 of the largest is still whole. Sums are fp32, and rows of nothing but small values lose nothing.
//
// Lanes: g = lane / 4 is a row of a fragment, q = lane % 4 a pair of the other dim.
#pragma once
#include "core/kernels/mla_decode/cache_sm90.cuh"

#include <cuda_fp16.h>

namespace moe::kernels::sm90 {
template <int ROWS_, int STAGES_> struct Fp8Shape {
    static constexpr int ROWS = ROWS_, STAGES = STAGES_, TOKENS = 64;
    static constexpr int kGroups = kLatent / 128;                // columns that share a scale
    static constexpr bool kMoveRegisters = ROWS > 16;            // a warpgroup for the copies then, whose registers the others take
    static constexpr int kThreads = kMoveRegisters ? 512 : 416;
    static constexpr int kTileBytes = TOKENS * kRowBytesFp8, kStepBytes = ROWS * 32;      // of 16 contracted numbers of all rows
    static constexpr int kSums = ROWS / 2, kColumns = ROWS / 4;  // of a lane: numbers of a product [64, ROWS]; rows of the queries
    static constexpr int kBatches = ROWS / 16;                   // in which a value group converts its part of a tile
    static constexpr int kLaunch = 512;      // 16 rows: 128 registers a thread, which leaves room for combine_sm90.cuh's blocks beside
    static_assert(ROWS == 16 || ROWS == 32);
};

template <class S> struct Fp8Shared {
    alignas(128) uint8_t tiles[S::STAGES][S::kTileBytes];
    alignas(128) uint8_t queries[kSteps][S::kStepBytes];                                  // as 8 x 8 matrices: two side by side, then the next eight rows
    alignas(128) uint8_t probabilities[2][S::kGroups][S::TOKENS / 16][S::kStepBytes];     // the same, tokens contracted
    float tops[2][4][S::ROWS];                // of each warp's tokens
    float scale_tops[2][4];
    float powers[S::ROWS];                    // what the latent part's scores must be multiplied by
    float factors[2][S::ROWS];                // what sums must be multiplied by before a tile is added; at the end of a piece: before they are written
    uint64_t full[S::STAGES], empty[S::STAGES];
    uint64_t ready[2], taken[2];              // a tile's probabilities, or a piece's last factors, are there; both value groups are done with them
};

__device__ inline uint32_t fp16_of(float a, float b) {
    __half2 x = __floats2half2_rn(a, b);
    return *reinterpret_cast<uint32_t*>(&x);
}
/// The power of two at or below x > 0; at least 2^−126.
__device__ inline float power_below(float x) { return __uint_as_float(max(__float_as_uint(x) & 0x7f800000u, 0x00800000u)); }

/// 1 / x for such a power; 0 for the largest.
__device__ inline float inverse_power(float x) { return __uint_as_float(0x7f000000u - __float_as_uint(x)); }

/// Byte of number k of row n within a step of 16.
__device__ inline int step_byte(int n, int k) { return n / 8 * 256 + k / 8 * 128 + n % 8 * 16 + k % 8 * 2; }

/// Keeps the compiler from moving uses of a product's sums to before the wait for it.
template <int N> __device__ inline void sums_there(float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

template <class S> struct Fp8Block {
    const MlaDecode& p;
    Fp8Shared<S>& shared;
    int workers, worker, row0;
    int warp, lane, g, q;                      // warp: of its group

    __device__ Fp8Block(const MlaDecode& p_, Fp8Shared<S>& shared_, int workers_)
        : p(p_), shared(shared_), workers(workers_), warp(threadIdx.x / 32 % 4), lane(threadIdx.x % 32), g(lane / 4), q(lane % 4) {
        const int groups = gridDim.x / workers;
        worker = blockIdx.x / groups, row0 = blockIdx.x % groups * S::ROWS;
    }
    __device__ int column(int i) const { return i / 2 * 8 + 2 * q + i % 2; }      // of a lane's kColumns: the row of the queries
    struct Ring {
        int stage = 0, parity = 0;
        __device__ void step() {
            if (++stage == S::STAGES) stage = 0, parity ^= 1;
        }
    };

    // ---- copies

    __device__ void copy_warp() const {
        const Part part(p, worker, workers);
        Tiles ahead(part);
        int block = ahead.more() ? p.block_table[ahead.entry(p.M)] : 0;
        Ring ring;
        for (int n = 0; ahead.more(); ++n, ring.step()) {
            const uint32_t to = shared_address(shared.tiles[ring.stage]), bar = shared_address(&shared.full[ring.stage]);
            const int bytes = ahead.tokens() * kRowBytesFp8;
            const uint8_t* from = static_cast<const uint8_t*>(p.rows) + int64_t(block) * (kBlockTokens * kRowBytesFp8);
            const bool begins = ahead.step();
            if (ahead.more()) block = p.block_table[ahead.entry(p.M)];       // needed a tile later
            if (n >= S::STAGES) barrier_wait(shared_address(&shared.empty[ring.stage]), ring.parity ^ 1);
            if (lane == 0) {
                barrier_expect(bar, bytes);
                bulk_load(to, from, bytes, bar);
            }
            if (begins) prefetch_queries(p, ahead.sequence(), row0, S::ROWS);
        }
    }

    // ---- scores

    /// Queries of a sequence. Rows past the last are zero. ROWS / 16 rows of 8 lanes at a time.
    __device__ void load_queries(int b) const {
        const int part = lane % 8;
#pragma unroll 1
        for (int n = threadIdx.x / 8; n < S::ROWS; n += 16) {
            const int row = row0 + n, token = b * p.Q + row / p.H, head = row % p.H;
            uint4 x[kLatent / 64] = {}, rope = {};
            if (row < p.Q * p.H) {
                const uint4* latent = reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(p.q_latent) + token * p.latent_token + head * p.latent_head);
#pragma unroll
                for (int j = 0; j < kLatent / 64; ++j) x[j] = latent[part + 8 * j];
                rope = reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(p.q_rope) + token * p.rope_token + head * p.rope_head)[part];
            }
            uint32_t top = 0;                                    // sizes of two bf16 values as integers, which sort as the values do
            for (const uint4& v : x)
                for (uint32_t two : {v.x, v.y, v.z, v.w}) top = __vmaxu2(top, two & 0x7fff7fffu);
            float largest = fmaxf(floats_of(top).x, floats_of(top).y);
            for (int other = 1; other < 8; other *= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, other));
            const float power = power_below(largest), inverse = inverse_power(power);
            if (part == 0) shared.powers[n] = power;
#pragma unroll
            for (int j = 0; j < kLatent / 64; ++j) {             // columns 64 j + 8 part …: of 128, lane q = 32nd, half, product and pair in turn
                const uint32_t v[4] = {x[j].x, x[j].y, x[j].z, x[j].w};
                const int to_q = j % 2 * 2 + part / 4, step = j / 2 * 8 + part / 2 % 2 * 4 + part % 2 * 2;
#pragma unroll
                for (int y = 0; y < 4; ++y) store_pair(step + y / 2, n, y % 2 * 8 + 2 * to_q, fp16_of(floats_of(v[y]).x * inverse, floats_of(v[y]).y * inverse));
            }
            const uint32_t v[4] = {rope.x, rope.y, rope.z, rope.w};
#pragma unroll
            for (int y = 0; y < 4; ++y) store_pair(kLatentSteps + part % 2 * 2 + y / 2, n, y % 2 * 8 + part / 2 * 2, v[y]);      // columns 8 part …: 16 a lane
        }
        fence_for_engines();
    }
    __device__ void store_pair(int step, int n, int k, uint32_t two) const { *reinterpret_cast<uint32_t*>(shared.queries[step] + step_byte(n, k)) = two; }

    /// s = Sᵀ for tokens 16 warp + g and + 8 of a tile, whose rows are low and high, and their scales.
    __device__ void scores(const uint8_t* low, const uint8_t* high, float (&s)[S::kSums], float4 (&scales)[2]) const {
        constexpr int kBatches = kSteps / 4;                     // of four products; the last is the rotated part
        uint32_t a[2][4][4];
        float c[2][S::kSums];                                    // of two groups of 128 columns in turn
        const uint64_t queries = plain_descriptor(shared_address(shared.queries));
        scales[0] = *reinterpret_cast<const float4*>(low + kLatent), scales[1] = *reinterpret_cast<const float4*>(high + kLatent);
        auto fold = [&](int group, float (&x)[S::kSums]) {       // the sums over 128 columns
            sums_there(x);
            const float f[2] = {(&scales[0].x)[group], (&scales[1].x)[group]};
#pragma unroll
            for (int i = 0; i < S::kSums; ++i) s[i] = group == 0 ? x[i] * f[i % 4 / 2] : s[i] + x[i] * f[i % 4 / 2];
        };
#pragma unroll
        for (int batch = 0; batch < kBatches; ++batch) {
            const int offset = batch == kBatches - 1 ? kLatent + S::kGroups * 4 + q * 32 : batch / 2 * 128 + q * 32 + batch % 2 * 16;
            const uint4 x = *reinterpret_cast<const uint4*>(low + offset), y = *reinterpret_cast<const uint4*>(high + offset);
            uint32_t (&to)[4][4] = a[batch % 2];
            if (batch >= 2) wgmma_wait<1>();                     // for those whose operands lay there
            if (batch >= 3 && batch % 2) fold((batch - 3) / 2, c[(batch - 3) / 2 % 2]);
            if (batch < kBatches - 1) {
                const uint32_t xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
                for (int i = 0; i < 4; ++i) halves_of_e4m3(xs[i], to[i][0], to[i][2]), halves_of_e4m3(ys[i], to[i][1], to[i][3]);
            } else {
                const uint4 x1 = *reinterpret_cast<const uint4*>(low + offset + 16), y1 = *reinterpret_cast<const uint4*>(high + offset + 16);
                const uint32_t xs[8] = {x.x, x.y, x.z, x.w, x1.x, x1.y, x1.z, x1.w}, ys[8] = {y.x, y.y, y.z, y.w, y1.x, y1.y, y1.z, y1.w};
#pragma unroll
                for (int i = 0; i < 4; ++i) to[i][0] = xs[2 * i], to[i][1] = ys[2 * i], to[i][2] = xs[2 * i + 1], to[i][3] = ys[2 * i + 1];
            }
            wgmma_begin();
#pragma unroll
            for (int i = 0; i < 4; ++i) wgmma_64<S::ROWS>(c[batch / 2 % 2], to[i], queries + (batch * 4 + i) * (S::kStepBytes / 16), batch % 2 || i, batch < kBatches - 1);
            wgmma_commit();
        }
        wgmma_wait<0>();
        fold(S::kGroups - 1, c[(S::kGroups - 1) % 2]);
        sums_there(c[0]);                                        // the rotated part
#pragma unroll
        for (int i = 0; i < S::kSums; i += 2) {
            const float2 factor = *reinterpret_cast<const float2*>(&shared.powers[column(i / 4 * 2)]);
            s[i] = s[i] * factor.x + c[0][i], s[i + 1] = s[i + 1] * factor.y + c[0][i + 1];
        }
    }

    __device__ void score_group() const {
        const float scale = p.scale_log2;                        // powers of two instead of e
        constexpr float kLift = 13;                              // probabilities times 2^13, for the sake of fp16's range
        constexpr int C = S::kColumns;
        Part part(p, worker, workers);
        Piece piece;
        Ring ring;
        unsigned given = 0;                                      // tiles' probabilities and pieces' last factors so far; the next takes slot given % 2
        auto wait_for_slot = [&] {
            if (given >= 2) barrier_wait(shared_address(&shared.taken[given & 1]), (given / 2 - 1) & 1);
        };
        while (part.next(piece)) {
            named_barrier<1, 128>();                             // everybody is done with the last piece's queries
            load_queries(piece.b);
            named_barrier<1, 128>();
            float top[C], sum[C], power = power_below(0);
#pragma unroll
            for (int i = 0; i < C; ++i) top[i] = -INFINITY, sum[i] = 0;
#pragma unroll 1
            for (int t = piece.first; t < piece.end; ++t) {
                const int left = piece.length - t * S::TOKENS, first = warp * 16 + g, slot = given & 1;
                const uint8_t* tile = shared.tiles[ring.stage];
                float s[S::kSums];
                float4 scales[2];
                barrier_wait(shared_address(&shared.full[ring.stage]), ring.parity);
                // Past the last token any row will do: its probability is 0.
                scores(tile + min(first, left - 1) * kRowBytesFp8, tile + min(first + 8, left - 1) * kRowBytesFp8, s, scales);
                warp_arrive(shared.empty[ring.stage]);
                const int seen = left - p.Q + 1 - first;         // a new token sees itself and what comes before it; the length counts all of them
                if (left - p.Q + 1 < S::TOKENS) {
#pragma unroll
                    for (int i = 0; i < C; ++i) {
                        const int limit = seen + (row0 + column(i)) / p.H;
                        if (limit <= 0) s[i / 2 * 4 + i % 2] = -INFINITY;
                        if (limit <= 8) s[i / 2 * 4 + i % 2 + 2] = -INFINITY;
                    }
                }
                float local[C], scale_top = 0;
#pragma unroll
                for (int i = 0; i < C; ++i) local[i] = fmaxf(s[i / 2 * 4 + i % 2], s[i / 2 * 4 + i % 2 + 2]);
                for (const float4& x : scales) scale_top = fmaxf(fmaxf(scale_top, fmaxf(x.x, x.y)), fmaxf(x.z, x.w));
#pragma unroll
                for (int other = 4; other < 32; other *= 2) {
#pragma unroll
                    for (int i = 0; i < C; ++i) local[i] = fmaxf(local[i], __shfl_xor_sync(0xffffffffu, local[i], other));
                    scale_top = fmaxf(scale_top, __shfl_xor_sync(0xffffffffu, scale_top, other));
                }
                if (g == 0) {
#pragma unroll
                    for (int i = 0; i < C; i += 2) *reinterpret_cast<float2*>(&shared.tops[slot][warp][column(i)]) = float2{local[i] * scale, local[i + 1] * scale};
                    shared.scale_tops[slot][warp] = scale_top;
                }
                named_barrier<1, 128>();
                float above_power = power, change[C];
#pragma unroll
                for (int w = 0; w < 4; ++w) above_power = fmaxf(above_power, power_below(shared.scale_tops[slot][w]));
                const float inverse = inverse_power(above_power), ratio = power * inverse;
                power = above_power;
#pragma unroll
                for (int i = 0; i < C; i += 2) {
                    float2 above{top[i], top[i + 1]};
#pragma unroll
                    for (int w = 0; w < 4; ++w) {
                        const float2 x = *reinterpret_cast<const float2*>(&shared.tops[slot][w][column(i)]);
                        above.x = fmaxf(above.x, x.x), above.y = fmaxf(above.y, x.y);
                    }
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        const float most = e ? above.y : above.x, base = most == -INFINITY ? 0 : most;
                        change[i + e] = exp2_approx(top[i + e] - base);
                        top[i + e] = most;
                        float &x = s[i * 2 + e], &y = s[i * 2 + e + 2];
                        x = exp2_approx(x * scale - (base - kLift)), y = exp2_approx(y * scale - (base - kLift));
                        sum[i + e] = sum[i + e] * change[i + e] + (x + y);
                    }
                }
                wait_for_slot();
                const uint32_t to = shared_address(shared.probabilities[slot][0][warp]) + lane * 16;
#pragma unroll
                for (int group = 0; group < S::kGroups; ++group) {
                    const float f0 = (&scales[0].x)[group] * inverse, f1 = (&scales[1].x)[group] * inverse;
#pragma unroll
                    for (int i = 0; i < S::kSums; i += 8)
                        store_transposed(to + group * (S::TOKENS / 16 * S::kStepBytes) + i / 8 * 512, fp16_of(s[i] * f0, s[i + 1] * f0), fp16_of(s[i + 2] * f1, s[i + 3] * f1),
                                         fp16_of(s[i + 4] * f0, s[i + 5] * f0), fp16_of(s[i + 6] * f1, s[i + 7] * f1));
                }
                if (warp == 0 && g == 0)
#pragma unroll
                    for (int i = 0; i < C; ++i) shared.factors[slot][column(i)] = change[i] * ratio;
                fence_for_engines();
                warp_arrive(shared.ready[slot]);
                ++given;
                ring.step();
            }
            // The rows' sums over all tokens, then what the value groups must multiply by.
            const int slot = given & 1;
#pragma unroll
            for (int i = 0; i < C; ++i) {
#pragma unroll
                for (int other = 4; other < 32; other *= 2) sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], other);
                if (g == 0) shared.tops[slot][warp][column(i)] = sum[i];
            }
            named_barrier<1, 128>();
            wait_for_slot();
            if (warp == 0 && g == 0) {
#pragma unroll
                for (int i = 0; i < C; ++i) {
                    float total = 0;
                    for (int w = 0; w < 4; ++w) total += shared.tops[slot][w][column(i)];
                    shared.factors[slot][column(i)] = total == 0 ? 0 : power / total;      // a NaN stays one
                    write_lse(piece, row0 + column(i), total == 0 ? -INFINITY : top[i] + (log2f(total) - kLift));
                }
            }
            warp_arrive(shared.ready[slot]);
            ++given;
        }
    }
    __device__ void write_lse(const Piece& piece, int row, float lse2) const {
        const int R = p.Q * p.H;
        const Partials partials(p.workspace, workers, R, kLatent);
        if (row >= R) return;
        if (piece.whole()) static_cast<float*>(p.lse)[int64_t(piece.b) * R + row] = lse2 * 0.6931471805599453f;
        else partials.lse2[partials.row(worker, piece.slot(), row)] = lse2;
    }

    // ---- values

    /// Rows of a tile that no token wrote may hold anything, NaN too: zeros in this group's columns, which probabilities of 0 leave alone.
    __device__ void clear_rest(uint8_t* tile, int left, int half) const {
        for (int i = threadIdx.x % 128; i < (S::TOKENS - left) * 16; i += 128) *reinterpret_cast<uint4*>(tile + (left + i / 16) * kRowBytesFp8 + half * 256 + i % 16 * 16) = uint4{0, 0, 0, 0};
        fence_for_engines();
        half ? named_barrier<3, 128>() : named_barrier<2, 128>();
    }

    /// Products of a value group: block m (64 columns: 16 a warp, of which a lane has 2 g and 2 g + 1) and 16 tokens k. Two blocks that share scales at a time.
    __device__ void value_group(int half) const {
        constexpr int kUnits = 8 / S::kBatches;       // a unit: two blocks, 16 tokens
        Part part(p, worker, workers);
        Piece piece;
        Ring ring;
        unsigned done = 0;
        float o[4][S::kSums];
        while (part.next(piece)) {
#pragma unroll 1
            for (int t = piece.first; t < piece.end; ++t, ++done, ring.step()) {
                const int left = piece.length - t * S::TOKENS, slot = done & 1;
                barrier_wait(shared_address(&shared.full[ring.stage]), ring.parity);
                if (left < S::TOKENS) clear_rest(shared.tiles[ring.stage], left, half);
                const uint32_t from = shared_address(shared.tiles[ring.stage]) + lane % 16 * kRowBytesFp8 + half * 256 + lane / 16 * 64 + warp * 16;
                const uint64_t probabilities = plain_descriptor(shared_address(shared.probabilities[slot][half * 2]));
#pragma unroll
                for (int batch = 0; batch < S::kBatches; ++batch) {
                    uint32_t a[kUnits][2][4];
#pragma unroll
                    for (int u = 0; u < kUnits; ++u) {
                        const int pair = (batch * kUnits + u) / 4, k = (batch * kUnits + u) % 4;
                        uint32_t b[4];                           // pairs of columns, transposed: bytes (t, d), (t, d + 1), (t + 1, d), (t + 1, d + 1)
                        load_transposed(b, from + k * 16 * kRowBytesFp8 + pair * 128);
#pragma unroll
                        for (int i = 0; i < 4; ++i) halves_of_e4m3(__byte_perm(b[i], 0, 0x3120), a[u][i / 2][i % 2 * 2], a[u][i / 2][i % 2 * 2 + 1]);
                    }
                    if (batch == S::kBatches - 1) warp_arrive(shared.empty[ring.stage]);
                    if (batch == 0) {
                        barrier_wait(shared_address(&shared.ready[slot]), done / 2 & 1);
                        if (t > piece.first) rescale(shared.factors[slot], o);
                    }
                    wgmma_begin();
#pragma unroll
                    for (int u = 0; u < kUnits; ++u) {
                        const int pair = (batch * kUnits + u) / 4, k = (batch * kUnits + u) % 4;
                        const uint64_t b = probabilities + (pair * (S::TOKENS / 16) + k) * (S::kStepBytes / 16);
                        wgmma_64<S::ROWS>(o[pair * 2], a[u][0], b, k > 0 || t > piece.first, true);
                        wgmma_64<S::ROWS>(o[pair * 2 + 1], a[u][1], b, k > 0 || t > piece.first, true);
                    }
                    wgmma_commit();
                    wgmma_wait<0>();
#pragma unroll
                    for (int m = 0; m < 4; ++m) sums_there(o[m]);
                }
                warp_arrive(shared.taken[slot]);
            }
            const int slot = done & 1;
            barrier_wait(shared_address(&shared.ready[slot]), done / 2 & 1);
            write(piece, shared.factors[slot], o, half);
            warp_arrive(shared.taken[slot]);
            ++done;
        }
    }
    __device__ void rescale(const float* factors, float (&o)[4][S::kSums]) const {
        float f[S::kColumns];
        bool change = false;
#pragma unroll
        for (int i = 0; i < S::kColumns; i += 2) {
            const float2 x = *reinterpret_cast<const float2*>(factors + column(i));
            f[i] = x.x, f[i + 1] = x.y, change |= x.x != 1 || x.y != 1;
        }
        if (!__any_sync(0xffffffffu, change)) return;
#pragma unroll
        for (int m = 0; m < 4; ++m)
#pragma unroll
            for (int i = 0; i < S::kSums; ++i) o[m][i] *= f[i / 4 * 2 + i % 2];
    }
    __device__ void write(const Piece& piece, const float* factors, const float (&o)[4][S::kSums], int half) const {
        const int R = p.Q * p.H, first = half * 256 + warp * 16 + 2 * g;
        const Partials partials(p.workspace, workers, R, kLatent);
#pragma unroll
        for (int i = 0; i < S::kColumns; ++i) {
            const int row = row0 + column(i), at = i / 2 * 4 + i % 2;
            if (row >= R) continue;
            const float factor = factors[column(i)];
            if (piece.whole()) {
                __nv_bfloat16* out = static_cast<__nv_bfloat16*>(p.out) + (int64_t(piece.b) * R + row) * kLatent + first;
#pragma unroll
                for (int m = 0; m < 4; ++m) *reinterpret_cast<uint32_t*>(out + m * 64) = bf16_of(o[m][at] * factor, o[m][at + 2] * factor);
            } else {
                float* out = partials.out + partials.row(worker, piece.slot(), row) * kLatent + first;
#pragma unroll
                for (int m = 0; m < 4; ++m) *reinterpret_cast<float2*>(out + m * 64) = float2{o[m][at] * factor, o[m][at + 2] * factor};
            }
        }
    }
};

template <class S> __global__ void __launch_bounds__(S::kLaunch, 1) fp8_kernel(const __grid_constant__ MlaDecode p, int most_workers) {
    extern __shared__ __align__(1024) uint8_t raw_shared[];
    Fp8Shared<S>& shared = *reinterpret_cast<Fp8Shared<S>*>(raw_shared);
    const Fp8Block<S> block(p, shared, most_workers);
    if (threadIdx.x == 0) {
        for (auto& full : shared.full) barrier_init(shared_address(&full), 1);
        for (auto& empty : shared.empty) barrier_init(shared_address(&empty), 12 * kWarpArrivals);
        for (int slot = 0; slot < 2; ++slot) barrier_init(shared_address(&shared.ready[slot]), 4 * kWarpArrivals), barrier_init(shared_address(&shared.taken[slot]), 8 * kWarpArrivals);
        barrier_init_done();
    }
    wait_for_kernel_before();
    let_next_kernel_start();                   // after the wait: what the next kernel reads at once has been written by then
    __syncthreads();
    if (threadIdx.x < 128) {
        if constexpr (S::kMoveRegisters) set_registers<152, 128>();
        block.score_group();
    } else if (threadIdx.x < 384) {
        if constexpr (S::kMoveRegisters) set_registers<168, 128>();
        block.value_group(threadIdx.x / 128 - 1);
    } else {
        if constexpr (S::kMoveRegisters) set_registers<24, 128>();
        if (threadIdx.x < 416) block.copy_warp();
    }
}
}  // namespace moe::kernels::sm90
