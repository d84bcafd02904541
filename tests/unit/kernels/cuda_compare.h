// An op on CUDA in some dtype against the CPU implementation in float64 on the same numbers.
#pragma once
#include "core/tensor/check.h"
#include "core/tensor/weight.h"
#include "tests/catch.h"
#include "tests/gpu.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>

#include <functional>
#include <string>
#include <vector>

namespace moe::test {

/// Where a run takes place. Numbers are rounded to `rounded` before they get the run's dtype, so that both runs read the same.
struct Place {
    at::Device device = at::kCPU;
    at::ScalarType dtype = at::kDouble, rounded = at::kDouble;

    static at::ScalarType wide_of(at::ScalarType t) { return t == at::kDouble ? at::kDouble : at::kFloat; }
    Tensor numbers(at::IntArrayRef sizes, uint64_t seed, double scale, at::ScalarType round, at::ScalarType as) const {
        return at::randn(sizes, at::make_generator<at::CPUGeneratorImpl>(seed), at::TensorOptions().dtype(at::kDouble)).mul_(scale).to(round).to(as).to(device);
    }
    /// Normal numbers in the run's dtype.
    Tensor random(at::IntArrayRef sizes, uint64_t seed, double scale = 1) const { return numbers(sizes, seed, scale, rounded, dtype); }
    /// The same in fp64 for fp64, else fp32: routing weights, router weights.
    Tensor wide(at::IntArrayRef sizes, uint64_t seed, double scale = 1) const { return numbers(sizes, seed, scale, wide_of(rounded), wide_of(dtype)); }
    Tensor leaf(at::IntArrayRef sizes, uint64_t seed, double scale = 1) const { return random(sizes, seed, scale).set_requires_grad(true); }
    Tensor wide_leaf(at::IntArrayRef sizes, uint64_t seed, double scale = 1) const { return wide(sizes, seed, scale).set_requires_grad(true); }
    /// A weight whose main gradient is not zero at first, so that adding shows.
    WeightPtr weight(Tensor value) const {
        auto w = c10::make_intrusive<Weight>();
        w->value = std::move(value);
        w->grad = at::full(w->value.sizes(), 0.25, w->value.options().dtype(wide_of(dtype)));
        w->name = "w";
        return w;
    }
    WeightPtr weight(at::IntArrayRef sizes, uint64_t seed, double scale = 1) const { return weight(random(sizes, seed, scale)); }
};

struct Result { std::string name; Tensor value; };
using Op = std::function<std::vector<Result>(const Place&)>;

/// Prints the relative L2 and the maximum error and checks the first, after nan and inf.
inline void check_close(const std::string& what, const Tensor& got, const Tensor& want, double tolerance) {
    INFO(what);
    REQUIRE(got.defined() == want.defined());
    if (!got.defined()) return;
    REQUIRE(got.sizes() == want.sizes());
    if (want.numel() == 0) return;
    Tensor a = got.detach().to(at::kCPU, at::kDouble), b = want.detach().to(at::kDouble);
    REQUIRE(a.isfinite().all().item<bool>());
    const double norm = b.norm().item<double>(), error = (a - b).norm().item<double>() / (norm > 1e-12 ? norm : 1), most = (a - b).abs().max().item<double>();
    std::printf("  %-48s rel %.2e max %.2e (norm %.3g) limit %.0e\n", what.c_str(), error, most, norm, tolerance);
    CHECK(error <= tolerance);
}

inline const char* short_name(at::ScalarType t) { return t == at::kDouble ? "fp64" : t == at::kFloat ? "fp32" : t == at::kHalf ? "fp16" : "bf16"; }

/// Runs the op on CUDA in fp64, fp32, bf16 and fp16 against fp64 on the CPU.
inline void compare(const std::string& what, const Op& op, double bf16_tolerance = 1e-2, std::vector<at::ScalarType> dtypes = {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf}) {
    for (auto dtype : dtypes) {
        auto want = op({at::kCPU, at::kDouble, dtype}), got = op({at::Device(at::kCUDA, 0), dtype, dtype});
        const double tolerance = dtype == at::kDouble ? 1e-12 : dtype == at::kFloat ? 1e-5 : bf16_tolerance;
        REQUIRE(got.size() == want.size());
        for (size_t i = 0; i < got.size(); ++i) check_close(what + " " + short_name(dtype) + " " + got[i].name, got[i].value, want[i].value, tolerance);
    }
}

inline Tensor on(const Place& p, const Tensor& t) { return t.to(p.device); }
inline Tensor longs(std::vector<int64_t> values) { return at::tensor(values, at::kLong); }
}  // namespace moe::test
