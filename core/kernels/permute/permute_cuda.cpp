#ifdef MOE_WITH_CUDA
#include "core/kernels/permute/permute_kernels.h"

#include "core/kernels/common/cuda_check.h"
#include "core/kernels/permute/permute_sm90.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

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

/// The one wait for the device of an expert layer: the offsets are on the host by contract, since the number of rows is the
/// shape of what follows. All kernels are queued before the wait.
SortPlan sort_by_expert_cuda(const Tensor& ids_TK, int64_t num_experts) {
    OnDevice on(ids_TK);
    SortPlan plan;
    plan.T = ids_TK.size(0), plan.K = ids_TK.size(1);
    const int64_t pairs = plan.T * plan.K;
    MOE_CHECK(num_experts <= sm90::kSortMostExperts, shape, "sort_by_expert: experts on CUDA", std::to_string(num_experts), fmt::format("at most {}", sm90::kSortMostExperts), "");
    MOE_CHECK(pairs < (int64_t(1) << 31), shape, "sort_by_expert: tokens x choices", std::to_string(pairs), "less than 2^31", "");
    auto ints = ids_TK.options().dtype(at::kInt);
    plan.position_TK = at::empty({plan.T, plan.K}, ints);
    if (pairs == 0) {
        plan.token_R = at::empty({0}, ints), plan.choice_R = at::empty({0}, ints);
        plan.offsets_E1 = at::zeros({num_experts + 1}, at::kLong);
        return plan;
    }
    Tensor token_N = at::empty({pairs}, ints), choice_N = at::empty({pairs}, ints);
    Tensor counts = at::empty({sm90::sort_chunks(pairs), num_experts}, ints), bad = at::empty({sm90::sort_chunks(pairs)}, ints);
    Tensor totals = at::empty({num_experts + 2}, ids_TK.options());
    sm90::SortPairs p{};
    p.pairs = pairs, p.K = int(plan.K), p.E = int(num_experts), p.ids = ids_TK.const_data_ptr<int64_t>();
    p.counts = counts.mutable_data_ptr<int>(), p.bad = bad.mutable_data_ptr<int>(), p.totals = totals.mutable_data_ptr<int64_t>();
    p.position = plan.position_TK.mutable_data_ptr<int>(), p.token = token_N.mutable_data_ptr<int>(), p.choice = choice_N.mutable_data_ptr<int>();
    MOE_CUDA_CHECK(sm90::sort_pairs(p, on.stream));
    Tensor on_host = at::empty({num_experts + 2}, at::TensorOptions().dtype(at::kLong).pinned_memory(true));
    on_host.copy_(totals, /*non_blocking=*/true);
    MOE_CUDA_CHECK(cudaStreamSynchronize(on.stream));
    plan.offsets_E1 = on_host.narrow(0, 0, num_experts + 1);
    const int64_t* total = on_host.const_data_ptr<int64_t>();
    MOE_CHECK(total[num_experts + 1] == 0, shape, "sort_by_expert: ids", fmt::format("{} ids outside", total[num_experts + 1]), fmt::format("-1 … {}", num_experts - 1), "");
    plan.R = total[num_experts];
    plan.token_R = token_N.narrow(0, 0, plan.R), plan.choice_R = choice_N.narrow(0, 0, plan.R);
    return plan;
}

void gather_rows_cuda(const Tensor& x_TD, const SortPlan& plan, Tensor y_RD) {
    OnDevice on(x_TD);
    MOE_CUDA_CHECK(sm90::gather_rows(rows(x_TD, plan, y_RD), on.stream));
}

void add_rows_cuda(const Tensor& base_TD, const Tensor& y_RD, const SortPlan& plan, Tensor out_TD) {
    OnDevice on(out_TD);
    auto p = rows(y_RD, plan, out_TD);
    p.base = in_pointer(base_TD);
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
