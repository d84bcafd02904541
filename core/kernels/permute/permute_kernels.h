// Raw entry points of permute: contiguous tensors of one device, outputs made by the caller.
#pragma once
#include "core/kernels/permute/permute.h"
#include "core/kernels/quantize/quantize.h"

namespace moe::kernels {

/// See sort_by_expert.
SortPlan sort_by_expert_cpu(const Tensor& ids_TK, int64_t num_experts, int64_t align);
SortPlan sort_by_expert_cuda(const Tensor& ids_TK, int64_t num_experts, int64_t align);

/// y [R, D] row r = x [T, D] row token[r], zeros for padding; fp64, fp32, bf16 or fp16. copy: y's in E4M3, or undefined.
void gather_rows_cpu(const Tensor& x_TD, const SortPlan& plan, Tensor y_RD, const QuantizedRows& copy = {});
void gather_rows_cuda(const Tensor& x_TD, const SortPlan& plan, Tensor y_RD, const QuantizedRows& copy = {});

/// out [T, D] = base (undefined: 0) + more (the same, and only with a base) + each token's rows of y [R, D], summed in the order of choices in at least fp32.
void add_rows_cpu(const Tensor& base_TD, const Tensor& more_TD, const Tensor& y_RD, const SortPlan& plan, Tensor out_TD);
void add_rows_cuda(const Tensor& base_TD, const Tensor& more_TD, const Tensor& y_RD, const SortPlan& plan, Tensor out_TD);

/// rows [R] = weights [T, K] by pair, 0 for padding.
void gather_weights_cpu(const Tensor& weights_TK, const SortPlan& plan, Tensor rows_R);
void gather_weights_cuda(const Tensor& weights_TK, const SortPlan& plan, Tensor rows_R);

/// weights [T, K] = rows [R] by pair, 0 where the pair was dropped.
void scatter_weights_cpu(const Tensor& rows_R, const SortPlan& plan, Tensor weights_TK);
void scatter_weights_cuda(const Tensor& rows_R, const SortPlan& plan, Tensor weights_TK);
}  // namespace moe::kernels
