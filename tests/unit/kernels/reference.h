// What the op tests share: float64 operands, weights, comparison by relative L2 norm and maximum error.
#pragma once
#include "core/base/error.h"
#include "core/base/random.h"
#include "core/tensor/weight.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>
#include <functional>

// After LibTorch, which has a CHECK of its own: one that ends the process.
#include "tests/catch.h"

namespace moe::kernels::test {

/// Standard normal values, float64 on the host, different for every name.
inline Tensor randn(std::string_view name, at::IntArrayRef sizes) {
    Tensor x = at::empty(sizes, at::kDouble);
    normal(7, name, 0, x.numel(), x.mutable_data_ptr<double>());
    return x;
}
inline Tensor leaf(const Tensor& x, at::ScalarType dtype = at::kDouble) { return x.to(dtype, false, true).requires_grad_(true); }

inline WeightPtr weight(const Tensor& value, at::ScalarType dtype = at::kDouble) {
    auto w = c10::make_intrusive<Weight>();
    w->value = value.to(dtype);
    w->grad = at::zeros(value.sizes(), dtype == at::kDouble ? at::kDouble : at::kFloat);
    w->name = "w";
    return w;
}

/// Flat float64 values.
inline std::vector<double> values(const Tensor& x) {
    Tensor flat = x.detach().to(at::kDouble).contiguous();
    return {flat.const_data_ptr<double>(), flat.const_data_ptr<double>() + flat.numel()};
}

/// Finite, then relative L2 and maximum error (relative to the largest reference value) within the tolerance.
inline void require_close(const Tensor& got, const std::vector<double>& want, double tolerance) {
    auto x = values(got);
    REQUIRE(x.size() == want.size());
    double error = 0, norm = 0, worst = 0, largest = 0;
    for (size_t i = 0; i < x.size(); ++i) {
        REQUIRE(std::isfinite(x[i]));
        error += (x[i] - want[i]) * (x[i] - want[i]);
        norm += want[i] * want[i];
        worst = std::max(worst, std::abs(x[i] - want[i]));
        largest = std::max(largest, std::abs(want[i]));
    }
    CAPTURE(worst, largest);
    CHECK(std::sqrt(error) <= tolerance * std::sqrt(norm) + 1e-300);
    CHECK(worst <= 4 * tolerance * largest + 1e-300);
}
inline void require_close(const Tensor& got, const Tensor& want, double tolerance) {
    REQUIRE(got.sizes() == want.sizes());
    require_close(got, values(want), tolerance);
}
inline bool bit_equal(const Tensor& a, const Tensor& b) { return a.sizes() == b.sizes() && a.scalar_type() == b.scalar_type() && a.equal(b); }

/// Gradients of Σ out · upstream with respect to inputs; weights' go to their main gradients.
inline std::vector<Tensor> backward(const Tensor& out, const std::vector<Tensor>& inputs, const Tensor& upstream) {
    return torch::autograd::grad({out}, inputs, {upstream.to(out.scalar_type())});
}

/// Central differences of f with respect to every element of x (float64, changed in place and put back).
inline std::vector<double> differences(const Tensor& x, const std::function<double()>& f, double step = 1e-5) {
    at::NoGradGuard no_grad;
    std::vector<double> out(x.numel());
    double* p = x.detach().mutable_data_ptr<double>();
    for (int64_t i = 0; i < x.numel(); ++i) {
        double at_x = p[i];
        p[i] = at_x + step;
        double above = f();
        p[i] = at_x - step;
        double below = f();
        p[i] = at_x;
        out[i] = (above - below) / (2 * step);
    }
    return out;
}
inline double sum_of_products(const Tensor& a, const Tensor& b) { return a.detach().to(at::kDouble).mul(b.to(at::kDouble)).sum().item<double>(); }

/// Runs f with a number of threads, then puts the number back.
inline void with_threads(int n, const std::function<void()>& f) {
    int before = at::get_num_threads();
    at::set_num_threads(n);
    f();
    at::set_num_threads(before);
}

/// f throws moe::Error of this kind whose text contains `part`.
inline void require_error(ErrorKind kind, const std::string& part, const std::function<void()>& f) {
    try {
        f();
    } catch (const Error& e) {
        CHECK(to_string(e.kind()) == std::string(to_string(kind)));
        CAPTURE(e.what(), part);
        CHECK(std::string(e.what()).find(part) != std::string::npos);
        return;
    }
    FAIL("no error was thrown");
}
}  // namespace moe::kernels::test
