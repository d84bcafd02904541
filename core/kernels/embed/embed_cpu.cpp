#include "core/kernels/embed/embed_kernels.h"

#include "core/kernels/common/dtype.h"

#include <ATen/Parallel.h>
#include <ATen/ops/_unique2.h>
#include <ATen/ops/index_copy.h>
#include <ATen/ops/index_select.h>

namespace moe::kernels {
void embed_forward_cpu(const Tensor& ids_T, const Tensor& w_VD, Tensor y_TD) {
    int64_t T_ = ids_T.numel(), V = w_VD.size(0), D = w_VD.size(1);
    const int64_t* id = data<int64_t>(ids_T);
    for (int64_t t = 0; t < T_; ++t)
        MOE_CHECK(id[t] >= 0 && id[t] < V, data, fmt::format("embed: ids[{}]", t), std::to_string(id[t]), fmt::format("an id in [0, {})", V), "the tokenizer's vocabulary may be larger than model.vocab_size");
    by_dtype("embed", w_VD, [&](auto zero) {
        using T = decltype(zero);
        auto* w = data<T>(w_VD);
        auto* y = mutable_data<T>(y_TD);
        at::parallel_for(0, T_, 64, [&](int64_t lo, int64_t hi) {
            for (int64_t t = lo; t < hi; ++t) std::copy_n(w + id[t] * D, D, y + t * D);
        });
    });
}

namespace {
/// dw in bf16: the rows that occur are added up in fp32 beside it and rounded once.
void add_rounded_grad(const Tensor& dy_TD, const Tensor& ids_T, Tensor dw_VD) {
    if (ids_T.numel() == 0) return;
    auto [seen_U, place_T, counts] = at::_unique2(ids_T.reshape({-1}), /*sorted=*/true, /*return_inverse=*/true, /*return_counts=*/false);
    Tensor sums_UD = dw_VD.index_select(0, seen_U).to(at::kFloat);
    embed_add_grad_cpu(dy_TD, place_T.contiguous(), sums_UD, false);
    dw_VD.index_copy_(0, seen_U, sums_UD.to(dw_VD.scalar_type()));
}
}  // namespace

Tensor embed_add_grad_cpu(const Tensor& dy_TD, const Tensor& ids_T, Tensor dw_VD, bool /*from_zero*/) {
    if (dw_VD.scalar_type() == at::kBFloat16) {
        add_rounded_grad(dy_TD, ids_T, dw_VD);
        return {};
    }
    int64_t T_ = ids_T.numel(), D = dw_VD.size(1);
    const int64_t* id = data<int64_t>(ids_T);
    by_dtype("embed", dy_TD, [&](auto zero) {
        using T = decltype(zero);
        auto* dy = data<T>(dy_TD);
        by_wide_dtype("embed", dw_VD, [&](auto wide_zero) {
            using W = decltype(wide_zero);
            auto* dw = mutable_data<W>(dw_VD);
            // Threads own columns, so that a row's sum is in token order whatever their number.
            at::parallel_for(0, D, 64, [&](int64_t lo, int64_t hi) {
                for (int64_t t = 0; t < T_; ++t) {
                    W* to = dw + id[t] * D;
                    const T* from = dy + t * D;
                    #pragma omp simd
                    for (int64_t d = lo; d < hi; ++d) to[d] += W(from[d]);
                }
            });
        });
    });
    return {};
}
}  // namespace moe::kernels
