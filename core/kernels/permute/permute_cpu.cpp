#include "core/kernels/permute/permute_kernels.h"

#include "core/kernels/common/dtype.h"
#include "core/kernels/quantize/quantize_kernels.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

#include <vector>

namespace moe::kernels {
SortPlan sort_by_expert_cpu(const Tensor& ids_TK, int64_t num_experts, int64_t align) {
    SortPlan plan;
    plan.T = ids_TK.size(0);
    plan.K = ids_TK.size(1);
    int64_t pairs = plan.T * plan.K;
    auto* id = data<int64_t>(ids_TK);
    plan.groups = {at::zeros({num_experts + 1}, at::kLong), align};
    auto* offset = mutable_data<int64_t>(plan.groups.offsets_E1);
    for (int64_t p = 0; p < pairs; ++p) {
        MOE_CHECK(id[p] >= -1 && id[p] < num_experts, shape, fmt::format("sort_by_expert: ids[{}][{}]", p / plan.K, p % plan.K), std::to_string(id[p]),
                  fmt::format("an expert in [0, {}), or -1 for a dropped pair", num_experts), "");
        if (id[p] >= 0) ++offset[id[p] + 1];
    }
    for (int64_t e = 0; e < num_experts; ++e) offset[e + 1] = offset[e] + (offset[e + 1] + align - 1) / align * align;
    plan.R = offset[num_experts];
    plan.position_TK = at::empty({plan.T, plan.K}, at::kInt);
    plan.token_R = at::full({plan.R}, -1, at::kInt);
    plan.choice_R = at::zeros({plan.R}, at::kInt);
    auto *position = mutable_data<int32_t>(plan.position_TK), *token = mutable_data<int32_t>(plan.token_R), *choice = mutable_data<int32_t>(plan.choice_R);
    std::vector<int64_t> next(offset, offset + num_experts);
    for (int64_t p = 0; p < pairs; ++p) {
        if (id[p] < 0) { position[p] = -1; continue; }
        int64_t row = next[id[p]]++;
        position[p] = int32_t(row);
        token[row] = int32_t(p / plan.K);
        choice[row] = int32_t(p % plan.K);
    }
    return plan;
}

void gather_rows_cpu(const Tensor& x_TD, const SortPlan& plan, Tensor y_RD, const QuantizedRows& copy) {
    int64_t D = x_TD.size(1);
    auto* token = data<int32_t>(plan.token_R);
    by_dtype("permute", x_TD, [&](auto zero) {
        using T = decltype(zero);
        auto* x = data<T>(x_TD);
        auto* y = mutable_data<T>(y_RD);
        at::parallel_for(0, plan.R, 64, [&](int64_t lo, int64_t hi) {
            for (int64_t r = lo; r < hi; ++r) {
                if (token[r] < 0) std::fill_n(y + r * D, D, T(0));
                else std::copy_n(x + token[r] * D, D, y + r * D);
            }
        });
    });
    fill_copy_cpu(y_RD, copy);
}

namespace {
template <class T> void add_row(const T* from, Acc<T>* to, int64_t D) {
    #pragma omp simd
    for (int64_t d = 0; d < D; ++d) to[d] += Acc<T>(from[d]);
}
}  // namespace

void add_rows_cpu(const Tensor& base_TD, const Tensor& more_TD, const Tensor& y_RD, const SortPlan& plan, Tensor out_TD) {
    int64_t D = y_RD.size(1), K = plan.K;
    auto* position = data<int32_t>(plan.position_TK);
    by_dtype("unpermute", y_RD, [&](auto zero) {
        using T = decltype(zero);
        auto *base = data<T>(base_TD), *more = data<T>(more_TD), *y = data<T>(y_RD);
        auto* out = mutable_data<T>(out_TD);
        at::parallel_for(0, plan.T, 64, [&](int64_t lo, int64_t hi) {
            std::vector<Acc<T>> row(std::is_same_v<T, Acc<T>> ? 0 : D);
            for (int64_t t = lo; t < hi; ++t) {
                Acc<T>* sum;
                if constexpr (std::is_same_v<T, Acc<T>>) sum = out + t * D;
                else sum = row.data();
                if (base) std::copy_n(base + t * D, D, sum);
                else std::fill_n(sum, D, Acc<T>(0));
                if (more) add_row(more + t * D, sum, D);
                for (int64_t k = 0; k < K; ++k)
                    if (int32_t r = position[t * K + k]; r >= 0) add_row(y + r * D, sum, D);
                if constexpr (!std::is_same_v<T, Acc<T>>) std::copy_n(row.data(), D, out + t * D);
            }
        });
    });
}

void gather_weights_cpu(const Tensor& weights_TK, const SortPlan& plan, Tensor rows_R) {
    auto* position = data<int32_t>(plan.position_TK);
    by_wide_dtype("permute", weights_TK, [&](auto zero) {
        using T = decltype(zero);
        auto* weights = data<T>(weights_TK);
        auto* rows = mutable_data<T>(rows_R);
        if (plan.groups.align > 1) std::fill_n(rows, plan.R, T(0));
        for (int64_t p = 0; p < plan.T * plan.K; ++p)
            if (position[p] >= 0) rows[position[p]] = weights[p];
    });
}

void scatter_weights_cpu(const Tensor& rows_R, const SortPlan& plan, Tensor weights_TK) {
    auto* position = data<int32_t>(plan.position_TK);
    by_wide_dtype("permute", rows_R, [&](auto zero) {
        using T = decltype(zero);
        auto* rows = data<T>(rows_R);
        auto* weights = mutable_data<T>(weights_TK);
        for (int64_t p = 0; p < plan.T * plan.K; ++p) weights[p] = position[p] >= 0 ? rows[position[p]] : T(0);
    });
}
}  // namespace moe::kernels
