#ifdef MOE_WITH_CUDA
#include "core/kernels/permute/permute_kernels.h"

#include "core/kernels/common/cuda_check.h"
#include "core/kernels/permute/permute_sm90.h"
#include "core/kernels/quantize/fused_copy.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

namespace moe::kernels {
namespace {
sm90::Rows rows(const Tensor& in, const SortPlan& plan, const Tensor& out) {
    sm90::Rows p{};
    p.dtype = sm90_dtype("permute", in), p.T = plan.T, p.R = plan.R, p.K = int(plan.K), p.D = in.dim() == 2 ? in.size(1) : 0;
    p.token = plan.token_R.const_data_ptr<int>(), p.choice = plan.choice_R.const_data_ptr<int>(), p.position = plan.position_TK.const_data_ptr<int>();
    p.in = in_pointer(in), p.out = out_pointer(out);
    return p;
}
}  // namespace

SortPlan sort_by_expert_cuda(const Tensor& ids_TK, int64_t num_experts, int64_t align) {
    OnDevice on(ids_TK);
    SortPlan plan;
    plan.T = ids_TK.size(0), plan.K = ids_TK.size(1);
    const int64_t pairs = plan.T * plan.K;
    MOE_CHECK(num_experts <= sm90::kSortMostExperts, shape, "sort_by_expert: experts on CUDA", std::to_string(num_experts), fmt::format("at most {}", sm90::kSortMostExperts), "");
    // No expert without rows needs padding, so there are at most min(E, N) padded groups.
    plan.R = (pairs + std::min(num_experts, pairs) * (align - 1)) / align * align;
    auto ints = ids_TK.options().dtype(at::kInt);
    plan.position_TK = at::empty({plan.T, plan.K}, ints);
    plan.token_R = at::empty({plan.R}, ints), plan.choice_R = at::empty({plan.R}, ints);
    plan.groups = {pairs == 0 ? at::zeros({num_experts + 1}, ints) : at::empty({num_experts + 1}, ints), align};
    if (pairs == 0) return plan;
    Tensor counts = at::empty({sm90::sort_chunks(pairs), num_experts}, ints);
    sm90::SortPairs p{};
    p.pairs = pairs, p.rows = plan.R, p.K = int(plan.K), p.E = int(num_experts), p.align = int(align), p.ids = ids_TK.const_data_ptr<int64_t>();
    p.counts = counts.mutable_data_ptr<int>(), p.offsets = plan.groups.offsets_E1.mutable_data_ptr<int>();
    p.position = plan.position_TK.mutable_data_ptr<int>(), p.token = plan.token_R.mutable_data_ptr<int>(), p.choice = plan.choice_R.mutable_data_ptr<int>();
    MOE_CUDA_CHECK(sm90::sort_pairs(p, on.stream));
    return plan;
}

void gather_rows_cuda(const Tensor& x_TD, const SortPlan& plan, Tensor y_RD, const QuantizedRows& copy) {
    OnDevice on(x_TD);
    auto p = rows(x_TD, plan, y_RD);
    p.copy = fused_copy(copy, {x_TD, y_RD});
    MOE_CUDA_CHECK(sm90::gather_rows(p, on.stream));
    if (!p.copy.q) fill_copy_cuda(y_RD, copy);
}

void add_rows_cuda(const Tensor& base_TD, const Tensor& more_TD, const Tensor& y_RD, const SortPlan& plan, Tensor out_TD) {
    OnDevice on(out_TD);
    auto p = rows(y_RD, plan, out_TD);
    p.base = in_pointer(base_TD), p.more = in_pointer(more_TD);
    MOE_CUDA_CHECK(sm90::add_rows(p, on.stream));
}

void gather_weights_cuda(const Tensor& weights_TK, const SortPlan& plan, Tensor rows_R) {
    OnDevice on(weights_TK);
    MOE_CUDA_CHECK(sm90::gather_weights(rows(weights_TK, plan, rows_R), on.stream));
}

void scatter_weights_cuda(const Tensor& rows_R, const SortPlan& plan, Tensor weights_TK) {
    OnDevice on(weights_TK);
    MOE_CUDA_CHECK(sm90::scatter_weights(rows(rows_R, plan, weights_TK), on.stream));
}
}  // namespace moe::kernels
#endif
