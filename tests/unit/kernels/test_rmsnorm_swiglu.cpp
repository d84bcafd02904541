#include "core/kernels/norm/rmsnorm.h"
#include "core/kernels/swiglu/swiglu.h"
#include "tests/unit/kernels/reference.h"

using namespace moe;
using namespace moe::kernels;
using namespace moe::kernels::test;

namespace {
constexpr double kEps = 1e-6;
std::vector<double> plain_norm(const Tensor& x, const Tensor& gamma) {
    auto v = values(x), g = values(gamma);
    int64_t D = x.size(1);
    std::vector<double> y(v.size());
    for (int64_t t = 0; t < x.size(0); ++t) {
        double sum = 0;
        for (int64_t d = 0; d < D; ++d) sum += v[t * D + d] * v[t * D + d];
        for (int64_t d = 0; d < D; ++d) y[t * D + d] = v[t * D + d] / std::sqrt(sum / double(D) + kEps) * g[d];
    }
    return y;
}
std::vector<double> plain_swiglu(const Tensor& gate_up, const Tensor& weight) {
    auto v = values(gate_up);
    auto w = weight.defined() ? values(weight) : std::vector<double>(gate_up.size(0), 1.0);
    int64_t R = gate_up.size(0), F = gate_up.size(1) / 2;
    std::vector<double> y(R * F);
    for (int64_t r = 0; r < R; ++r)
        for (int64_t f = 0; f < F; ++f) {
            double g = v[r * 2 * F + f];
            y[r * F + f] = g / (1 + std::exp(-g)) * v[r * 2 * F + F + f] * w[r];
        }
    return y;
}
}  // namespace

TEST_CASE("rmsnorm: forward equals plain loops in every dtype", "[kernels][norm]") {
    auto [dtype, tolerance] = GENERATE(table<at::ScalarType, double>({{at::kDouble, 1e-14}, {at::kFloat, 1e-6}, {at::kBFloat16, 4e-3}, {at::kHalf, 6e-4}}));
    auto [T, D] = GENERATE(table<int64_t, int64_t>({{5, 13}, {1, 1}, {300, 64}, {0, 8}}));
    Tensor x = randn("x", {T, D}).to(dtype), gamma = randn("gamma", {D}).to(dtype);
    Tensor y = rmsnorm(x, weight(gamma, dtype), kEps);
    REQUIRE(y.scalar_type() == dtype);
    require_close(y, plain_norm(x, gamma), tolerance);
}

TEST_CASE("rmsnorm: gradients equal finite differences", "[kernels][norm]") {
    auto gamma = weight(randn("gamma", {7}));
    Tensor x = leaf(randn("x", {3, 7})), dy = randn("dy", {3, 7});
    auto dx = backward(rmsnorm(x, gamma, kEps), {x}, dy)[0];
    auto f = [&] { return sum_of_products(rmsnorm(x, gamma, kEps), dy); };
    require_close(dx, differences(x, f), 1e-8);
    require_close(gamma->grad, differences(gamma->value, f), 1e-8);
}

TEST_CASE("rmsnorm: narrow dtypes' gradients follow float64, main gradients are added to", "[kernels][norm]") {
    auto [dtype, tolerance] = GENERATE(table<at::ScalarType, double>({{at::kFloat, 1e-5}, {at::kBFloat16, 6e-3}, {at::kHalf, 1e-3}}));
    Tensor x0 = randn("x", {300, 40}).to(dtype), g0 = randn("gamma", {40}).to(dtype), dy = randn("dy", {300, 40}).to(dtype);
    auto reference = weight(g0), gamma = weight(g0, dtype);
    reference->grad.fill_(2);
    gamma->grad.fill_(2);
    Tensor xd = leaf(x0), x = leaf(x0, dtype);
    auto want = backward(rmsnorm(xd, reference, kEps), {xd}, dy)[0];
    require_close(backward(rmsnorm(x, gamma, kEps), {x}, dy)[0], want, tolerance);
    require_close(gamma->grad, reference->grad, 1e-5);
}

