// Moving tokens into rows sorted by expert, and back. Row r of expert e comes after all rows of experts below e; within an
// expert rows are in the order of (token, choice).
#pragma once
#include "core/tensor/weight.h"

namespace moe::kernels {

/// A sort of (token, choice) pairs by expert. On the device of the ids, but offsets, which the host reads.
struct SortPlan {
    Tensor position_TK;     ///< int32 [T, K]: the row of a pair; −1 for a dropped pair
    Tensor token_R;         ///< int32 [R]: the token of a row
    Tensor choice_R;        ///< int32 [R]: which of its token's K choices a row is
    Tensor offsets_E1;      ///< int64 [E + 1] on the host
    int64_t T = 0, K = 0, R = 0;
};

/// Counting sort, stable. ids int64 [T, K] in [0, E), or −1: dropped. Throws moe::Error (shape) for an id outside.
SortPlan sort_by_expert(const Tensor& ids_TK, int64_t num_experts);

/// {x by row [R, D], weights by row [R]}. Backward: sums of rows by token; weights' gradient by pair (0 where dropped).
std::pair<Tensor, Tensor> permute(const Tensor& x_TD, const Tensor& weights_TK, const SortPlan& plan);

/// base + the sum of each token's rows: base [T, D] or undefined (0), y [R, D] → [T, D].
Tensor unpermute(const Tensor& base_TD, const Tensor& y_RD, const SortPlan& plan);

}  // namespace moe::kernels
