// Decoding with products of warpgroups (wgmma): 64 query rows a block, bf16 cache, widths 512 and 64. For many heads or several new tokens, where the
// arithmetic costs as much time as the bytes.
//
// Three warpgroups. The first computes scores and probabilities, with its queries in registers (so that shared memory holds three tiles); the other two own
// half of the value columns each. Orders: cache_sm90.cuh. The scores of a tile are computed while the values of the tile before are.
#pragma once
#include "core/kernels/mla_decode/cache_sm90.cuh"

namespace moe::kernels::sm90 {
struct WgmmaShape {
    static constexpr int TOKENS = 64, STAGES = 3, kThreads = 384, kRows = 64;
    static constexpr int kTileBytes = TOKENS * kRowBytesPlain, kSub = TOKENS * 128;      // kSub: 64 columns of a tile
    static constexpr int kProbabilities = kLatent / 64 * kSub;                            // place in a tile
    static constexpr int kScoreRegisters = 184, kValueRegisters = 160;                   // 184 + 2 · 160 = 3 · 168, what a thread of 384 starts with
};

/// Shared memory behind the tiles. Registers are short: what is needed once a piece lies here, and thread 0 alone walks through pieces and tiles.
struct WgmmaShared {
    alignas(1024) uint8_t tiles[WgmmaShape::STAGES][WgmmaShape::kTileBytes];      // probabilities take the place of a tile's rotated part, which values do not need
    alignas(1024) uint8_t query_rope[WgmmaShape::kRows * 128];
    uint8_t query_last[WgmmaShape::kRows * 32];       // the latent's last 16 columns, for which four registers are lacking
    float factors[2][WgmmaShape::kRows];       // per row: what sums must be multiplied by before a tile is added, or 1 / sum at the end
    uint64_t full[WgmmaShape::STAGES];         // a tile is there
    uint64_t ready[2], taken[2];               // an order is given; both value groups have carried it out
    Order order[2];
    Piece done[2];                             // what to write
    Piece piece;                               // of the score group
    bool more;
    Part part;                                 // walked through by thread 0
    Tiles ahead;                               // by the first thread of the value groups
};

/// The score group's side of the orders.
struct WgmmaOrders {
    WgmmaShared& shared;
    unsigned given = 0;                        // the next takes slot given % 2
    __device__ unsigned slot() const { return given & 1; }
    __device__ void wait_for_slot() const {
        if (given >= 2) barrier_wait(shared_address(&shared.taken[slot()]), (given / 2 - 1) & 1);
    }
    __device__ void give(Order order) {
        if (threadIdx.x == 0) shared.order[slot()] = order;
        fence_for_engines();
        warp_arrive(shared.ready[slot()]);
        ++given;
    }
};

/// Fragments of 16 rows of this warp, the latent part but for its last 16 columns in the natural order; the rest goes to shared memory.
struct WgmmaQueries {
    static constexpr int kHeld = kLatentSteps - 1;
    uint32_t at[kLatentSteps][4];                     // the last is not kept

    /// Every warp loads its rows whole, all at once, and brings them into fragments through the place of the rotated part.
    __device__ void load(const MlaDecode& p, WgmmaShared& shared, int row0) {
        const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * 16, rows = p.Q * p.H, b = shared.piece.b;
        uint8_t* place = shared.query_rope + first * 128;
        // Eight lanes hold 64 columns of a row; a lane's four chunks are of rows lane / 8, + 4, + 8, + 12.
        const uint4 *latent[4], *rope[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = row0 + first + lane / 8 + 4 * i, token = b * p.Q + row / p.H, head = row % p.H;
            latent[i] = row < rows ? reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(p.q_latent) + token * p.latent_token + head * p.latent_head) + lane % 8 : nullptr;
            rope[i] = row < rows ? reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(p.q_rope) + token * p.rope_token + head * p.rope_head) + lane % 8 : nullptr;
        }
#pragma unroll
        for (int sub = 0; sub < kLatent / 64; ++sub)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const uint4 v = latent[i] ? latent[i][sub * 8] : uint4{0, 0, 0, 0};
                at[sub * 4 + i][0] = v.x, at[sub * 4 + i][1] = v.y, at[sub * 4 + i][2] = v.z, at[sub * 4 + i][3] = v.w;
            }
        auto put = [&](int i, const uint4& v) {
            const int row = lane / 8 + 4 * i;
            *reinterpret_cast<uint4*>(place + row * 128 + ((lane % 8 ^ row % 8) << 4)) = v;
        };
