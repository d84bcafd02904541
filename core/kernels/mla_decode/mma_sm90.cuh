// Decoding with products of single warps (mma.sync): up to 16 query rows (new tokens times heads) a block, bf16 cache, widths 512 and 64.
//
// A block takes the tiles of its part (work_sm90.cuh) one after another; the copy engine fills a ring of tiles in shared memory. Eight warps compute scores and
// probabilities, eight others add up values, each side a tile or two apart from the other, so that the waits of one are filled by the other's work. Each tile is
// read from shared memory twice. Scores: each warp has 8 tokens; a lane's 16-byte load holds 8 columns of a token for several products in a row, so columns are
// contracted in a permuted order, and the queries are loaded in that order. Values: each warp owns 64 columns.
//
// Lanes: g = lane / 4 is a row or a column of a fragment, q = lane % 4 a pair of the other dim.
#pragma once
#include "core/kernels/mla_decode/cache_sm90.cuh"

namespace moe::kernels::sm90 {
struct MmaShape {
    static constexpr int TOKENS = 64, STAGES = 3, SIDE_WARPS = 8, kRows = 16;
    static constexpr int kSideThreads = SIDE_WARPS * 32, kThreads = 2 * kSideThreads;
    static constexpr int kColumns = kLatent / SIDE_WARPS;       // value columns of a warp
    static constexpr int kTileBytes = TOKENS * kRowBytesPlain;
    static constexpr int kPitch = TOKENS * 2 + 16;              // bytes of a row of probabilities: eight rows fall into different banks
    static constexpr int kScoreRegisters = 176, kValueRegisters = 80;
};

struct MmaShared {
    alignas(1024) uint8_t tiles[MmaShape::STAGES][MmaShape::kTileBytes];
    alignas(16) uint8_t probabilities[2][MmaShape::kRows * MmaShape::kPitch];
    uint4 query_rope[kSteps - kLatentSteps][32];
    float tops[2][MmaShape::SIDE_WARPS][MmaShape::kRows];      // of each warp's tokens
    float factors[2][MmaShape::kRows];         // what sums must be multiplied by before a tile is added, or 1 / sum at the end
    uint64_t full[MmaShape::STAGES];           // a tile is there
    uint64_t ready[2], taken[2];               // an order is given; it has been carried out
    Order order[2];
    Piece done[2];                             // what to write
    Piece piece;                               // of the scoring side
    bool more;
    Part part;                                 // walked through by thread 0
    Tiles ahead;                               // by the first thread of the other side
};

struct MmaBlock {
    using S = MmaShape;
    const MlaDecode& p;
    MmaShared& shared;
    int workers, worker, row0;
    int warp, lane, g, q;                      // warp: of its side

    __device__ MmaBlock(const MlaDecode& p_, MmaShared& shared_, int workers_)
        : p(p_), shared(shared_), workers(workers_), warp(threadIdx.x / 32 % S::SIDE_WARPS), lane(threadIdx.x % 32), g(lane / 4), q(lane % 4) {
        const int groups = gridDim.x / workers;
        worker = blockIdx.x / groups, row0 = blockIdx.x % groups * S::kRows;
    }

    /// Rows of a tile that no token wrote may hold anything, NaN too: zeros, which probabilities of 0 leave alone.
    __device__ void clear_rest(uint8_t* tile, int tokens) const {
        constexpr int kPart = S::TOKENS * 128;                   // 64 columns of all rows lie together
#pragma unroll 1
        for (int i = tokens * 128 + int(threadIdx.x) * 16; i < kPart; i += S::kSideThreads * 16)
#pragma unroll 1
            for (int part = 0; part < kRowBytesPlain / 128; ++part) *reinterpret_cast<uint4*>(tile + part * kPart + i) = uint4{0, 0, 0, 0};
        fence_for_engines();
        named_barrier<1, S::kSideThreads>();
    }

    // ---- scores

    static constexpr int kChains = 4;          // sums side by side: a product waits for the one before it in its sum

    /// The piece's queries: lane q holds columns 16 q … 16 q + 15 of each 64, the latent's in registers, all loads at once. Rows past the last are zero.
    __device__ void load_queries(uint32_t (&held)[kLatentSteps][4]) const {
        const uint4 *latent[2], *rope[2];      // of rows g and g + 8, null past the last
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = row0 + g + 8 * half, token = shared.piece.b * p.Q + row / p.H, head = row % p.H;
            const bool real = row < p.Q * p.H;
            latent[half] = real ? reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(p.q_latent) + token * p.latent_token + head * p.latent_head) : nullptr;
            rope[half] = real ? reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(p.q_rope) + token * p.rope_token + head * p.rope_head) : nullptr;
        }
        auto columns = [&](int half, int k) {                    // eight: those of products k and k + 1, k even
            if (!latent[half]) return uint4{0, 0, 0, 0};
            if (k >= kLatentSteps) return rope[half][2 * q + (k - kLatentSteps) / 2];
            return latent[half][k / 4 * 8 + 2 * q + k % 4 / 2];
        };
