#include "core/kernels/adamw/adamw.h"
#include "core/kernels/head/head_loss.h"
#include "tests/unit/kernels/reference.h"

using namespace moe;
using namespace moe::kernels;
using namespace moe::kernels::test;

namespace {
constexpr int64_t T = 11, D = 6, V = 37;
Tensor some_targets() {
    Tensor t = at::empty({T}, at::kLong);
    for (int64_t i = 0; i < T; ++i) t.mutable_data_ptr<int64_t>()[i] = i % 4 == 1 ? kIgnore : (i * 17) % V;
    return t;
}
/// Loss by token in plain loops.
std::vector<double> plain_losses(const Tensor& x, const Tensor& w, const Tensor& targets) {
    auto xv = values(x), wv = values(w);
    std::vector<double> out(T);
    for (int64_t t = 0; t < T; ++t) {
        int64_t target = targets.const_data_ptr<int64_t>()[t];
        if (target == kIgnore) continue;
        double sum = 0, picked = 0;
        for (int64_t v = 0; v < V; ++v) {
            double logit = 0;
            for (int64_t d = 0; d < D; ++d) logit += xv[t * D + d] * wv[v * D + d];
            sum += std::exp(logit);
            if (v == target) picked = logit;
        }
        out[t] = std::log(sum) - picked;
    }
    return out;
}
double total(const std::vector<double>& v) {
    double sum = 0;
    for (double x : v) sum += x;
    return sum;
}
}  // namespace

TEST_CASE("head_loss: loss and token losses equal plain loops, ignored targets count nothing", "[kernels][head]") {
    auto [dtype, tolerance] = GENERATE(table<at::ScalarType, double>({{at::kDouble, 1e-13}, {at::kFloat, 1e-6}, {at::kBFloat16, 1e-6}, {at::kHalf, 1e-6}}));
    int64_t chunk = GENERATE(1, 4, 1024);
    Tensor x = randn("x", {T, D}).to(dtype), w0 = randn("w", {V, D}).to(dtype), targets = some_targets(), token_loss;
    HeadLossOptions options;
    options.scale = 0.25;
    options.chunk = chunk;
    Tensor loss = head_loss(x, weight(w0, dtype), targets, options, &token_loss);
    auto want = plain_losses(x, w0, targets);
    REQUIRE(loss.scalar_type() == at::kDouble);
    CHECK(loss.item<double>() == Approx(0.25 * total(want)).epsilon(tolerance));
    REQUIRE(token_loss.scalar_type() == at::kFloat);
    require_close(token_loss, want, 1e-6);
}

TEST_CASE("head_loss: gradients equal finite differences, kept or computed again", "[kernels][head]") {
    HeadLossOptions options;
    options.scale = 0.5;
    options.chunk = 4;
    options.keep_bytes = GENERATE(int64_t(0), int64_t(1) << 20);
    auto w = weight(randn("w", {V, D}));
    Tensor x = leaf(randn("x", {T, D})), targets = some_targets();
    auto upstream = at::full({}, 3.0, at::kDouble);
    auto dx = backward(head_loss(x, w, targets, options), {x}, upstream)[0];
    auto f = [&] { return 3 * head_loss(x, w, targets, options).item<double>(); };
    require_close(dx, differences(x, f), 1e-7);
    require_close(w->grad, differences(w->value, f), 1e-7);
}

TEST_CASE("head_loss: gradients made in forward are those made in backward", "[kernels][head]") {
    auto dtype = GENERATE(at::kDouble, at::kFloat, at::kBFloat16);
    HeadLossOptions options;
    options.scale = 0.5;
    options.chunk = 4;
    Tensor targets = some_targets(), token_loss;
    auto run = [&](bool at_once) {
        options.gradients_in_forward = at_once;
        auto w = weight(randn("w", {V, D}), dtype);
        if (at_once) {                                     // and a stale gradient is overwritten by the first chunk only
            w->grad.fill_(NAN);
            w->is_grad_stale = true;
        }
        Tensor x = leaf(randn("x", {T, D}), dtype), loss = head_loss(x, w, targets, options, &token_loss);
        if (at_once) CHECK(w->grad.abs().sum().item<double>() > 0);
        return std::tuple(loss.item<double>(), backward(loss, {x}, at::ones({}, at::kDouble))[0], w->grad);
    };
    auto [loss, dx, dw] = run(true);
    auto [want, want_dx, want_dw] = run(false);
    CHECK(loss == want);
    require_close(dx, values(want_dx), 1e-12);
    require_close(dw, values(want_dw), 1e-12);
}

