// Launchers of permute, see permute_kernels.h. Letters: T tokens, K choices, N = T·K pairs, E experts, R rows.
#pragma once
#include "core/kernels/common/sm90.h"
#include "core/kernels/quantize/quantize_sm90.h"

namespace moe::kernels::sm90 {

/// Pairs that one block counts and places.
constexpr int kSortChunk = 1024;
/// Most experts: their counters lie in shared memory.
constexpr int kSortMostExperts = 8192;
inline int64_t sort_chunks(int64_t pairs) { return (pairs + kSortChunk - 1) / kSortChunk; }

struct SortPairs {
    int64_t pairs;                ///< N
    int K, E, align;
    const int64_t* ids;           ///< [N]
    int* counts;                  ///< [sort_chunks(N), E]: scratch
    int* offsets;                 ///< [E + 1]
    int* position;                ///< [N]
    int64_t rows;                 ///< R, at least N + E·(align − 1) rounded to align
    int* token;                   ///< [R]
    int* choice;                  ///< [R], written where a pair is
};
/// Stable counting sort in a fill and three kernels; an id outside 0 … E−1 is taken as dropped.
cudaError_t sort_pairs(const SortPairs& p, cudaStream_t stream);

struct Rows {
    Dtype dtype;
    int64_t T, R, D;
    int K;
    const int* token;             ///< [R]
    const int* choice;            ///< [R]
    const int* position;          ///< [T, K]
    const void* in;               ///< gather: x [T, D]; add: y [R, D]; weights [T, K]; rows [R]
    const void *base, *more;      ///< add: [T, D] or null; more only with a base
    void* out;
    RowsCopy copy;                ///< gather: of out, bf16 by 16 bytes only
};
cudaError_t gather_rows(const Rows& p, cudaStream_t stream);
cudaError_t add_rows(const Rows& p, cudaStream_t stream);
cudaError_t gather_weights(const Rows& p, cudaStream_t stream);
cudaError_t scatter_weights(const Rows& p, cudaStream_t stream);

}  // namespace moe::kernels::sm90