#pragma unroll
        for (int sub = 0; sub < kLatent / 64; ++sub) {
#pragma unroll
            for (int i = 0; i < 4; ++i) put(i, uint4{at[sub * 4 + i][0], at[sub * 4 + i][1], at[sub * 4 + i][2], at[sub * 4 + i][3]});
            __syncwarp();
#pragma unroll
            for (int i = 0; i < 4; ++i) load_matrices(at[sub * 4 + i], shared_address(place) + lane % 16 * 128 + ((2 * i + lane / 16 ^ lane % 8) << 4));
            __syncwarp();
        }
        const int g = lane / 4, q = lane % 4;
        uint8_t* last = shared.query_last + first / 8 * 256 + g * 16 + q * 4;
        *reinterpret_cast<uint32_t*>(last) = at[kHeld][0], *reinterpret_cast<uint32_t*>(last + 128) = at[kHeld][2];
        *reinterpret_cast<uint32_t*>(last + 256) = at[kHeld][1], *reinterpret_cast<uint32_t*>(last + 384) = at[kHeld][3];
#pragma unroll
        for (int i = 0; i < 4; ++i) put(i, rope[i] ? rope[i][0] : uint4{0, 0, 0, 0});
        fence_for_engines();
    }
};

/// Scores of 64 rows and a tile, in two steps: what the first has started runs on while other things are done.
struct WgmmaScores {
    static constexpr int kBegun = 8;                  // products that `begin` starts
    const WgmmaShared& shared;
    const WgmmaQueries& queries;

    __device__ uint64_t keys(int stage, int k) const { return rows_descriptor(shared_address(shared.tiles[stage])) + (k / 4 * WgmmaShape::kSub + k % 4 * 32) / 16; }
    __device__ void begin(int stage, float (&s)[32]) const {
        wgmma_begin();
#pragma unroll
        for (int k = 0; k < kBegun; ++k) wgmma_64<64>(s, queries.at[k], keys(stage, k), k > 0, false);
    }
    __device__ void finish(int stage, float (&s)[32]) const {
        wgmma_begin();
#pragma unroll
        for (int k = kBegun; k < WgmmaQueries::kHeld; ++k) wgmma_64<64>(s, queries.at[k], keys(stage, k), true, false);
        wgmma_64x64_shared(s, plain_descriptor(shared_address(shared.query_last)), keys(stage, WgmmaQueries::kHeld));
        const uint64_t rope = rows_descriptor(shared_address(shared.query_rope));
#pragma unroll
        for (int k = 0; k < kRope / 16; ++k) wgmma_64x64_shared(s, rope + k * 2, keys(stage, kLatentSteps + k));
        wgmma_commit();
        wgmma_wait();
    }
};

/// Waits for a tile, `left` tokens from its first on, and clears rows that no token wrote: they may hold NaN.
__device__ inline void wait_for_keys(WgmmaShared& shared, int stage, int parity, int left) {
    using S = WgmmaShape;
    barrier_wait(shared_address(&shared.full[stage]), parity);
    if (left >= S::TOKENS) return;
#pragma unroll 1
    for (int i = left * 128 + thread_again() * 16; i < S::kSub; i += 128 * 16)
#pragma unroll 1
        for (int sub = 0; sub < kRowBytesPlain / 128; ++sub) *reinterpret_cast<uint4*>(shared.tiles[stage] + sub * S::kSub + i) = uint4{0, 0, 0, 0};
    fence_for_engines();
    named_barrier<1, 128>();
}