TEST_CASE("head_loss: narrow dtypes' gradients follow float64", "[kernels][head]") {
    auto [dtype, tolerance] = GENERATE(table<at::ScalarType, double>({{at::kFloat, 3e-6}, {at::kBFloat16, 1e-2}, {at::kHalf, 2e-3}}));
    HeadLossOptions options;
    options.chunk = 5;
    options.keep_bytes = GENERATE(int64_t(0), int64_t(1) << 20);
    double upstream = GENERATE(1.0, 0.3);
    Tensor x0 = randn("x", {T, D}).to(dtype), w0 = randn("w", {V, D}).to(dtype), targets = some_targets();
    auto wd = weight(w0), w = weight(w0, dtype);
    Tensor xd = leaf(x0), x = leaf(x0, dtype), up = at::full({}, upstream, at::kDouble);
    auto want = backward(head_loss(xd, wd, targets, options), {xd}, up)[0];
    require_close(backward(head_loss(x, w, targets, options), {x}, up)[0], want, tolerance);
    require_close(w->grad, wd->grad, tolerance);
}

TEST_CASE("head_loss: no tokens, or only ignored ones, give 0", "[kernels][head]") {
    auto w = weight(randn("w", {V, D}));
    Tensor x = leaf(at::zeros({0, D}, at::kDouble)), loss = head_loss(x, w, at::zeros({0}, at::kLong), {});
    CHECK(loss.item<double>() == 0);
    backward(loss, {x}, at::ones({}, at::kDouble));
    Tensor y = leaf(randn("x", {2, D}));
    Tensor ignored = head_loss(y, w, at::full({2}, kIgnore, at::kLong), {});
    CHECK(ignored.item<double>() == 0);
    CHECK(backward(ignored, {y}, at::ones({}, at::kDouble))[0].abs().sum().item<double>() == 0);
    CHECK(w->grad.abs().sum().item<double>() == 0);
}

TEST_CASE("head_loss: wrong targets and shapes are named with their values", "[kernels][head]") {
    auto w = weight(randn("w", {V, D}));
    require_error(ErrorKind::data, "targets[0]: got 37, want an id in [0, 37)", [&] { head_loss(randn("x", {1, D}), w, at::full({1}, V, at::kLong), {}); });
    require_error(ErrorKind::data, "got -1", [&] { head_loss(randn("x", {1, D}), w, at::full({1}, -1, at::kLong), {}); });
    require_error(ErrorKind::shape, "inner dims differ", [&] { head_loss(randn("x", {1, D + 1}), w, at::zeros({1}, at::kLong), {}); });
    HeadLossOptions options;
    options.chunk = -1;
    require_error(ErrorKind::usage, "chunk", [&] { head_loss(randn("x", {1, D}), w, at::zeros({1}, at::kLong), options); });
}

TEST_CASE("adamw: three steps equal plain loops, with a bf16 copy", "[kernels][adamw]") {
    auto [dtype, tolerance] = GENERATE(table<at::ScalarType, double>({{at::kDouble, 1e-14}, {at::kFloat, 2e-6}}));
    constexpr int64_t n = 101;
    Tensor p = randn("p", {n}).to(dtype), m = at::zeros({n}, dtype), v = at::zeros({n}, dtype), value = at::zeros({n}, at::kBFloat16);
    auto P = values(p);
    std::vector<double> M(n), S(n);
    AdamWOptions o;
    o.lr = 0.01; o.weight_decay = 0.1; o.grad_scale = 0.5;
    for (o.step = 1; o.step <= 3; ++o.step) {
        Tensor g = randn("g" + std::to_string(o.step), {n}).to(dtype), before = g.clone();
        adamw({p, value}, g, m, v, o);
        CHECK(bit_equal(g, before));
        auto G = values(g);
        for (int64_t i = 0; i < n; ++i) {
            double d = 0.5 * G[i];
            M[i] = 0.9 * M[i] + 0.1 * d;
            S[i] = 0.95 * S[i] + 0.05 * d * d;
            double mean = M[i] / (1 - std::pow(0.9, double(o.step))), square = S[i] / (1 - std::pow(0.95, double(o.step)));
            P[i] -= 0.01 * (mean / (std::sqrt(square) + 1e-8) + 0.1 * P[i]);
        }
    }
    require_close(p, P, tolerance);
    require_close(m, M, tolerance);
    require_close(v, S, tolerance);
    CHECK(bit_equal(value, p.to(at::kBFloat16)));
}