TEST_CASE("rmsnorm_and_input: x goes on as it is, and its gradient is the sum of both ways", "[kernels][norm]") {
    auto gamma = weight(randn("gamma", {7}));
    Tensor x = leaf(randn("x", {3, 7})), dy = randn("dy", {3, 7}), more = randn("more", {3, 7});
    auto [y, same] = rmsnorm_and_input(x, gamma, kEps);
    CHECK(bit_equal(y, rmsnorm(x, gamma, kEps)));
    CHECK(same.const_data_ptr() == x.const_data_ptr());
    auto dx = torch::autograd::grad({y, same}, {x}, {dy, more})[0];
    auto f = [&] {
        auto [a, b] = rmsnorm_and_input(x.detach(), gamma, kEps);
        return sum_of_products(a, dy) + sum_of_products(b, more);
    };
    require_close(dx, differences(x, f), 1e-8);
    require_close(gamma->grad, differences(gamma->value, f), 1e-8);

    auto alone = weight(gamma->value);
    auto [y2, same2] = rmsnorm_and_input(x, alone, kEps);
    CHECK(bit_equal(torch::autograd::grad({same2}, {x}, {more})[0], more));            // nothing comes through the norm
    CHECK(alone->grad.abs().sum().item<double>() == 0);
    auto [y3, same3] = rmsnorm_and_input(x, alone, kEps);
    CHECK(bit_equal(torch::autograd::grad({y3}, {x}, {dy})[0], backward(rmsnorm(x, gamma, kEps), {x}, dy)[0]));
}

TEST_CASE("rmsnorm_and_input: in narrow dtypes the sum of both gradients is rounded once", "[kernels][norm]") {
    auto [dtype, tolerance] = GENERATE(table<at::ScalarType, double>({{at::kFloat, 1e-5}, {at::kBFloat16, 3e-3}, {at::kHalf, 5e-4}}));
    Tensor x0 = randn("x", {300, 40}).to(dtype), g0 = randn("gamma", {40}).to(dtype), dy = randn("dy", {300, 40}).to(dtype), more = randn("more", {300, 40}).to(dtype);
    auto wide = weight(g0), gamma = weight(g0, dtype);
    Tensor xd = leaf(x0), x = leaf(x0, dtype);
    Tensor want = backward(rmsnorm(xd, wide, kEps), {xd}, dy)[0] + more;
    auto [y, same] = rmsnorm_and_input(x, gamma, kEps);
    require_close(torch::autograd::grad({y, same}, {x}, {dy, more})[0], want, tolerance);
}

TEST_CASE("rmsnorm: gamma's gradient does not depend on the number of threads", "[kernels][norm]") {
    Tensor x = leaf(randn("x", {517, 33}), at::kFloat), dy = randn("dy", {517, 33});
    auto one = weight(randn("gamma", {33}), at::kFloat), two = weight(randn("gamma", {33}), at::kFloat);
    with_threads(1, [&] { backward(rmsnorm(x, one, kEps), {x}, dy); });
    with_threads(2, [&] { backward(rmsnorm(x, two, kEps), {x}, dy); });
    CHECK(one->grad.abs().sum().item<double>() > 0);
    CHECK(bit_equal(one->grad, two->grad));
}

TEST_CASE("rmsnorm: a frozen gamma gets no gradient, x does", "[kernels][norm]") {
    auto gamma = weight(randn("gamma", {5}));
    gamma->grad = Tensor();
    Tensor x = leaf(randn("x", {2, 5}));
    CHECK(backward(rmsnorm(x, gamma, kEps), {x}, randn("dy", {2, 5}))[0].abs().sum().item<double>() > 0);
}

TEST_CASE("rmsnorm: wrong operands are named with their values", "[kernels][norm]") {
    require_error(ErrorKind::shape, "got [4], want [5]", [] { rmsnorm(randn("x", {2, 5}), weight(randn("g", {4})), kEps); });
    require_error(ErrorKind::dtype, "float64 and float32", [] { rmsnorm(randn("x", {2, 5}), weight(randn("g", {5}), at::kFloat), kEps); });
    require_error(ErrorKind::shape, "2 dims", [] { rmsnorm(randn("x", {5}), weight(randn("g", {5})), kEps); });
}

TEST_CASE("swiglu: forward equals plain loops, with and without row weights", "[kernels][swiglu]") {
    auto [dtype, tolerance] = GENERATE(table<at::ScalarType, double>({{at::kDouble, 1e-14}, {at::kFloat, 1e-6}, {at::kBFloat16, 4e-3}, {at::kHalf, 6e-4}}));
    auto [R, F] = GENERATE(table<int64_t, int64_t>({{5, 7}, {70, 33}, {42, 18}, {42, 36}, {3, 2}, {0, 4}, {1, 1}}));
    bool weighted = GENERATE(false, true);
    Tensor x = randn("x", {R, 2 * F}).mul(4).to(dtype), w;
    if (weighted) w = randn("w", {R}).to(dtype == at::kDouble ? at::kDouble : at::kFloat);
    Tensor y = swiglu(x, w);
    REQUIRE(y.scalar_type() == dtype);
    require_close(y, plain_swiglu(x, w), tolerance);
}

