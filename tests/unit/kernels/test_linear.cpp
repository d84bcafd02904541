#include "core/kernels/linear/linear.h"
#include "core/kernels/linear/linear_kernels.h"
#include "tests/unit/kernels/reference.h"

#include <array>
#include <dlfcn.h>

extern "C" int mkl_serv_intel_cpu_true();

using namespace moe;
using namespace moe::kernels;
using namespace moe::kernels::test;

namespace {
/// y = x wᵀ by plain loops; rows lo … hi of x.
void plain_product(const std::vector<double>& x, const double* w, int64_t lo, int64_t hi, int64_t I, int64_t O, std::vector<double>& y) {
    for (int64_t t = lo; t < hi; ++t)
        for (int64_t o = 0; o < O; ++o) {
            double sum = 0;
            for (int64_t i = 0; i < I; ++i) sum += x[t * I + i] * w[o * I + i];
            y[t * O + o] = sum;
        }
}
struct Gradients { std::vector<double> dx, dw; };
/// By plain loops, for groups of rows; one group is a plain product.
Gradients plain_gradients(const Tensor& x, const Tensor& w_EOI, const Tensor& dy, const std::vector<int64_t>& offsets) {
    auto xv = values(x), wv = values(w_EOI), d = values(dy);
    int64_t O = w_EOI.size(1), I = w_EOI.size(2);
    Gradients g{std::vector<double>(xv.size()), std::vector<double>(wv.size())};
    for (size_t e = 0; e + 1 < offsets.size(); ++e)
        for (int64_t t = offsets[e]; t < offsets[e + 1]; ++t)
            for (int64_t o = 0; o < O; ++o)
                for (int64_t i = 0; i < I; ++i) {
                    g.dx[t * I + i] += d[t * O + o] * wv[(int64_t(e) * O + o) * I + i];
                    g.dw[(int64_t(e) * O + o) * I + i] += d[t * O + o] * xv[t * I + i];
                }
    return g;
}
Tensor offsets_tensor(const std::vector<int64_t>& v) {
    Tensor t = at::empty({int64_t(v.size())}, at::kLong);
    std::copy(v.begin(), v.end(), t.mutable_data_ptr<int64_t>());
    return t;
}
constexpr int64_t T = 7, I = 13, O = 9;
}  // namespace

TEST_CASE("linear: forward and gradients equal plain loops in every dtype", "[kernels][linear]") {
    auto [dtype, tolerance] = GENERATE(table<at::ScalarType, double>({{at::kDouble, 1e-14}, {at::kFloat, 1e-6}, {at::kBFloat16, 4e-3}, {at::kHalf, 6e-4}}));
    Tensor x0 = randn("x", {T, I}).to(dtype), w0 = randn("w", {O, I}).to(dtype), dy = randn("dy", {T, O}).to(dtype);
    auto w = weight(w0, dtype);
    Tensor x = leaf(x0, dtype), y = linear(x, w);
    REQUIRE(y.scalar_type() == dtype);
    std::vector<double> want(T * O);
    plain_product(values(x0), values(w0).data(), 0, T, I, O, want);
    require_close(y, want, tolerance);
    w->grad.fill_(1);                                     // main gradients are added to
    auto dx = backward(y, {x}, dy)[0];
    auto ref = plain_gradients(x0, w0.unsqueeze(0), dy, {0, T});
    for (double& v : ref.dw) v += 1;
    require_close(dx, ref.dx, tolerance);
    require_close(w->grad, ref.dw, 1e-6);                 // never rounded to bf16
}

TEST_CASE("linear: gradients equal finite differences", "[kernels][linear]") {
    auto w = weight(randn("w", {3, 4}));
    Tensor x = leaf(randn("x", {2, 4})), dy = randn("dy", {2, 3});
    auto dx = backward(linear(x, w), {x}, dy)[0];
    auto f = [&] { return sum_of_products(linear(x, w), dy); };
    require_close(dx, differences(x, f), 1e-8);
    require_close(w->grad, differences(w->value, f), 1e-8);
}

