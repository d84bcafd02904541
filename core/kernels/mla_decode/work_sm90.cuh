// Which tokens a block works on. The tiles of all sequences form one axis, cut into equal parts, one a worker: every multiprocessor gets the same number of
// tiles whatever the lengths, and the host need not know them. A part of a sequence is a piece; a sequence that is cut has partial results, put together by
// combine_sm90.cuh.
#pragma once
#include "core/kernels/mla_decode/mla_decode_sm90.h"

namespace moe::kernels::sm90 {
constexpr int kBlockTokens = 64;
/// Start and end of a sequence cost about as much as this many tiles. A tile is a block of the cache.
constexpr int kSequenceCost = 1;

struct Piece {
    int b, length, tiles;      ///< the sequence and its tiles in all
    int first, end;            ///< tiles of this piece
    __device__ bool whole() const { return first == 0 && end == tiles; }
    /// Place of a partial result among a worker's two: only its first piece can start inside a sequence.
    __device__ int slot() const { return first > 0 ? 0 : 1; }
};

/// Sequences on the axis.
struct Axis {
    const int32_t* lengths;
    int B, most;               ///< most: longest sequence that the block table holds

    __device__ explicit Axis(const MlaDecode& p) : lengths(p.lengths), B(p.B), most(p.M * kBlockTokens) {}
    __device__ int length(int b) const { return max(min(lengths[b], most), 0); }
    __device__ static int tiles(int length) { return (length + kBlockTokens - 1) / kBlockTokens; }
    __device__ static int cost(int tiles) { return tiles ? tiles + kSequenceCost : 0; }
    /// Σ cost of sequences 0 … n − 1. A whole warp calls it.
    __device__ int before(int n) const {
        int sum = 0;
        for (int b = threadIdx.x % 32; b < n; b += 32) sum += cost(tiles(length(b)));
        for (int lane = 16; lane; lane /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lane);
        return sum;
    }
    /// Workers that have something to do: with more than places on the axis, some parts in between would be empty.
    __device__ static int busy(int total, int workers) { return min(total, workers); }
    __device__ static int start_of(int total, int worker, int workers) { return int(int64_t(total) * worker / workers); }
    /// The worker whose part holds place x.
    __device__ static int owner(int total, int x, int workers) { return int(((int64_t(x) + 1) * workers - 1) / total); }
};

/// A worker's part of the axis, one piece after another.
class Part {
    Axis axis_;
    int at_ = 0, b_ = 0, lo_ = 0, hi_ = 0;      // sequence b_ starts at at_

public:
    /// A whole warp calls it.
    __device__ Part(const MlaDecode& p, int worker, int workers) : axis_(p) {
        const int total = axis_.before(axis_.B), lane = threadIdx.x % 32;
        workers = Axis::busy(total, workers);
        if (worker >= workers) return;                     // lo_ = hi_ = 0: nothing
        lo_ = Axis::start_of(total, worker, workers), hi_ = Axis::start_of(total, worker + 1, workers);
        for (; b_ < axis_.B; b_ += 32) {
            int sum = b_ + lane < axis_.B ? axis_.cost(axis_.tiles(axis_.length(b_ + lane))) : 0;
            for (int step = 1; step < 32; step *= 2) {
                const int other = __shfl_up_sync(0xffffffffu, sum, step);
                if (lane >= step) sum += other;
            }
            const int past = __popc(__ballot_sync(0xffffffffu, at_ + sum <= lo_));       // sequences that end before lo_
            const int skipped = __shfl_sync(0xffffffffu, sum, max(past - 1, 0));
            if (past > 0) at_ += skipped;
            if (past < 32) {
                b_ += past;
                break;
            }
        }
    }
    /// False after the last piece. Needs no other thread.
    __device__ bool next(Piece& x) {
        while (b_ < axis_.B && at_ < hi_) {
            x.b = b_++, x.length = axis_.length(x.b), x.tiles = axis_.tiles(x.length);
            x.first = max(lo_ - at_ - kSequenceCost, 0), x.end = min(hi_ - at_ - kSequenceCost, x.tiles);
            at_ += axis_.cost(x.tiles);
            if (x.first < x.end) return true;
        }
        return false;
    }
};

/// A worker's tiles in order, for the thread that starts the copies.
class Tiles {
    Part part_;
    Piece piece_{};
    int tile_ = -1;
    bool more_ = true;

public:
    __device__ explicit Tiles(const Part& part) : part_(part) { step(); }
    __device__ bool more() const { return more_; }
    __device__ int sequence() const { return piece_.b; }
    /// Of the tile: tokens, and place of its block number in the block table.
    __device__ int tokens() const { return min(kBlockTokens, piece_.length - tile_ * kBlockTokens); }
    __device__ int64_t entry(int M) const { return int64_t(piece_.b) * M + tile_; }
    /// To the next tile; true where a piece begins.
    __device__ bool step() {
        if (++tile_ < piece_.end) return false;
        more_ = part_.next(piece_);
        tile_ = piece_.first;
        return more_;
    }
};

/// Partial results: per worker and slot, for all rows (Q·H) of the sequence, values divided by their sum and the logarithm to base 2 of that sum.
struct Partials {
    float *out, *lse2;
    int rows, L;
    __host__ __device__ Partials(void* workspace, int workers, int rows_, int L_) : out(static_cast<float*>(workspace)), lse2(out + int64_t(2) * workers * rows_ * L_), rows(rows_), L(L_) {}
    __device__ int64_t row(int worker, int slot, int r) const { return (int64_t(worker) * 2 + slot) * rows + r; }
    static size_t bytes(int workers, int rows, int L) { return size_t(2) * workers * rows * (L + 1) * sizeof(float); }
};
}  // namespace moe::kernels::sm90