TEST_CASE("swiglu: large inputs stay finite", "[kernels][swiglu]") {
    Tensor x = at::full({2, 4}, 1000.0, at::kFloat);
    x.select(0, 1).fill_(-1000.0);
    Tensor y = swiglu(x);
    CHECK(y.isfinite().all().item<bool>());
    CHECK(y.select(0, 0).select(0, 0).item<float>() == Approx(1e6));
    CHECK(std::abs(y.select(0, 1).select(0, 0).item<float>()) < 1e-6);
}

TEST_CASE("swiglu: gradients equal finite differences", "[kernels][swiglu]") {
    Tensor x = leaf(randn("x", {4, 6})), w = leaf(randn("w", {4})), dy = randn("dy", {4, 3});
    auto g = backward(swiglu(x, w), {x, w}, dy);
    auto f = [&] { return sum_of_products(swiglu(x, w), dy); };
    require_close(g[0], differences(x, f), 1e-8);
    require_close(g[1], differences(w, f), 1e-8);
    auto alone = backward(swiglu(x), {x}, dy)[0];
    require_close(alone, differences(x, [&] { return sum_of_products(swiglu(x), dy); }), 1e-8);
}

TEST_CASE("swiglu: narrow dtypes' gradients follow float64", "[kernels][swiglu]") {
    auto [dtype, tolerance] = GENERATE(table<at::ScalarType, double>({{at::kFloat, 2e-6}, {at::kBFloat16, 6e-3}, {at::kHalf, 1e-3}}));
    Tensor x0 = randn("x", {37, 46}).to(dtype), w0 = randn("w", {37}).to(at::kFloat), dy = randn("dy", {37, 23}).to(dtype);
    Tensor xd = leaf(x0), wd = leaf(w0), x = leaf(x0, dtype), w = leaf(w0, at::kFloat);
    auto want = backward(swiglu(xd, wd), {xd, wd}, dy), got = backward(swiglu(x, w), {x, w}, dy);
    require_close(got[0], want[0], tolerance);
    require_close(got[1], want[1], 1e-5);
}

TEST_CASE("swiglu: gate_up's gradient takes gate_up's memory where nobody else has it", "[kernels]") {
    Tensor x = leaf(randn("x", {6, 20})), zeros = at::zeros_like(x), dy = randn("dy", {6, 10}), want = backward(swiglu(x), {x}, dy)[0];
    const void* memory = nullptr;
    auto made = [&] {
        Tensor gate_up = x + zeros;                                    // its gradient is x's
        memory = gate_up.const_data_ptr();
        return swiglu(gate_up);
    };
    Tensor alone = backward(made(), {x}, dy)[0];
    CHECK(alone.const_data_ptr() == memory);
    CHECK(bit_equal(alone, want));
    Tensor y = made();
    for (bool keep : {true, false}) {                                  // a graph that is run again still has its numbers
        Tensor dx = torch::autograd::grad({y}, {x}, {dy}, keep)[0];
        CHECK((dx.const_data_ptr() == memory) == !keep);
        CHECK(bit_equal(dx, want));
    }
    Tensor held = x + zeros, dx = backward(swiglu(held), {x}, dy)[0], of_a_view = backward(swiglu(held.view({6, 20})), {x}, dy)[0];
    CHECK(bit_equal(held, x));
    CHECK(bit_equal(dx, want));
    CHECK(bit_equal(of_a_view, want));
}

TEST_CASE("swiglu: wrong operands are named with their values", "[kernels][swiglu]") {
    require_error(ErrorKind::shape, "even last dim", [] { swiglu(randn("x", {2, 5})); });
    require_error(ErrorKind::shape, "got [3], want [2]", [] { swiglu(randn("x", {2, 4}), randn("w", {3})); });
    require_error(ErrorKind::dtype, "bfloat16", [] { swiglu(randn("x", {2, 4}), randn("w", {2}).to(at::kBFloat16)); });
}
