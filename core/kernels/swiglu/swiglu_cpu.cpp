#include "core/kernels/swiglu/swiglu_kernels.h"

#include "core/kernels/common/dtype.h"
#include "core/kernels/common/vector.h"
#include "core/kernels/quantize/quantize_kernels.h"

#include <ATen/Parallel.h>

namespace moe::kernels {
namespace {
template <class T> void swiglu_row(const T* gate, const T* up, Acc<T> scale, T* y, int64_t F) {
    using A = Acc<T>;
    #pragma omp simd
    for (int64_t f = 0; f < F; ++f) {
        A g = A(gate[f]);
        y[f] = rounded<T>(scale * A(up[f]) * g / (1 + vexp(-g)));
    }
}

/// Returns the gradient of the row's weight.
template <class T> Acc<T> swiglu_gradient_row(const T* dy, const T* gate, const T* up, Acc<T> scale, T* dgate, T* dup, int64_t F) {
    using A = Acc<T>;
    A sum = 0;
    #pragma omp simd reduction(+:sum)
    for (int64_t f = 0; f < F; ++f) {
        A g = A(gate[f]), u = A(up[f]), d = A(dy[f]), sigmoid = 1 / (1 + vexp(-g)), act = g * sigmoid;
        sum += d * act * u;
        dup[f] = rounded<T>(scale * d * act);
        dgate[f] = rounded<T>(scale * d * u * sigmoid * (1 + g * (1 - sigmoid)));
    }
    return sum;
}

/// A routing weight as the loop wants it, whatever its dtype.
template <class A> A weight_at(const Tensor& row_weight, int64_t r) {
    if (!row_weight.defined()) return A(1);
    return row_weight.scalar_type() == at::kDouble ? A(row_weight.const_data_ptr<double>()[r]) : A(row_weight.const_data_ptr<float>()[r]);
}
}  // namespace

void swiglu_forward_cpu(const Tensor& gate_up_R2F, const Tensor& row_weight_R, Tensor y_RF, const QuantizedRows& copy) {
    int64_t R = y_RF.size(0), F = y_RF.size(1);
    by_dtype("swiglu", gate_up_R2F, [&](auto zero) {
        using T = decltype(zero);
        auto* gate = data<T>(gate_up_R2F);
        auto* y = mutable_data<T>(y_RF);
        at::parallel_for(0, R, 32, [&](int64_t lo, int64_t hi) {
            for (int64_t r = lo; r < hi; ++r) swiglu_row(gate + r * 2 * F, gate + r * 2 * F + F, weight_at<Acc<T>>(row_weight_R, r), y + r * F, F);
        });
    });
    fill_copy_cpu(y_RF, copy);
}

void swiglu_backward_cpu(const Tensor& dy_RF, const Tensor& gate_up_R2F, const Tensor& row_weight_R, Tensor dgate_up_R2F, Tensor drow_weight_R, const QuantizedRows& copy) {
    int64_t R = dy_RF.size(0), F = dy_RF.size(1);
    by_dtype("swiglu", gate_up_R2F, [&](auto zero) {
        using T = decltype(zero);
        auto *gate = data<T>(gate_up_R2F), *dy = data<T>(dy_RF);
        auto* dgate = mutable_data<T>(dgate_up_R2F);
        bool in_double = drow_weight_R.defined() && drow_weight_R.scalar_type() == at::kDouble;
        at::parallel_for(0, R, 32, [&](int64_t lo, int64_t hi) {
            for (int64_t r = lo; r < hi; ++r) {
                int64_t g = r * 2 * F;
                auto dw = swiglu_gradient_row(dy + r * F, gate + g, gate + g + F, weight_at<Acc<T>>(row_weight_R, r), dgate + g, dgate + g + F, F);
                if (!drow_weight_R.defined()) continue;
                if (in_double) drow_weight_R.mutable_data_ptr<double>()[r] = double(dw);
                else drow_weight_R.mutable_data_ptr<float>()[r] = float(dw);
            }
        });
    });
    fill_copy_cpu(dgate_up_R2F, copy);
}
}  // namespace moe::kernels