__device__ inline void score_group(const MlaDecode& p, WgmmaShared& shared, int worker, int workers, int row0) {
    using S = WgmmaShape;
    WgmmaOrders orders{shared};
    WgmmaQueries queries;
    const WgmmaScores scores{shared, queries};
    int stage = 0, parity = 0;
    float s[32];
    while (true) {
        named_barrier<1, 128>();                             // everybody is done with the last piece
        if (threadIdx.x == 0) shared.more = shared.part.next(shared.piece);
        named_barrier<1, 128>();
        if (!shared.more) break;
        queries.load(p, shared, row0);
        named_barrier<1, 128>();
        float top[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
        int left = shared.piece.length - shared.piece.first * S::TOKENS;      // tokens from this tile on
        int tiles = shared.piece.end - shared.piece.first;
        Order order = Order::first_tile;
        wait_for_keys(shared, stage, parity, left);
        scores.begin(stage, s);
        while (true) {
            scores.finish(stage, s);
            if (left - p.Q + 1 < S::TOKENS) {                // a new token sees itself and what comes before it
                const unsigned thread = thread_again();
                const int row = row0 + int(thread / 32 * 16 + thread / 4 % 8), seen = left - p.Q + 1 - int(thread % 4) * 2;
                const int limit[2] = {seen + row / p.H, seen + (row + 8) / p.H};
#pragma unroll
                for (int i = 0; i < 32; ++i)
                    if (i / 4 * 8 + i % 2 >= limit[i % 4 / 2]) s[i] = -INFINITY;
            }
            const float scale = p.scale_log2;
            float change[2];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float above = s[2 * h];
#pragma unroll
                for (int n = 0; n < 8; ++n) above = fmaxf(above, fmaxf(s[4 * n + 2 * h], s[4 * n + 2 * h + 1]));
                above = fmaxf(top[h], quad_max(above) * scale);
                const float base = above == -INFINITY ? 0 : above;
                change[h] = exp2_approx(top[h] - base);
                top[h] = above;
                float added = 0;
#pragma unroll
                for (int n = 0; n < 8; ++n) {
                    float &a = s[4 * n + 2 * h], &b = s[4 * n + 2 * h + 1];
                    a = exp2_approx(a * scale - base), b = exp2_approx(b * scale - base);
                    added += a + b;
                }
                sum[h] = sum[h] * change[h] + added;
            }
            orders.wait_for_slot();
            named_barrier<1, 128>();                         // all four warps have read the rotated part, whose place the probabilities take
            const unsigned thread = thread_again(), lane_row = thread / 32 * 16 + thread % 16;
            const uint32_t to = shared_address(shared.tiles[stage]) + S::kProbabilities + lane_row * 128 + ((thread / 16 % 2 ^ lane_row % 8) << 4);
#pragma unroll
            for (int n = 0; n < 8; n += 2)                   // 16 rows, 16 tokens
                store_matrices(to ^ n << 4, bf16_of(s[4 * n], s[4 * n + 1]), bf16_of(s[4 * n + 2], s[4 * n + 3]), bf16_of(s[4 * n + 4], s[4 * n + 5]), bf16_of(s[4 * n + 6], s[4 * n + 7]));
            if (thread % 4 == 0) {
                float* factors = shared.factors[orders.slot()] + thread / 32 * 16 + thread / 4 % 8;
                factors[0] = change[0], factors[8] = change[1];
            }
            if (++stage == S::STAGES) stage = 0, parity ^= 1;
            if (--tiles == 0) break;
            left -= S::TOKENS;
            wait_for_keys(shared, stage, parity, left);
            scores.begin(stage, s);
            orders.give(order);
            order = Order::tile;
        }
        orders.give(order);
        orders.wait_for_slot();
        if (threadIdx.x == 0) shared.done[orders.slot()] = shared.piece;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const float all = quad_sum(sum[h]);
            const unsigned thread = thread_again(), row = thread / 32 * 16 + thread / 4 % 8 + 8 * h;
            if (thread % 4 == 0) {
                const Piece& piece = shared.piece;
                const int R = p.Q * p.H, r = row0 + row;
                const float lse2 = all == 0 ? -INFINITY : top[h] + log2f(all);
                shared.factors[orders.slot()][row] = all == 0 ? 0 : 1 / all;      // a NaN stays one
                const Partials partials(p.workspace, workers, R, kLatent);
                if (r < R && piece.whole()) static_cast<float*>(p.lse)[int64_t(piece.b) * R + r] = lse2 * 0.6931471805599453f;
                else if (r < R) partials.lse2[partials.row(worker, piece.slot(), r)] = lse2;
            }
        }
        orders.give(Order::write);
    }
    orders.wait_for_slot();
    orders.give(Order::stop);
}

