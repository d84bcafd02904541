// Which tile a block works on next: DeepGEMM's Scheduler, specialised for groups that are known on the device only. Its own forms take the number of
// groups as a template parameter, walk through all of them and want the number of blocks compiled in; these read offsets[groups + 1] as sort_by_expert
// leaves them, with the number of groups as an argument and any number of blocks. Everything that DeepGEMM's kernels ask of a scheduler is here.
#pragma once
#include <deep_gemm/scheduler/gemm.cuh>

namespace moe::kernels::sm90 {
/// In place of the number of groups: it comes at run time. Not 0: a kernel compares group numbers with it.
constexpr uint32_t kGroupsAtRunTime = 0x7fffffff;
/// Groups of rows where two blocks may be a cluster, or one group of all rows.
constexpr uint32_t kGroupsInClusters = 0x7ffffffe;
/// Past every matrix: copies from there bring zeros.
constexpr uint32_t kNoRow = 0x7fffff00;
}  // namespace moe::kernels::sm90

namespace deep_gemm::sched {

/// What both forms share: tiles of one group of m_blocks x n_blocks, in bands of kBand rows of tiles, down a band's columns, so that the tiles in flight
/// share rows of A and columns of B in the cache.
template <uint32_t kBand> struct Tiles {
    __device__ static void place(uint32_t tile, uint32_t m_blocks, uint32_t n_blocks, uint32_t& m, uint32_t& n) {
        const uint32_t first = tile / (kBand * n_blocks) * kBand, inside = tile - first * n_blocks, height = min(kBand, m_blocks - first);
        m = first + inside % height;
        n = inside / height;
    }
};

/// Groups of rows (y = x wᵀ): group g has the rows offsets[g] … offsets[g + 1], both multiples of BLOCK_M. The kernel is given the number of groups
/// where it expects the number of rows, which it does not use. Rows from offsets[groups] on are not visited.
template <uint32_t BLOCK_M, uint32_t BLOCK_N, uint32_t kMulticast, bool kOnA, uint32_t kSMs, bool kZero, uint32_t kAlign, uint32_t kSpan, uint32_t kBand, uint32_t kSplit, bool kPadded, bool kSkip>
struct Scheduler<GemmType::MGroupedContiguousWithPsumLayout, BLOCK_M, BLOCK_N, moe::kernels::sm90::kGroupsAtRunTime, kMulticast, kOnA, kSMs, kZero, kAlign, kSpan, kBand, kSplit, kPadded, kSkip> {
    static_assert(kMulticast == 1);
    uint32_t current_shape_k, current_group_idx = 0;
    bool is_peer_cta_alive = true;

    __device__ Scheduler(uint32_t groups, uint32_t n, uint32_t k, int* offsets)
        : current_shape_k(k), offsets_(offsets), groups_(groups), n_blocks_((n + BLOCK_N - 1) / BLOCK_N), tile_(blockIdx.x), row_block_(block(0)), m_blocks_(block(1) - row_block_) {}

    __device__ bool get_next_block(uint32_t& m, uint32_t& n) {
        while (tile_ >= m_blocks_ * n_blocks_) {
            tile_ -= m_blocks_ * n_blocks_;
            if (++current_group_idx >= groups_) return false;
            row_block_ += m_blocks_;
            m_blocks_ = block(current_group_idx + 1) - row_block_;
        }
        Tiles<kBand>::place(tile_, m_blocks_, n_blocks_, m, n);
        m += row_block_;
        tile_ += gridDim.x;
        return true;
    }

    template <bool kWithGroup, IndexType = IndexType::MN> __device__ uint32_t get_global_idx(uint32_t size, uint32_t block_size, uint32_t block, uint32_t = 0) const {
        return (kWithGroup ? current_group_idx * size : 0) + block * block_size;
    }
    __device__ bool is_tma_multicast_valid(uint32_t) const { return false; }
    __device__ bool is_computation_valid(uint32_t, uint32_t) const { return true; }

private:
    __device__ uint32_t block(uint32_t group) const { return uint32_t(__ldg(offsets_ + group)) / BLOCK_M; }