#pragma unroll
        for (int k = 0; k < kLatentSteps; k += 2) {
            const uint4 x = columns(0, k), y = columns(1, k);
            spread(uint4{x.x, y.x, x.y, y.y}, held[k]), spread(uint4{x.z, y.z, x.w, y.w}, held[k + 1]);
        }
        if (warp == 0)
            for (int k = kLatentSteps; k < kSteps; k += 2) {
                const uint4 x = columns(0, k), y = columns(1, k);
                shared.query_rope[k - kLatentSteps][lane] = uint4{x.x, y.x, x.y, y.y}, shared.query_rope[k + 1 - kLatentSteps][lane] = uint4{x.z, y.z, x.w, y.w};
            }
        named_barrier<1, S::kSideThreads>();
    }
    __device__ static void spread(uint4 v, uint32_t* r) { r[0] = v.x, r[1] = v.y, r[2] = v.z, r[3] = v.w; }

    /// s = the 16 rows' products with the 8 tokens from warp · 8 on.
    __device__ void scores(const uint8_t* tile, const uint32_t (&queries)[kLatentSteps][4], float (&s)[4]) const {
        float c[kChains][4] = {};
#pragma unroll
        for (int sub = 0; sub < kRowBytesPlain / 128; ++sub) {   // 64 columns: four products of depth 16
            uint32_t b[8];
#pragma unroll
            for (int e = 0; e < 2; ++e) spread(*reinterpret_cast<const uint4*>(tile + sub * (S::TOKENS * 128) + (warp * 8 + g) * 128 + (((2 * q + e) ^ g) << 4)), b + 4 * e);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int k = sub * 4 + i;
                uint32_t a[4];
                if (k < kLatentSteps) {
                    for (int j = 0; j < 4; ++j) a[j] = queries[k < kLatentSteps ? k : 0][j];
                } else {
                    spread(shared.query_rope[k - kLatentSteps][lane], a);
                }
                multiply_bf16(c[i % kChains], a, b[2 * i], b[2 * i + 1]);
            }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            s[i] = c[0][i];
            for (int chain = 1; chain < kChains; ++chain) s[i] += c[chain][i];
        }
    }

    // ---- values

    /// o += probabilities · this warp's columns.
    __device__ void values(const uint8_t* tile, int slot, float (&o)[S::kColumns / 8][4]) const {
        const uint32_t base = shared_address(tile) + lane % 16 * 128;
#pragma unroll
        for (int k = 0; k < S::TOKENS / 16; ++k) {
            uint32_t a[4];
            load_matrices(a, shared_address(shared.probabilities[slot]) + lane % 16 * S::kPitch + k * 32 + lane / 16 * 16);
#pragma unroll
            for (int j = 0; j < S::kColumns / 16; ++j) {
                const int column = warp * S::kColumns + 16 * j;
                uint32_t b[4];
                load_transposed(b, base + column / 64 * (S::TOKENS * 128) + k * 2048 + (((column % 64 / 8 + lane / 16) ^ lane % 8) << 4));
                multiply_bf16(o[2 * j], a, b[0], b[1]), multiply_bf16(o[2 * j + 1], a, b[2], b[3]);
            }
        }
    }

    // ---- results

    __device__ void write(int slot, const float (&o)[S::kColumns / 8][4]) const {
        const int R = p.Q * p.H, column = warp * S::kColumns + 2 * q;
        const Piece piece = shared.done[slot];
        const Partials partials(p.workspace, workers, R, kLatent);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = g + 8 * half;
            if (row0 + row >= R) continue;
            const float factor = shared.factors[slot][row];
            if (piece.whole()) {
                __nv_bfloat16* out = static_cast<__nv_bfloat16*>(p.out) + (int64_t(piece.b) * R + row0 + row) * kLatent + column;
#pragma unroll
                for (int n = 0; n < S::kColumns / 8; ++n) *reinterpret_cast<uint32_t*>(out + 8 * n) = bf16_of(o[n][2 * half] * factor, o[n][2 * half + 1] * factor);
            } else {
                float* out = partials.out + partials.row(worker, piece.slot(), row0 + row) * kLatent + column;
#pragma unroll
                for (int n = 0; n < S::kColumns / 8; ++n) *reinterpret_cast<float2*>(out + 8 * n) = float2{o[n][2 * half] * factor, o[n][2 * half + 1] * factor};
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
        uint32_t queries[kLatentSteps][4];
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
            load_queries(queries);
            float top[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
            int left = shared.piece.length - shared.piece.first * S::TOKENS;      // tokens from this tile on
            const int all = shared.piece.end - shared.piece.first, row = row0 + g;
            for (int tiles = 0; tiles < all; ++tiles, left -= S::TOKENS) {
                uint8_t* tile = shared.tiles[stage];
                const int slot = orders & 1;
                barrier_wait(shared_address(&shared.full[stage]), parity);
                if (left < S::TOKENS) clear_rest(tile, left);

                float s[4];
                scores(tile, queries, s);
                // A new token sees itself and what comes before it; the length counts all of them.
                const int first = warp * 8 + 2 * q, seen = left - p.Q + 1;
                if (seen < S::TOKENS) {
                    const int limit[2] = {seen + row / p.H - first, seen + (row + 8) / p.H - first};
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        if (i % 2 >= limit[i / 2]) s[i] = -INFINITY;
                }
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const float local = quad_max(fmaxf(s[2 * h], s[2 * h + 1]));
                    if (q == 0) shared.tops[slot][warp][g + 8 * h] = local * scale;
                }
                named_barrier<1, S::kSideThreads>();
                float change[2];
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    float above = top[h];
#pragma unroll
                    for (int other = 0; other < S::SIDE_WARPS; ++other) above = fmaxf(above, shared.tops[slot][other][g + 8 * h]);
                    const float base = above == -INFINITY ? 0 : above;
                    change[h] = exp2_approx(top[h] - base);
                    top[h] = above;
                    float &a = s[2 * h], &b = s[2 * h + 1];
                    a = exp2_approx(a * scale - base), b = exp2_approx(b * scale - base);
                    sum[h] = sum[h] * change[h] + (a + b);
                }
                wait_for_slot();
                uint8_t* to = shared.probabilities[slot] + g * S::kPitch + (warp * 8 + 2 * q) * 2;
                for (int h = 0; h < 2; ++h) *reinterpret_cast<uint32_t*>(to + h * 8 * S::kPitch) = bf16_of(s[2 * h], s[2 * h + 1]);
                if (warp == 0 && q == 0) shared.factors[slot][g] = change[0], shared.factors[slot][g + 8] = change[1];
                give(tiles == 0 ? Order::first_tile : Order::tile);
                if (++stage == S::STAGES) stage = 0, parity ^= 1;
            }

            // The rows' sums over all warps, then 1 / sum for the other side.
            const int slot = orders & 1;
            for (int h = 0; h < 2; ++h) {
                sum[h] = quad_sum(sum[h]);
                if (q == 0) shared.tops[slot][warp][g + 8 * h] = sum[h];
            }
            named_barrier<1, S::kSideThreads>();
            wait_for_slot();
            if (threadIdx.x == 0) shared.done[slot] = shared.piece;
            if (warp == 0 && q == 0)
                for (int h = 0; h < 2; ++h) {
                    float total = 0;
                    for (int other = 0; other < S::SIDE_WARPS; ++other) total += shared.tops[slot][other][g + 8 * h];
                    shared.factors[slot][g + 8 * h] = total == 0 ? 0 : 1 / total;      // a NaN stays one
                    write_lse(row + 8 * h, total == 0 ? -INFINITY : top[h] + log2f(total));
                }
            give(Order::write);
        }
        wait_for_slot();
        give(Order::stop);
    }

    __device__ void value_side(const CUtensorMap* map) const {
        float o[S::kColumns / 8][4];
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
                write(slot, o);
                warp_arrive(shared.taken[slot]);
                continue;
            }
            barrier_wait(shared_address(&shared.full[stage]), parity);
            if (order == Order::first_tile) {
#pragma unroll
                for (int i = 0; i < S::kColumns / 8 * 4; ++i) (&o[0][0])[i] = 0;
            }
            const float c0 = shared.factors[slot][g], c1 = shared.factors[slot][g + 8];
            if (__any_sync(0xffffffffu, c0 != 1 || c1 != 1)) {
#pragma unroll
                for (int n = 0; n < S::kColumns / 8; ++n) o[n][0] *= c0, o[n][1] *= c0, o[n][2] *= c1, o[n][3] *= c1;
            }
            values(shared.tiles[stage], slot, o);
            warp_arrive(shared.taken[slot]);
            if (warp == 0) {                                           // when all warps of this side are done, so is the tile
                barrier_wait(shared_address(&shared.taken[slot]), orders / 2 & 1);
                copies.start<S>(p, shared, map, stage, row0);
            }
            if (++stage == S::STAGES) stage = 0, parity ^= 1;
        }
    }
};

static __global__ void __launch_bounds__(MmaShape::kThreads, 1) mma_kernel(const __grid_constant__ CUtensorMap map, const __grid_constant__ MlaDecode p, int most_workers) {
    using S = MmaShape;
    extern __shared__ __align__(1024) uint8_t raw_shared[];
    MmaShared& shared = *reinterpret_cast<MmaShared*>(raw_shared);      // at a multiple of 1024, as swizzled tiles need: there is no other shared memory
    const MmaBlock block(p, shared, most_workers);
    if (threadIdx.x == 0) {
        prefetch_map(&map);
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
