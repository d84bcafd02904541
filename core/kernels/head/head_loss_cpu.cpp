#include "core/kernels/head/head_loss_kernels.h"

#include "core/kernels/common/dtype.h"
#include "core/kernels/common/vector.h"
#include "core/kernels/head/head_loss.h"

#include <ATen/Parallel.h>

#include <cmath>
#include <vector>

namespace moe::kernels {
namespace {
/// Where dlogits are wanted in logits' dtype the exponentials are kept in place and scaled; a bf16 or fp16 copy takes them from there.
template <class T> T exp_sum(const T* x, T top, T* e, int64_t V) {
    T sum = 0;
    if (e) {
        #pragma omp simd reduction(+:sum)
        for (int64_t v = 0; v < V; ++v) {
            T value = vexp(x[v] - top);
            sum += value;
            e[v] = value;
        }
    } else {
        #pragma omp simd reduction(+:sum)
        for (int64_t v = 0; v < V; ++v) sum += vexp(x[v] - top);
    }
    return sum;
}

/// Loss of one row; `e` (may be x itself) becomes the gradient where it is given.
template <class T> double row_loss(const T* x, int64_t target, T scale, T* e, int64_t V) {
    T top = largest(x, V), picked = x[target];
    T sum = exp_sum(x, top, e, V);
    if (e) {
        T k = scale / sum;
        #pragma omp simd
        for (int64_t v = 0; v < V; ++v) e[v] *= k;
        e[target] -= scale;
    }
    return std::log(double(sum)) + double(top) - double(picked);
}
}  // namespace

void cross_entropy_cpu(const Tensor& logits_NV, const Tensor& targets_N, const Factor& scale, Tensor loss_N, Tensor dlogits_NV) {
    int64_t N = logits_NV.size(0), V = logits_NV.size(1);
    auto* target = data<int64_t>(targets_N);
    auto* loss = mutable_data<double>(loss_N);
    by_wide_dtype("head_loss", logits_NV, [&](auto zero) {
        using T = decltype(zero);
        auto* logits = data<T>(logits_NV);
        bool narrow = dlogits_NV.defined() && at::isReducedFloatingType(dlogits_NV.scalar_type());
        T* wide_out = narrow ? nullptr : mutable_data<T>(dlogits_NV);
        at::parallel_for(0, N, 16, [&](int64_t lo, int64_t hi) {
            std::vector<T> row(narrow ? V : 0);
            for (int64_t n = lo; n < hi; ++n) {
                T* e = narrow ? row.data() : wide_out ? wide_out + n * V : nullptr;
                if (target[n] == kIgnore) {
                    loss[n] = 0;
                    if (e) std::fill_n(e, V, T(0));
                } else {
                    loss[n] = row_loss(logits + n * V, target[n], T(scale.value()), e, V);
                }
                if (narrow) by_dtype("head_loss", dlogits_NV, [&](auto zero_out) {
                    auto* out = mutable_data<decltype(zero_out)>(dlogits_NV) + n * V;
                    for (int64_t v = 0; v < V; ++v) out[v] = rounded<decltype(zero_out)>(row[size_t(v)]);
                });
            }
        });
    });
}

bool overwrites_rows_cpu(at::ScalarType, int64_t) { return false; }
}  // namespace moe::kernels
