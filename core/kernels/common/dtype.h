// One template over the dtypes of a loop. A function, not ATen's macro: a pragma inside a macro's argument (omp simd) is moved
// or refused by GCC.
#pragma once
#include "core/tensor/check.h"

namespace moe::kernels {
/// What a loop over T adds up in: float for bf16 and fp16.
template <class T> struct AccumulatorOf { using type = T; };
template <> struct AccumulatorOf<at::BFloat16> { using type = float; };
template <> struct AccumulatorOf<at::Half> { using type = float; };
template <class T> using Acc = typename AccumulatorOf<T>::type;

/// dtype of statistics kept beside a tensor: fp64 for fp64, else fp32.
inline at::ScalarType wide_dtype(const at::Tensor& t) { return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

/// f(double{}), f(float{}), f(at::BFloat16{}) or f(at::Half{}). Throws moe::Error (dtype) otherwise.
template <class F> void by_dtype(std::string_view op, const at::Tensor& t, F f) {
    if (t.scalar_type() == at::kFloat) return f(float{});
    if (t.scalar_type() == at::kDouble) return f(double{});
    if (t.scalar_type() == at::kHalf) return f(at::Half{});
    check_float(op, {"tensor", t});
    f(at::BFloat16{});
}
/// f(double{}), f(float{}) or f(at::BFloat16{}): main gradients and moments. Throws moe::Error (dtype) otherwise.
template <class F> void by_main_dtype(std::string_view op, const at::Tensor& t, F f) {
    if (t.scalar_type() == at::kFloat) return f(float{});
    if (t.scalar_type() == at::kDouble) return f(double{});
    check_main_float(op, {"tensor", t});
    f(at::BFloat16{});
}
/// f(double{}) or f(float{}). Throws moe::Error (dtype) otherwise.
template <class F> void by_wide_dtype(std::string_view op, const at::Tensor& t, F f) {
    if (t.scalar_type() == at::kFloat) return f(float{});
    check_wide_float(op, {"tensor", t});
    f(double{});
}

/// Data pointers; nullptr for an undefined tensor.
template <class T> const T* data(const at::Tensor& t) { return t.defined() ? t.const_data_ptr<T>() : nullptr; }
template <class T> T* mutable_data(const at::Tensor& t) { return t.defined() ? t.mutable_data_ptr<T>() : nullptr; }
}  // namespace moe::kernels