    const int* offsets_;
    uint32_t groups_, n_blocks_, tile_, row_block_, m_blocks_;      // tile_ counts from the group's first
};

/// Groups along k (dw += dyᵀ x): every group has all tiles of an [m, n] result, and sums over the rows offsets[g] … offsets[g + 1]. The kernel is given the
/// number of groups where it expects k, which it does not use. DeepGEMM's kernel skips tiles of a group without rows; kAll gives them one step
/// of zeros, for kernels that write every tile.
template <uint32_t BLOCK_M, uint32_t BLOCK_N, uint32_t kBand, bool kAll> struct TilesAlongK {
    uint32_t current_shape_k = 0, current_k_start = 0, current_group_idx = 0;
    bool is_peer_cta_alive = true;

    __device__ TilesAlongK(uint32_t m, uint32_t n, uint32_t groups, int* offsets)
        : offsets_(offsets), groups_(groups), m_blocks_((m + BLOCK_M - 1) / BLOCK_M), n_blocks_((n + BLOCK_N - 1) / BLOCK_N), tile_(blockIdx.x) {}

    __device__ bool get_next_block(uint32_t& m, uint32_t& n) {
        const uint32_t tiles = m_blocks_ * n_blocks_;
        current_group_idx = tile_ / tiles;
        if (current_group_idx >= groups_) return false;
        current_k_start = __ldg(offsets_ + current_group_idx);
        current_shape_k = __ldg(offsets_ + current_group_idx + 1) - current_k_start;
        if (kAll && current_shape_k == 0) current_shape_k = 1, current_k_start = moe::kernels::sm90::kNoRow;
        Tiles<kBand>::place(tile_ % tiles, m_blocks_, n_blocks_, m, n);
        tile_ += gridDim.x;
        return true;
    }

    template <bool kWithGroup, IndexType kIndex = IndexType::MN> __device__ uint32_t get_global_idx(uint32_t size, uint32_t block_size, uint32_t block, uint32_t = 0) const {
        static_assert(kIndex != IndexType::SF_K);
        return (!kWithGroup ? 0 : kIndex == IndexType::MN ? current_group_idx * size : current_k_start) + block * block_size;
    }
    __device__ bool is_tma_multicast_valid(uint32_t) const { return false; }

private:
    const int* offsets_;
    uint32_t groups_, m_blocks_, n_blocks_, tile_;                   // tile_ counts over all groups
};
template <uint32_t BLOCK_M, uint32_t BLOCK_N, uint32_t kMulticast, bool kOnA, uint32_t kSMs, bool kZero, uint32_t kAlign, uint32_t kSpan, uint32_t kBand, uint32_t kSplit, bool kPadded, bool kSkip>
struct Scheduler<GemmType::KGroupedContiguous, BLOCK_M, BLOCK_N, moe::kernels::sm90::kGroupsAtRunTime, kMulticast, kOnA, kSMs, kZero, kAlign, kSpan, kBand, kSplit, kPadded, kSkip>
    : TilesAlongK<BLOCK_M, BLOCK_N, kBand, false> {
    static_assert(kMulticast == 1);
    using TilesAlongK<BLOCK_M, BLOCK_N, kBand, false>::TilesAlongK;
};

/// Groups of rows again, or with offsets == nullptr one group of as many rows as are given in place of the number of groups, ragged at the end. Tiles are
/// numbered over all groups and their group is searched for, so that the tiles of a cluster, one above the other, may lie in two groups: they share B where
/// they do not. A cluster at the end with one row of tiles left computes it twice.
template <uint32_t BLOCK_M, uint32_t BLOCK_N, uint32_t kMulticast, bool kOnA, uint32_t kSMs, bool kZero, uint32_t kAlign, uint32_t kSpan, uint32_t kBand, uint32_t kSplit, bool kPadded, bool kSkip>
struct Scheduler<GemmType::MGroupedContiguousWithPsumLayout, BLOCK_M, BLOCK_N, moe::kernels::sm90::kGroupsInClusters, kMulticast, kOnA, kSMs, kZero, kAlign, kSpan, kBand, kSplit, kPadded, kSkip> {
    static_assert(!kOnA && kBand % kMulticast == 0);
    uint32_t current_shape_k, current_group_idx = 0;
    static constexpr bool is_peer_cta_alive = true;

    __device__ Scheduler(uint32_t groups_or_rows, uint32_t n, uint32_t k, int* offsets)
        : current_shape_k(k), offsets_(offsets), groups_(groups_or_rows), n_blocks_((n + BLOCK_N - 1) / BLOCK_N), tile_(blockIdx.x / kMulticast) {
        m_blocks_ = ((offsets ? uint32_t(__ldg(offsets + groups_or_rows)) : groups_or_rows) + BLOCK_M - 1) / BLOCK_M;
    }

    __device__ bool get_next_block(uint32_t& m, uint32_t& n) {
        const uint32_t clusters = (m_blocks_ + kMulticast - 1) / kMulticast, rank = blockIdx.x % kMulticast;
        if (tile_ >= clusters * n_blocks_) return false;
        uint32_t cluster;
        Tiles<kBand / kMulticast>::place(tile_, clusters, n_blocks_, cluster, n);
        tile_ += gridDim.x / kMulticast;
        m = min(cluster * kMulticast + rank, m_blocks_ - 1);
        if (offsets_) {
            uint32_t first = 0, last = groups_ - 1;              // the first group that ends behind row m
            while (first < last) {
                const uint32_t middle = (first + last) / 2;
                if (uint32_t(__ldg(offsets_ + middle + 1)) > m * BLOCK_M) last = middle;
                else first = middle + 1;
            }
            current_group_idx = first;
            if (kMulticast > 1) {
                const uint32_t peer = min(cluster * kMulticast + (rank ^ 1), m_blocks_ - 1) * BLOCK_M;
                shared_ = peer >= uint32_t(__ldg(offsets_ + first)) && peer < uint32_t(__ldg(offsets_ + first + 1));
            }
        }
        return true;
    }

    template <bool kWithGroup, IndexType = IndexType::MN> __device__ uint32_t get_global_idx(uint32_t size, uint32_t block_size, uint32_t block, uint32_t = 0) const {
        return (kWithGroup ? current_group_idx * size : 0) + block * block_size;
    }
    __device__ bool is_tma_multicast_valid(uint32_t) const { return kMulticast > 1 && shared_; }
    __device__ bool is_computation_valid(uint32_t, uint32_t) const { return true; }

private:
    const int* offsets_;
    uint32_t groups_, m_blocks_, n_blocks_, tile_;                   // tile_ counts a cluster's tiles as one
    bool shared_ = true;
};
}  // namespace deep_gemm::sched