TEST_CASE("sgd: equals its formula, with a bf16 copy", "[kernels][adamw]") {
    Tensor p = randn("p", {77}).to(at::kFloat), g = randn("g", {77}).to(at::kFloat), value = at::zeros({77}, at::kBFloat16);
    auto want = values(p), gv = values(g);
    for (size_t i = 0; i < want.size(); ++i) want[i] -= 0.1 * (0.5 * gv[i] + 0.01 * want[i]);
    sgd({p, value}, g, {}, {0.1, 0, 0.01, 0.5});
    require_close(p, want, 1e-6);
    CHECK(bit_equal(value, p.to(at::kBFloat16)));
}

TEST_CASE("sgd: five steps with momentum equal plain loops, the first of them the plain step", "[kernels][adamw]") {
    auto [dtype, tolerance] = GENERATE(table<at::ScalarType, double>({{at::kDouble, 1e-14}, {at::kFloat, 2e-6}}));
    Tensor p = randn("p", {77}).to(dtype), buffer = at::zeros({77}, dtype);
    auto P = values(p);
    std::vector<double> B;
    for (int step = 1; step <= 5; ++step) {
        Tensor g = randn("g" + std::to_string(step), {77}).to(dtype);
        sgd({p, {}}, g, buffer, {0.1, 0.9, 0.01, 0.5});
        auto G = values(g);
        for (size_t i = 0; i < P.size(); ++i) {
            double d = 0.5 * G[i] + 0.01 * P[i];
            if (step == 1) B.push_back(d);
            else B[i] = 0.9 * B[i] + d;
            P[i] -= 0.1 * B[i];
        }
    }
    require_close(p, P, tolerance);
    require_close(buffer, B, tolerance);
}

TEST_CASE("adamw: not decoupled it is Adam, five steps equal plain loops", "[kernels][adamw]") {
    Tensor p = randn("p", {53}), m = at::zeros_like(p), v = at::zeros_like(p);
    auto P = values(p);
    std::vector<double> M(P.size()), S(P.size());
    AdamWOptions o{.lr = 0.01, .weight_decay = 0.1, .grad_scale = 0.5, .decoupled = false};
    for (o.step = 1; o.step <= 5; ++o.step) {
        Tensor g = randn("g" + std::to_string(o.step), {53});
        adamw({p, {}}, g, m, v, o);
        auto G = values(g);
        for (size_t i = 0; i < P.size(); ++i) {
            double d = 0.5 * G[i] + 0.1 * P[i];
            M[i] = 0.9 * M[i] + 0.1 * d;
            S[i] = 0.95 * S[i] + 0.05 * d * d;
            P[i] -= 0.01 * (M[i] / (1 - std::pow(0.9, double(o.step)))) / (std::sqrt(S[i] / (1 - std::pow(0.95, double(o.step)))) + 1e-8);
        }
    }
    require_close(p, P, 1e-13);
}

TEST_CASE("adamw, sgd: masters split into bf16 weights and rests take the same steps, bit for bit", "[kernels][adamw]") {
    constexpr int64_t n = 3001;
    Tensor p = randn("p", {n}).to(at::kFloat), q = p.clone(), m = at::zeros({n}), v = at::zeros({n}), b = at::zeros({n}), m2 = m.clone(), v2 = v.clone(), b2 = b.clone();
    auto [weight, rest] = split_master(p);
    auto [weight_q, rest_q] = split_master(q);
    Master split{rest, weight}, split_q{rest_q, weight_q};
    for (int step = 1; step <= 5; ++step) {
        Tensor g = randn("g" + std::to_string(step), {n}).to(at::kFloat);
        adamw({p, {}}, g, m, v, {.lr = 0.01, .weight_decay = 0.1, .step = step});
        adamw(split, g, m2, v2, {.lr = 0.01, .weight_decay = 0.1, .step = step});
        sgd({q, {}}, g, b, {.lr = 0.01, .momentum = 0.9});
        sgd(split_q, g, b2, {.lr = 0.01, .momentum = 0.9});
    }
    CHECK(bit_equal(split.read(), p));
    CHECK(bit_equal(weight, rounded(p, at::kBFloat16)));
    CHECK(bit_equal(split_q.read(), q));
    CHECK(bit_equal(m2, m));
    require_error(ErrorKind::shape, "value", [&] { adamw({rest, {}}, m, m, v, {}); });
    require_error(ErrorKind::dtype, "value of a split master", [&] { adamw({rest, at::zeros({n}, at::kHalf)}, m, m, v, {}); });
    Tensor bad = at::full({1}, std::nanf("")), zero = at::zeros({1});
    Master one{at::zeros({1}, at::kShort), at::ones({1}, at::kBFloat16)};
    sgd(one, bad, {}, {.lr = 1});
    CHECK((one.read().isnan().item<bool>() && one.value.isnan().item<bool>()));
}

