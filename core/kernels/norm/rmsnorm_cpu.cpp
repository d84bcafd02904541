#include "core/kernels/norm/rmsnorm_kernels.h"

#include "core/kernels/common/dtype.h"
#include "core/kernels/common/vector.h"
#include "core/kernels/quantize/quantize_kernels.h"

#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>

#include <cmath>
#include <vector>

namespace moe::kernels {
namespace {
/// Rows whose dgamma is added up together. A constant: sums must not depend on the number of threads.
constexpr int64_t kRowBlock = 128;

template <class T> Acc<T> rms_row(const T* x, const T* gamma, double eps, T* y, int64_t D) {
    using A = Acc<T>;
    A sum = 0;
    #pragma omp simd reduction(+:sum)
    for (int64_t d = 0; d < D; ++d) sum += A(x[d]) * A(x[d]);
    A r = A(1) / std::sqrt(sum / A(D) + A(eps));
    #pragma omp simd
    for (int64_t d = 0; d < D; ++d) y[d] = rounded<T>(A(x[d]) * r * A(gamma[d]));
    return r;
}

/// dx of one row: r · (dy·gamma − x · r² · mean(dy·gamma·x)), and `more` where kMore; adds to dgamma.
template <bool kMore, class T> void rms_gradient_row(const T* dy, const T* x, const T* gamma, Acc<T> r, const T* more, T* dx, Acc<T>* dgamma, int64_t D) {
    using A = Acc<T>;
    A dot = 0;
    #pragma omp simd reduction(+:dot)
    for (int64_t d = 0; d < D; ++d) dot += A(dy[d]) * A(gamma[d]) * A(x[d]);
    A c = dot * r * r * r / A(D);
    #pragma omp simd
    for (int64_t d = 0; d < D; ++d) {
        A g = A(dy[d]) * r, v = A(x[d]);
        A sum = g * A(gamma[d]) - v * c;
        if constexpr (kMore) sum += A(more[d]);
        dx[d] = rounded<T>(sum);
        dgamma[d] += g * v;
    }
}

/// dgamma += the blocks' parts [blocks, D], in the order of blocks; a bf16 gradient is rounded once, after the last.
template <class G, class P> void add_parts(const P* parts, int64_t blocks, int64_t D, G* dgamma) {
    std::vector<Acc<G>> sums(dgamma, dgamma + D);
    auto* sum = sums.data();
    for (int64_t b = 0; b < blocks; ++b) {
        #pragma omp simd
        for (int64_t d = 0; d < D; ++d) sum[d] = Acc<G>(sum[d] + parts[b * D + d]);
    }
    for (int64_t d = 0; d < D; ++d) dgamma[d] = G(sum[d]);
}
}  // namespace

void rmsnorm_forward_cpu(const Tensor& x_TD, const Tensor& gamma_D, double eps, Tensor y_TD, Tensor rstd_T, const QuantizedRows& copy) {
    int64_t T_ = x_TD.size(0), D = x_TD.size(1);
    by_dtype("rmsnorm", x_TD, [&](auto zero) {
        using T = decltype(zero);
        auto *x = data<T>(x_TD), *gamma = data<T>(gamma_D);
        auto* y = mutable_data<T>(y_TD);
        auto* rstd = mutable_data<Acc<T>>(rstd_T);
        at::parallel_for(0, T_, 64, [&](int64_t lo, int64_t hi) {
            for (int64_t t = lo; t < hi; ++t) rstd[t] = rms_row(x + t * D, gamma, eps, y + t * D, D);
        });
    });
    fill_copy_cpu(y_TD, copy);
}

void rmsnorm_backward_cpu(const Tensor& dy_TD, const Tensor& x_TD, const Tensor& gamma_D, const Tensor& rstd_T, const Tensor& more_TD, Tensor dx_TD, Tensor dgamma_D,
                          const QuantizedRows& copy) {
    int64_t T_ = x_TD.size(0), D = x_TD.size(1), blocks = (T_ + kRowBlock - 1) / kRowBlock;
    Tensor partial = at::zeros({blocks, D}, rstd_T.options());
    by_dtype("rmsnorm", x_TD, [&](auto zero) {
        using T = decltype(zero);
        auto *dy = data<T>(dy_TD), *x = data<T>(x_TD), *gamma = data<T>(gamma_D), *more = data<T>(more_TD);
        auto* rstd = data<Acc<T>>(rstd_T);
        auto* dx = mutable_data<T>(dx_TD);
        auto* sums = mutable_data<Acc<T>>(partial);
        at::parallel_for(0, blocks, 1, [&](int64_t lo, int64_t hi) {
            for (int64_t b = lo; b < hi; ++b)
                for (int64_t t = b * kRowBlock; t < std::min(T_, (b + 1) * kRowBlock); ++t) {
                    if (more) rms_gradient_row<true>(dy + t * D, x + t * D, gamma, rstd[t], more + t * D, dx + t * D, sums + b * D, D);
                    else rms_gradient_row<false>(dy + t * D, x + t * D, gamma, rstd[t], more, dx + t * D, sums + b * D, D);
                }
        });
    });
    fill_copy_cpu(dx_TD, copy);
    if (!dgamma_D.defined() || blocks == 0) return;
    by_main_dtype("rmsnorm", dgamma_D, [&](auto gradient) {
        by_wide_dtype("rmsnorm", partial, [&](auto part) { add_parts(data<decltype(part)>(partial), blocks, D, mutable_data<decltype(gradient)>(dgamma_D)); });
    });
}
}  // namespace moe::kernels
