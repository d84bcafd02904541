// Main gradients in bf16: every op adds its whole sum in at least fp32 and rounds once.
#include "core/kernels/embed/embed.h"
#include "core/kernels/head/head_loss.h"
#include "core/kernels/linear/linear.h"
#include "core/kernels/norm/rmsnorm.h"
#include "tests/unit/kernels/reference.h"

using namespace moe;
using namespace moe::kernels;
using namespace moe::kernels::test;

namespace {
using Run = std::function<void(const WeightPtr&)>;

/// `run` adds a gradient to a weight of `value`, once with a float64 main gradient and once with a bf16 one; both start at the
/// same numbers. The bf16 one must be the exact sum, rounded: to 2^-8 of itself, and a little for sums that cancel.
void check_rounded_once(const Tensor& value, at::ScalarType dtype, const Run& run) {
    auto exact = weight(value, dtype), rounded = weight(value, dtype);
    Tensor start = randn("start", value.sizes()).to(at::kBFloat16);
    exact->grad = start.to(at::kDouble);
    rounded->grad = start.clone();
    run(exact);
    run(rounded);
    REQUIRE(rounded->grad.scalar_type() == at::kBFloat16);
    auto want = values(exact->grad), got = values(rounded->grad), before = values(start);
    double moved = 0;
    for (size_t i = 0; i < want.size(); ++i) {
        CAPTURE(i, want[i], got[i], before[i]);
        CHECK(std::abs(got[i] - want[i]) <= std::ldexp(std::abs(want[i]), -8) * 1.01 + 1e-4);
        moved = std::max(moved, std::abs(got[i] - before[i]));
    }
    CHECK(moved > 0.01);
}
Tensor longs(const std::vector<int64_t>& v) {
    Tensor t = at::empty({int64_t(v.size())}, at::kLong);
    std::copy(v.begin(), v.end(), t.mutable_data_ptr<int64_t>());
    return t;
}
// In bf16 a sum of so many small terms would stop growing long before its end.
constexpr int64_t kMany = 1500;
Tensor small_terms(const char* name, at::IntArrayRef sizes) { return randn(name, sizes).abs().mul(0.01); }
}  // namespace

TEST_CASE("bf16 main gradients: linear, linear_wide and grouped_linear round their sums once", "[kernels][linear]") {
    auto dtype = GENERATE(at::kFloat, at::kBFloat16, at::kHalf);
    Tensor x0 = small_terms("x", {kMany, 7}).add(0.5), dy = small_terms("dy", {kMany, 5});
    check_rounded_once(randn("w", {5, 7}), dtype, [&](const WeightPtr& w) {
        Tensor x = leaf(x0, dtype);
        backward(linear(x, w), {x}, dy);
    });
    check_rounded_once(randn("w", {5, 7}), at::kFloat, [&](const WeightPtr& w) {
        Tensor x = leaf(x0, dtype);
        backward(linear_wide(x, w), {x}, dy);
    });
    check_rounded_once(randn("w", {3, 5, 7}), dtype, [&](const WeightPtr& w) {
        Tensor x = leaf(x0, dtype);
        backward(grouped_linear(x, longs({0, 900, 900, kMany}), w), {x}, dy);
    });
}

TEST_CASE("bf16 main gradients: rmsnorm, embed and head_loss round their sums once", "[kernels][norm][embed][head]") {
    auto dtype = GENERATE(at::kFloat, at::kBFloat16, at::kHalf);
    Tensor x0 = small_terms("x", {kMany, 7}).add(0.5), dy = small_terms("dy", {kMany, 7});
    check_rounded_once(randn("gamma", {7}), dtype, [&](const WeightPtr& gamma) {
        Tensor x = leaf(x0, dtype);
        backward(rmsnorm(x, gamma, 1e-6), {x}, dy);
    });
    std::vector<int64_t> ids(kMany, 2);
    for (size_t i = 0; i < ids.size(); i += 5) ids[i] = 4;
    check_rounded_once(randn("table", {6, 7}), dtype, [&](const WeightPtr& w) {
        Tensor anchor = leaf(at::zeros({1}, at::kDouble));
        torch::autograd::grad({embed(anchor, longs(ids), w)}, {anchor}, {dy.to(dtype)}, {}, false, true);
    });
    check_rounded_once(randn("head", {6, 7}), dtype, [&](const WeightPtr& w) {
        Tensor x = leaf(x0, dtype);
        HeadLossOptions options;
        options.scale = 0.01;
        options.chunk = 4096;
        backward(head_loss(x, w, longs(ids), options), {x}, at::ones({}, at::kDouble));
    });
}

TEST_CASE("bf16 main gradients: half is refused by name", "[kernels]") {
    auto w = weight(randn("w", {5, 7}), at::kHalf);
    w->grad = at::zeros({5, 7}, at::kHalf);
    require_error(ErrorKind::dtype, "w.grad: got float16", [&] { linear(randn("x", {2, 7}).to(at::kHalf), w); });
}