TEST_CASE("linear: no rows and non-contiguous rows work", "[kernels][linear]") {
    auto w = weight(randn("w", {O, I}));
    Tensor none = leaf(at::zeros({0, I}, at::kDouble)), y = linear(none, w);
    CHECK(y.sizes() == at::IntArrayRef({0, O}));
    CHECK(backward(y, {none}, at::zeros({0, O}, at::kDouble))[0].sizes() == at::IntArrayRef({0, I}));
    CHECK(w->grad.abs().sum().item<double>() == 0);
    Tensor wide = randn("x", {T, 2 * I});
    CHECK(bit_equal(linear(wide.narrow(1, 3, I), w), linear(wide.narrow(1, 3, I).contiguous(), w)));
}

TEST_CASE("linear: a deferred weight gradient equals an immediate one, and a frozen weight gets none", "[kernels][linear]") {
    GradSink sink;
    auto now = weight(randn("w", {O, I})), later = weight(randn("w", {O, I})), frozen = weight(randn("w", {O, I}));
    later->sink = &sink;
    frozen->grad = Tensor();
    frozen->sink = &sink;
    Tensor x = leaf(randn("x", {T, I})), dy = randn("dy", {T, O});
    sink.defer(3, 1);
    backward(linear(x, now), {x}, dy);
    backward(linear(x, later), {x}, dy);
    backward(linear(x, frozen), {x}, dy);
    CHECK(sink.num_queued() == 1);
    CHECK(later->grad.abs().sum().item<double>() == 0);
    sink.drain(3, 1);
    CHECK(sink.num_queued() == 0);
    CHECK(bit_equal(now->grad, later->grad));
}

TEST_CASE("linears: every product is linear's, dx is the sum over weights", "[kernels][linear]") {
    auto [dtype, tolerance] = GENERATE(table<at::ScalarType, double>({{at::kDouble, 1e-14}, {at::kFloat, 1e-6}, {at::kBFloat16, 8e-3}, {at::kHalf, 1e-3}}));
    const int64_t outs[] = {O, 4, 1};
    Tensor x0 = randn("x", {T, I}).to(dtype), x = leaf(x0, dtype);
    std::vector<WeightPtr> weights;
    std::vector<Tensor> dys;
    std::vector<double> want_dx(T * I);
    std::vector<std::vector<double>> want_dw;
    for (int64_t out : outs) {
        std::string name = "w" + std::to_string(out);
        Tensor w0 = randn(name, {out, I}).to(dtype);
        weights.push_back(weight(w0, dtype));
        dys.push_back(randn("dy" + name, {T, out}).to(dtype));
        auto ref = plain_gradients(x0, w0.unsqueeze(0), dys.back(), {0, T});
        for (size_t i = 0; i < want_dx.size(); ++i) want_dx[i] += ref.dx[i];
        want_dw.push_back(ref.dw);
    }
    auto ys = linears(x, weights);
    for (size_t k = 0; k < 3; ++k) CHECK(bit_equal(ys[k].detach(), linear(x0, weights[k])));
    require_close(torch::autograd::grad(ys, {x}, dys)[0], want_dx, tolerance);
    for (size_t k = 0; k < 3; ++k) require_close(weights[k]->grad, want_dw[k], 1e-6);
    auto only = torch::autograd::grad({linears(x, weights)[1]}, {x}, {dys[1]})[0];     // the others get no gradient
    CHECK(bit_equal(only, backward(linear(x, weights[1]), {x}, dys[1])[0]));
    require_close(weights[0]->grad, want_dw[0], 1e-6);
}

TEST_CASE("linears: weight gradients may be deferred, a frozen weight gets none, wrong operands are named", "[kernels][linear]") {
    GradSink sink;
    auto now = weight(randn("w", {O, I})), later = weight(randn("w", {O, I})), frozen = weight(randn("f", {3, I}));
    later->sink = &sink;
    frozen->grad = Tensor();
    Tensor x = leaf(randn("x", {T, I})), dy = randn("dy", {T, O}), df = randn("df", {T, 3});
    sink.defer(3, 1);
    torch::autograd::grad(linears(x, {now, frozen}), {x}, {dy, df});
    torch::autograd::grad(linears(x, {later, frozen}), {x}, {dy, df});
    CHECK(sink.num_queued() == 1);
    sink.drain(3, 1);
    CHECK(bit_equal(now->grad, later->grad));
    require_error(ErrorKind::shape, "linears", [&] { linears(x, {now, weight(randn("w", {2, I + 1}))}); });
    require_error(ErrorKind::dtype, "linears", [&] { linears(x, {now, weight(randn("w", {2, I}), at::kFloat)}); });
}