TEST_CASE("adamw, sgd: bf16 gradients and moments stay near fp32, an fp16 copy is master rounded", "[kernels][adamw]") {
    Tensor p = randn("p", {301}).to(at::kFloat), exact = p.clone(), start = p.clone(), value = at::zeros({301}, at::kHalf);
    Tensor m = at::zeros({301}, at::kBFloat16), v = at::zeros_like(m), wide_m = at::zeros({301}), wide_v = at::zeros({301});
    Tensor q = p.clone(), exact_q = p.clone(), b = at::zeros_like(m), wide_b = at::zeros({301});
    for (int step = 1; step <= 5; ++step) {
        Tensor g = randn("g" + std::to_string(step), {301}).to(at::kBFloat16), wide = g.to(at::kFloat);
        adamw({p, value}, g, m, v, {.lr = 0.01, .step = step});
        adamw({exact, {}}, wide, wide_m, wide_v, {.lr = 0.01, .step = step});
        sgd({q, {}}, g, b, {.lr = 0.01, .momentum = 0.9});
        sgd({exact_q, {}}, wide, wide_b, {.lr = 0.01, .momentum = 0.9});
    }
    require_close(p - start, exact - start, 5e-3);
    require_close(q - start, exact_q - start, 5e-3);
    require_close(m, wide_m, 5e-3);
    CHECK_FALSE(bit_equal(p, exact));
    CHECK(bit_equal(value, p.to(at::kHalf)));
}

TEST_CASE("sum_of_squares: equals a plain sum and does not depend on the number of threads", "[kernels][adamw]") {
    auto dtype = GENERATE(at::kDouble, at::kFloat, at::kBFloat16, at::kHalf);
    int64_t n = GENERATE(0, 1, 50001);
    Tensor x = randn("x", {n}).to(dtype), one, two;
    double want = 0;
    for (double v : values(x)) want += v * v;
    with_threads(1, [&] { one = sum_of_squares(x); });
    with_threads(2, [&] { two = sum_of_squares(x); });
    CHECK(one.item<double>() == Approx(want).epsilon(1e-12));
    CHECK(bit_equal(one, two));
}

TEST_CASE("adamw: ranges of another length or dtype are named with their values", "[kernels][adamw]") {
    Tensor p = randn("p", {8}), other = randn("o", {7});
    require_error(ErrorKind::shape, "adamw: grad: got 7 elements, want 8", [&] { adamw({p, {}}, other, p, p, {}); });
    require_error(ErrorKind::dtype, "int64", [&] { sgd({p, {}}, at::zeros({8}, at::kLong), {}, {}); });
    require_error(ErrorKind::dtype, "bfloat16", [&] { sgd({p.to(at::kBFloat16), {}}, p, {}, {}); });
    require_error(ErrorKind::dtype, "float16", [&] { sgd({p, {}}, p.to(at::kHalf), {}, {}); });
    require_error(ErrorKind::dtype, "float16", [&] { adamw({p, {}}, p, p.to(at::kHalf), p.to(at::kHalf), {}); });
    require_error(ErrorKind::usage, "0.9 without a buffer", [&] { sgd({p, {}}, p, {}, {.momentum = 0.9}); });
    AdamWOptions o;
    o.step = 0;
    require_error(ErrorKind::usage, "step", [&] { adamw({p, {}}, p, p, p, o); });
}
