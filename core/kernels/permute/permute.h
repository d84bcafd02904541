// Moving tokens into rows sorted by expert, and back. Row r of expert e comes after all rows of experts below e; within an
// expert rows are in the order of (token, choice). Groups may start at multiples of `align` rows: what lies between is padding, rows
// of zeros that belong to no token.
#pragma once
#include "core/kernels/common/row_groups.h"
#include "core/tensor/weight.h"

#include <tuple>

namespace moe::kernels {

/// A sort of (token, choice) pairs by expert, on the device of the ids.
struct SortPlan {
    Tensor position_TK;     ///< int32 [T, K]: the row of a pair; −1 for a dropped pair
    Tensor token_R;         ///< int32 [R]: the token of a row, −1 for padding
    Tensor choice_R;        ///< int32 [R]: which of its token's K choices a row is; anything for padding
    RowGroups groups;       ///< where the experts' rows are
    int64_t T = 0, K = 0;
    int64_t R = 0;          ///< rows: CPU: those that there are; CUDA: the most that there may be, padding after the last group
};

/// Counting sort, stable. ids int64 [T, K] in [0, E), or −1: dropped. On CUDA nothing waits for the device. Throws moe::Error (shape):
/// an id outside on the CPU (CUDA takes such a pair as dropped), align below 1, 2^31 pairs or more.
SortPlan sort_by_expert(const Tensor& ids_TK, int64_t num_experts, int64_t align = 1);

/// {x by row [R, D], weights by row [R]}, zeros for padding. Backward: sums of rows by token; weights' gradient by pair (0 where dropped).
/// fp8: a product in E4M3 reads the rows (bf16), whose copy is made in the same pass and goes with them (kernels/quantize: attach_rows).
std::pair<Tensor, Tensor> permute(const Tensor& x_TD, const Tensor& weights_TK, const SortPlan& plan, bool fp8 = false);

/// The same and x itself, for whoever reads it next: backward then makes both gradients of x in one pass.
std::tuple<Tensor, Tensor, Tensor> permute_and_input(const Tensor& x_TD, const Tensor& weights_TK, const SortPlan& plan, bool fp8 = false);

/// base + more + the sum of each token's rows: base and more [T, D] or undefined (0), more only with a base; y [R, D] → [T, D], rounded once. fp8: a product in E4M3 made y and
/// reads its gradient: as for permute.
Tensor unpermute(const Tensor& base_TD, const Tensor& y_RD, const SortPlan& plan, const Tensor& more_TD = {}, bool fp8 = false);

}  // namespace moe::kernels