TEST_CASE("linear_wide: bf16 rows through an fp32 weight give fp32 results", "[kernels][linear]") {
    Tensor x0 = randn("x", {T, I}).to(at::kBFloat16), w0 = randn("w", {O, I}).to(at::kFloat), dy = randn("dy", {T, O}).to(at::kFloat);
    auto w = weight(w0, at::kFloat);
    Tensor x = leaf(x0, at::kBFloat16), y = linear_wide(x, w);
    REQUIRE(y.scalar_type() == at::kFloat);
    std::vector<double> want(T * O);
    plain_product(values(x0), values(w0).data(), 0, T, I, O, want);
    require_close(y, want, 1e-6);
    auto dx = backward(y, {x}, dy)[0];
    REQUIRE(dx.scalar_type() == at::kBFloat16);
    auto ref = plain_gradients(x0, w0.unsqueeze(0), dy, {0, T});
    require_close(dx, ref.dx, 4e-3);
    require_close(w->grad, ref.dw, 1e-6);
}

TEST_CASE("linear_fp64: products of narrow operands are float64's, the weight's gradient is rounded once", "[kernels][linear]") {
    auto [x_dtype, w_dtype, grad_tolerance] = GENERATE(table<at::ScalarType, at::ScalarType, double>({{at::kDouble, at::kDouble, 1e-14}, {at::kFloat, at::kFloat, 1e-7}, {at::kBFloat16, at::kFloat, 1e-7}}));
    Tensor x0 = randn("x", {T, I}).to(x_dtype), w0 = randn("w", {O, I}).to(w_dtype), dy = randn("dy", {T, O});
    auto w = weight(w0, w_dtype);
    Tensor x = leaf(x0, x_dtype), y = linear_fp64(x, w);
    REQUIRE(y.scalar_type() == at::kDouble);
    std::vector<double> want(T * O);
    plain_product(values(x0), values(w0).data(), 0, T, I, O, want);
    require_close(y, want, 1e-14);
    CHECK(bit_equal(linear_fp64(x0, w), y.detach()));
    w->grad.fill_(1);
    auto dx = backward(y, {x}, dy)[0];
    REQUIRE(dx.scalar_type() == x_dtype);
    auto ref = plain_gradients(x0, w0.unsqueeze(0), dy, {0, T});
    for (double& v : ref.dw) v += 1;
    require_close(dx, ref.dx, x_dtype == at::kDouble ? 1e-14 : x_dtype == at::kFloat ? 1e-7 : 4e-3);
    require_close(w->grad, ref.dw, grad_tolerance);
}

TEST_CASE("linear_fp64: a sum that fp32 loses is kept, deferred gradients are the same, no rows and frozen weights work", "[kernels][linear]") {
    Tensor big = at::full({1, 3}, 1.0, at::kFloat);
    auto wide = weight(at::zeros({1, 3}, at::kFloat), at::kFloat);
    for (int i = 0; i < 3; ++i) wide->value.mutable_data_ptr<float>()[i] = i == 1 ? 1.0f : i == 0 ? 1e9f : -1e9f;
    CHECK(linear_fp64(big, wide).item<double>() == 1);
    GradSink sink;
    auto now = weight(randn("w", {O, I}), at::kFloat), later = weight(randn("w", {O, I}), at::kFloat), frozen = weight(randn("w", {O, I}), at::kFloat);
    later->sink = &sink;
    frozen->grad = Tensor();
    Tensor x = leaf(randn("x", {T, I}), at::kFloat), dy = randn("dy", {T, O});
    sink.defer(0, 0);
    backward(linear_fp64(x, now), {x}, dy);
    backward(linear_fp64(x, later), {x}, dy);
    backward(linear_fp64(x, frozen), {x}, dy);
    CHECK(later->grad.abs().sum().item<double>() == 0);
    sink.drain(0, 0);
    CHECK(bit_equal(now->grad, later->grad));
    Tensor none = leaf(at::zeros({0, I}, at::kFloat), at::kFloat), y = linear_fp64(none, now);
    CHECK(y.sizes() == at::IntArrayRef({0, O}));
    CHECK(backward(y, {none}, at::zeros({0, O}, at::kDouble))[0].sizes() == at::IntArrayRef({0, I}));
    require_error(ErrorKind::shape, "got [4, 8] x [9, 13]", [&] { linear_fp64(at::zeros({4, 8}, at::kFloat), now); });
}