__device__ inline void value_group(const MlaDecode& p, WgmmaShared& shared, const CUtensorMap* map, int worker, int workers, int row0) {
    using S = WgmmaShape;
    const int half = threadIdx.x / 128 - 1;
    Copies copies;
    if (threadIdx.x / 32 == 4) {
        copies.next(p, shared);
        for (int first = 0; first < S::STAGES; ++first) copies.start<S>(p, shared, map, first, row0);
    }
    int stage = 0, parity = 0;
    float o[128];
    for (unsigned orders = 0;; ++orders) {
        const unsigned slot = orders & 1;
        const float* factors = shared.factors[slot] + threadIdx.x / 32 % 4 * 16 + threadIdx.x / 4 % 8;      // of this thread's rows: 0 and 8
        barrier_wait(shared_address(&shared.ready[slot]), orders / 2 & 1);
        const Order order = shared.order[slot];
        if (order == Order::stop) break;
        if (order == Order::write) {
            const Piece piece = shared.done[slot];
            const int R = p.Q * p.H, column = half * 256 + threadIdx.x % 4 * 2;
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int row = row0 + threadIdx.x / 32 % 4 * 16 + threadIdx.x / 4 % 8 + 8 * h;
                const float factor = factors[8 * h];
                if (row >= R) continue;
                if (piece.whole()) {
                    __nv_bfloat16* out = static_cast<__nv_bfloat16*>(p.out) + (int64_t(piece.b) * R + row) * kLatent + column;
#pragma unroll
                    for (int n = 0; n < 32; ++n) *reinterpret_cast<uint32_t*>(out + 8 * n) = bf16_of(o[4 * n + 2 * h] * factor, o[4 * n + 2 * h + 1] * factor);
                } else {
                    const Partials partials(p.workspace, workers, R, kLatent);
                    float* out = partials.out + partials.row(worker, piece.slot(), row) * kLatent + column;
#pragma unroll
                    for (int n = 0; n < 32; ++n) *reinterpret_cast<float2*>(out + 8 * n) = float2{o[4 * n + 2 * h] * factor, o[4 * n + 2 * h + 1] * factor};
                }
            }
        } else {
            barrier_wait(shared_address(&shared.full[stage]), parity);
            if (order == Order::tile) {
                const float c0 = factors[0], c1 = factors[8];
                if (__any_sync(0xffffffffu, c0 != 1 || c1 != 1)) {
#pragma unroll
                    for (int i = 0; i < 128; i += 4) o[i] *= c0, o[i + 1] *= c0, o[i + 2] *= c1, o[i + 3] *= c1;
                }
            }
            const uint64_t probabilities = rows_descriptor(shared_address(shared.tiles[stage]) + S::kProbabilities);
            const uint64_t values = columns_descriptor(shared_address(shared.tiles[stage] + half * 4 * S::kSub), S::kSub);
            wgmma_begin();
#pragma unroll
            for (int k = 0; k < S::TOKENS / 16; ++k) wgmma_64x256(o, probabilities + k * 2, values + k * (2048 / 16), k > 0 || order == Order::tile);
            wgmma_commit();
            wgmma_wait();
        }
        warp_arrive(shared.taken[slot]);
        if (order == Order::write) continue;
        if (threadIdx.x / 32 == 4) {                       // when both groups are done, so is the tile
            barrier_wait(shared_address(&shared.taken[slot]), orders / 2 & 1);
            copies.start<S>(p, shared, map, stage, row0);
        }
        if (++stage == S::STAGES) stage = 0, parity ^= 1;
    }
}

static __global__ void __launch_bounds__(WgmmaShape::kThreads, 1) wgmma_kernel(const __grid_constant__ CUtensorMap map, const __grid_constant__ MlaDecode p, int most_workers) {
    using S = WgmmaShape;
    extern __shared__ __align__(1024) uint8_t raw_shared[];
    WgmmaShared& shared = *reinterpret_cast<WgmmaShared*>(raw_shared);      // at a multiple of 1024, as swizzled tiles need: there is no other shared memory
    const int groups = gridDim.x / most_workers, worker = blockIdx.x / groups, row0 = blockIdx.x % groups * S::kRows;
    if (threadIdx.x == 0) {
        prefetch_map(&map);
        for (auto& full : shared.full) barrier_init(shared_address(&full), 1);
        for (int slot = 0; slot < 2; ++slot) barrier_init(shared_address(&shared.ready[slot]), 4 * kWarpArrivals), barrier_init(shared_address(&shared.taken[slot]), 8 * kWarpArrivals);
        barrier_init_done();
    }
    wait_for_kernel_before();
    let_next_kernel_start();                   // after the wait: what the next kernel reads at once has been written by then
    if (threadIdx.x / 32 == 4) {
        const Part part(p, worker, most_workers);
        if (threadIdx.x % 32 == 0) shared.part = part, shared.ahead = Tiles(part);
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        set_registers<S::kScoreRegisters, 168>();
        score_group(p, shared, worker, most_workers, row0);
    } else {
        set_registers<S::kValueRegisters, 168>();
        value_group(p, shared, &map, worker, most_workers, row0);
    }
}
}  // namespace moe::kernels::sm90