TEST_CASE("grouped_linear: forward and gradients equal plain loops, experts without rows included", "[kernels][linear]") {
    auto [dtype, tolerance] = GENERATE(table<at::ScalarType, double>({{at::kDouble, 1e-14}, {at::kFloat, 1e-6}, {at::kBFloat16, 4e-3}, {at::kHalf, 6e-4}}));
    std::vector<int64_t> offsets = GENERATE(std::vector<int64_t>{0, 0, 3, 3, 11}, std::vector<int64_t>{0, 11, 11, 11, 11}, std::vector<int64_t>{0, 0, 0, 0, 0});
    int64_t R = offsets.back(), E = 4;
    Tensor x0 = randn("x", {R, I}).to(dtype), w0 = randn("w", {E, O, I}).to(dtype), dy = randn("dy", {R, O}).to(dtype);
    auto w = weight(w0, dtype);
    Tensor x = leaf(x0, dtype), y = grouped_linear(x, offsets_tensor(offsets), w);
    std::vector<double> want(R * O);
    auto wv = values(w0);
    for (int64_t e = 0; e < E; ++e) plain_product(values(x0), wv.data() + e * O * I, offsets[e], offsets[e + 1], I, O, want);
    require_close(y, want, tolerance);
    auto dx = backward(y, {x}, dy)[0];
    auto ref = plain_gradients(x0, w0, dy, offsets);
    require_close(dx, ref.dx, tolerance);
    require_close(w->grad, ref.dw, 1e-6);
}

TEST_CASE("linear, grouped_linear: a bf16 result is the whole sum rounded once to nearest", "[kernels][linear]") {
    auto integers = [](const char* name, at::IntArrayRef shape) { return (32 * randn(name, shape)).round().to(at::kBFloat16); };    // their products and sums are exact in fp32
    Tensor x = integers("x", {T, I}), w = integers("w", {2, O, I}), dy = integers("dy", {T, O}), offsets = offsets_tensor({0, 3, T});
    auto rounded = [](const Tensor& a, const Tensor& b) { return at::mm(a.to(at::kDouble), b.to(at::kDouble)).to(at::kBFloat16); };
    Tensor want = at::cat({rounded(x.narrow(0, 0, 3), w[0].t()), rounded(x.narrow(0, 3, T - 3), w[1].t())}), want_dx = at::cat({rounded(dy.narrow(0, 0, 3), w[0]), rounded(dy.narrow(0, 3, T - 3), w[1])});
    REQUIRE_FALSE(bit_equal(want.to(at::kDouble), at::cat({at::mm(x.narrow(0, 0, 3).to(at::kDouble), w[0].t().to(at::kDouble)), at::mm(x.narrow(0, 3, T - 3).to(at::kDouble), w[1].t().to(at::kDouble))})));
    Tensor rows = leaf(x, at::kBFloat16), y = grouped_linear(rows, offsets, weight(w, at::kBFloat16));
    CHECK(bit_equal(y.detach(), want));
    CHECK(bit_equal(backward(y, {rows}, dy)[0], want_dx));
    CHECK(bit_equal(linear(x, weight(w[0].contiguous(), at::kBFloat16)).detach(), rounded(x, w[0].t())));
}

TEST_CASE("grouped_linear: groups shared out over threads give what one thread gives", "[kernels][linear]") {
    auto dtype = GENERATE(at::kDouble, at::kFloat, at::kBFloat16, at::kHalf);
    std::vector<int64_t> offsets = {0, 3, 3, 8, 9, 15, 15, 20, 26, 30, 33, 38};       // 9 of 11 groups have rows, none most of them
    int64_t E = int64_t(offsets.size()) - 1, R = offsets.back();
    Tensor w0 = randn("w", {E, O, I}).to(dtype), dy = randn("dy", {R, O}).to(dtype);
    std::vector<Tensor> results[2];
    for (int threads : {1, 2})
        with_threads(threads, [&] {
            auto w = weight(w0, dtype);
            Tensor x = leaf(randn("x", {R, I}), dtype), y = grouped_linear(x, offsets_tensor(offsets), w);
            results[threads - 1] = {y.detach(), backward(y, {x}, dy)[0], w->grad};
        });
    for (size_t i = 0; i < 3; ++i) CHECK(bit_equal(results[0][i], results[1][i]));
    auto ref = plain_gradients(randn("x", {R, I}).to(dtype), w0, dy, offsets);
    require_close(results[1][1], ref.dx, dtype == at::kDouble ? 1e-14 : dtype == at::kFloat ? 1e-6 : 4e-3);
    require_close(results[1][2], ref.dw, 1e-6);
}

TEST_CASE("grouped_linear: a stale gradient is overwritten, by zeros where an expert has no rows, and then added to", "[kernels][linear]") {
    auto dtype = GENERATE(at::kDouble, at::kFloat, at::kBFloat16);
    Tensor offsets = at::tensor({0, 3, 3, 7}, at::kLong), x = leaf(randn("x", {7, I}), dtype), dy = randn("dy", {7, O}).to(dtype);
    auto fresh = weight(randn("w", {3, O, I}), dtype), stale = weight(randn("w", {3, O, I}), dtype);
    stale->grad.fill_(NAN);
    stale->is_grad_stale = true;
    for (int pass = 0; pass < 2; ++pass) {
        backward(grouped_linear(x, offsets, fresh), {x}, dy);
        backward(grouped_linear(x, offsets, stale), {x}, dy);
        CHECK_FALSE(stale->is_grad_stale);
        CHECK(stale->grad[1].abs().sum().item<double>() == 0);
        require_close(stale->grad, values(fresh->grad), 1e-12);
    }
}

TEST_CASE("linear: every door overwrites a stale gradient and then adds to it", "[kernels][linear]") {
    auto dtype = GENERATE(at::kDouble, at::kFloat, at::kBFloat16);
    int64_t rows = GENERATE(0, 5);
    auto doors = {linear, linear_wide, linear_fp64};
    for (auto door : doors) {
        bool narrow = dtype == at::kBFloat16 && door != doors.begin()[0];      // the wide doors keep their weight in fp32
        Tensor x = leaf(randn("x", {rows, I}), dtype);
        auto fresh = weight(randn("w", {O, I}), narrow ? at::kFloat : dtype), stale = weight(randn("w", {O, I}), narrow ? at::kFloat : dtype);
        stale->grad.fill_(NAN);
        stale->is_grad_stale = true;
        for (int pass = 0; pass < 2; ++pass) {
            Tensor y = door(x, fresh), dy = randn("dy", {rows, O}).to(y.scalar_type());
            backward(y, {x}, dy);
            backward(door(x, stale), {x}, dy);
            CHECK_FALSE(stale->is_grad_stale);
            require_close(stale->grad, values(fresh->grad), 1e-12);
        }
    }
}

TEST_CASE("grouped_linear: a deferred weight gradient equals an immediate one", "[kernels][linear]") {
    GradSink sink;
    auto now = weight(randn("w", {2, O, I})), later = weight(randn("w", {2, O, I}));
    later->sink = &sink;
    Tensor x = leaf(randn("x", {T, I})), dy = randn("dy", {T, O}), offsets = offsets_tensor({0, 2, T});
    sink.defer(0, 0);
    backward(grouped_linear(x, offsets, now), {x}, dy);
    backward(grouped_linear(x, offsets, later), {x}, dy);
    sink.drain(0, 0);
    CHECK(bit_equal(now->grad, later->grad));
}

TEST_CASE("linear: this program's answer to MKL's processor check is the one that LibTorch finds", "[kernels][linear]") {
    CHECK(mkl_switch_active());
    CHECK(dlsym(RTLD_DEFAULT, "mkl_serv_intel_cpu_true") == reinterpret_cast<void*>(&mkl_serv_intel_cpu_true));
}

TEST_CASE("bf16_product: equals the float64 product of the same numbers, whatever the strides, written or added", "[kernels][linear]") {
    constexpr int64_t M = 37, K = 70, N = 21;
    auto bf16 = [](const Tensor& t) { return t.to(at::kBFloat16); };
    Tensor a = bf16(randn("a", {M, K})), b = bf16(randn("b", {K, N})), more = randn("more", {M, N}).to(at::kFloat);
    Tensor every_second = bf16(randn("wide", {M, 2 * K})).slice(1, 0, 2 * K, 2), column_major = b.t().contiguous().t();
    for (const Tensor& x : {a, a.t().contiguous().t(), every_second, a.narrow(1, 3, K - 3)})
        for (const Tensor& w : {b, column_major, b.narrow(1, 2, N - 2)})
            for (bool add : {false, true}) {
                Tensor right = w.narrow(0, 0, x.size(1)), room = at::full({M, N + 5}, 7.0f), out = room.narrow(1, 0, w.size(1));
                out.copy_(more.narrow(1, 0, w.size(1)));
                bf16_product(x, right, out, add);
                Tensor want = at::mm(x.to(at::kDouble), right.to(at::kDouble));
                if (add) want += more.narrow(1, 0, w.size(1)).to(at::kDouble);
                CHECK((out.to(at::kDouble) - want).abs().max().item<double>() < 1e-4);
                CHECK((room.narrow(1, w.size(1), N + 5 - w.size(1)) == 7.0f).all().item<bool>());
            }
    for (auto [m, k, n] : {std::array<int64_t, 3>{1, K, N}, {M, 1, N}, {M, K, 1}, {1, 1, 1}, {1, K, 1}})      // one row, one column: any stride is theirs
        for (bool turned : {false, true}) {
            Tensor x = a.narrow(0, 0, m).narrow(1, 0, k), w = b.narrow(0, 0, k).narrow(1, 0, n), out = at::zeros({m, n}, at::kFloat);
            if (turned) x = x.t().contiguous().t(), w = w.t().contiguous().t();
            bf16_product(x, w, out, true);
            CHECK((out.to(at::kDouble) - at::mm(x.to(at::kDouble), w.to(at::kDouble))).abs().max().item<double>() < 1e-4);
        }
    Tensor same_rows = a.narrow(0, 0, 1).expand({M, K}), out = at::zeros({N, M}, at::kFloat).t();
    bf16_product(same_rows, b, out, true);
    CHECK((out.to(at::kDouble) - at::mm(same_rows.to(at::kDouble), b.to(at::kDouble))).abs().max().item<double>() < 1e-4);
    for (bool add : {false, true}) {      // nothing to add up
        Tensor out = at::full({M, N}, 3.0f);
        bf16_product(a.narrow(1, 0, 0), b.narrow(0, 0, 0), out, add);
        CHECK((out == (add ? 3.0f : 0.0f)).all().item<bool>());
    }
}

TEST_CASE("linear: wrong operands are named with their values", "[kernels][linear]") {
    auto w = weight(randn("w", {O, I}));
    require_error(ErrorKind::shape, "got [4, 8] x [9, 13], want x.size(1) == w.size(1)", [&] { linear(at::zeros({4, 8}, at::kDouble), w); });
    require_error(ErrorKind::dtype, "float32 and float64", [&] { linear(at::zeros({4, I}, at::kFloat), w); });
    require_error(ErrorKind::dtype, "int64", [&] { linear(at::zeros({4, I}, at::kLong), w); });
    require_error(ErrorKind::shape, "3 dims", [&] { grouped_linear(at::zeros({4, I}, at::kDouble), offsets_tensor({0, 4}), w); });
    auto experts = weight(randn("w", {2, O, I}));
    Tensor x = at::zeros({4, I}, at::kDouble);
    require_error(ErrorKind::shape, "want [3]", [&] { grouped_linear(x, offsets_tensor({0, 4}), experts); });
    require_error(ErrorKind::shape, "0 … 4", [&] { grouped_linear(x, offsets_tensor({0, 2, 3}), experts); });
    require_error(ErrorKind::shape, "at least 5", [&] { grouped_linear(x, offsets_tensor({0, 5, 4}), experts); });
    w->grad = at::zeros({1}, at::kDouble);
    require_error(ErrorKind::shape, "w.grad", [&] { linear(x, w); });
}
