#include "core/kernels/adamw/adamw.h"
#include "core/kernels/embed/embed.h"
#include "core/kernels/norm/rmsnorm.h"
#include "core/kernels/swiglu/swiglu.h"
#include <torch/csrc/autograd/autograd.h>

#include "tests/unit/kernels/cuda_compare.h"       // after LibTorch, which has a CHECK of its own

using namespace moe;
using namespace moe::test;

namespace {
Op norm_op(int64_t T, int64_t D) {
    return [=](const Place& p) -> std::vector<Result> {
        Tensor x = p.leaf({T, D}, 1);
        auto gamma = p.weight({D}, 2);
        Tensor y = kernels::rmsnorm(x, gamma, 1e-6);
        y.backward(p.random({T, D}, 3));
        return {{"y", y}, {"dx", x.grad()}, {"dgamma", gamma->grad}};
    };
}
Op norm_and_input_op(int64_t T, int64_t D) {
    return [=](const Place& p) -> std::vector<Result> {
        Tensor x = p.leaf({T, D}, 1);
        auto gamma = p.weight({D}, 2);
        auto [y, same] = kernels::rmsnorm_and_input(x, gamma, 1e-6);
        torch::autograd::backward({y, same}, {p.random({T, D}, 3), p.random({T, D}, 4)});
        return {{"y", y}, {"dx", x.grad()}, {"dgamma", gamma->grad}};
    };
}
Op swiglu_op(int64_t R, int64_t F, bool weighted) {
    return [=](const Place& p) -> std::vector<Result> {
        Tensor x = p.leaf({R, 2 * F}, 1), weight = weighted ? p.wide_leaf({R}, 2) : Tensor();
        Tensor y = kernels::swiglu(x, weight);
        y.backward(p.random({R, F}, 3));
        return {{"y", y}, {"dgate_up", x.grad()}, {"drow_weight", weighted ? weight.grad() : Tensor()}};
    };
}
Op embed_op(Tensor ids, int64_t V, int64_t D) {
    return [=](const Place& p) -> std::vector<Result> {
        Tensor anchor = p.leaf({1}, 1);
        auto w = p.weight({V, D}, 2);
        Tensor y = kernels::embed(anchor, on(p, ids), w);
        y.backward(p.random(y.sizes(), 3));
        return {{"y", y}, {"dw", w->grad}};
    };
}
/// Three AdamW steps, one of SGD, two with momentum, one of Adam.
Op optimizer_op(int64_t n, int64_t first) {
    return [=](const Place& p) -> std::vector<Result> {
        auto range = [&](Tensor t) { return t.narrow(0, first, n); };      // not at a multiple of 16 bytes where first is odd
        Tensor master = range(p.wide({n + first}, 1)), grad = range(p.wide({n + first}, 2)), m = range(at::zeros({n + first}, master.options())), v = m.clone();
        Tensor value = p.dtype == at::kBFloat16 ? at::zeros({n}, master.options().dtype(at::kBFloat16)) : Tensor();
        Master split;
        if (p.dtype == at::kBFloat16) {
            auto [weight, rest] = split_master(master);
            split = {range(at::zeros({n + first}, rest.options())), weight};
            split.data.copy_(rest);
        }
        Tensor split_m = m.clone(), split_v = v.clone();
        std::vector<Result> out;
        for (int64_t step = 1; step <= 3 && split.data.defined(); ++step) kernels::adamw(split, grad, split_m, split_v, {.lr = 0.01, .weight_decay = 0.1, .grad_scale = 0.5, .step = step});
        for (int64_t step = 1; step <= 3; ++step) kernels::adamw({master, value}, grad, m, v, {.lr = 0.01, .weight_decay = 0.1, .grad_scale = 0.5, .step = step});
        out.push_back({"master", master.clone()});
        if (split.data.defined()) {
            CHECK(at::equal(split.read(), master));
            CHECK(at::equal(split.value, rounded(master, at::kBFloat16)));
            kernels::sgd(split, at::full_like(grad, std::nan("")), {}, {.lr = 1});
            CHECK(split.value.isnan().all().item<bool>());
            CHECK(split.read().isnan().all().item<bool>());
        }
        Tensor buffer = range(at::zeros({n + first}, master.options()));
        kernels::sgd({master, value}, grad, {}, {0.1, 0, 0.01, 0.5});
        for (int step = 0; step < 2; ++step) kernels::sgd({master, value}, grad, buffer, {0.1, 0.9, 0.01, 0.5});
        kernels::adamw({master, value}, grad, m, v, {.lr = 0.01, .weight_decay = 0.1, .step = 4, .decoupled = false});
        out.insert(out.end(), {{"m", m}, {"v", v}, {"after sgd and adam", master}, {"buffer", buffer}, {"sum of squares", kernels::sum_of_squares(grad)}});
        if (value.defined()) CHECK(at::equal(value, master.to(at::kBFloat16)));
        return out;
    };
}
}  // namespace

TEST_CASE("cuda rmsnorm: values and gradients, odd widths, more rows than blocks", "[gpu][kernels]") {
    if (!has_gpu()) return;
    compare("rmsnorm 19x72", norm_op(19, 72));
    compare("rmsnorm 7x37", norm_op(7, 37));
    compare("rmsnorm 1200x40", norm_op(1200, 40));
    compare("rmsnorm 3x7168", norm_op(3, 7168));
    compare("rmsnorm 2x20001", norm_op(2, 20001));
    compare("rmsnorm no tokens", norm_op(0, 16));
}

TEST_CASE("cuda rmsnorm_and_input: the other gradient of x is added in the same pass", "[gpu][kernels]") {
    if (!has_gpu()) return;
    compare("rmsnorm_and_input 19x72", norm_and_input_op(19, 72));
    compare("rmsnorm_and_input 7x37", norm_and_input_op(7, 37));
    compare("rmsnorm_and_input 1200x2048", norm_and_input_op(1200, 2048));
    compare("rmsnorm_and_input no tokens", norm_and_input_op(0, 16));
}

TEST_CASE("cuda swiglu: values and gradients with and without row weights", "[gpu][kernels]") {
    if (!has_gpu()) return;
    for (bool weighted : {false, true}) {
        compare("swiglu 21x48", swiglu_op(21, 48, weighted));
        compare("swiglu 5x11", swiglu_op(5, 11, weighted));
        compare("swiglu 9x1408", swiglu_op(9, 1408, weighted));
        compare("swiglu no rows", swiglu_op(0, 8, weighted));
    }
}

TEST_CASE("cuda embed: rows and summed gradients, repeated and absent ids", "[gpu][kernels]") {
    if (!has_gpu()) return;
    Tensor ids = at::randint(0, 11, {300}, at::make_generator<at::CPUGeneratorImpl>(uint64_t(5)), at::TensorOptions().dtype(at::kLong));
    compare("embed 300x40", embed_op(ids, 13, 40));
    compare("embed 300x7", embed_op(ids, 13, 7));
    compare("embed one id", embed_op(at::full({77}, 3, at::kLong), 4, 1032));
    compare("embed no tokens", embed_op(at::empty({0}, at::kLong), 4, 8));
}

TEST_CASE("cuda embed: the squares of a gradient that begins at zero come with it, those of a second one are forgotten", "[gpu][kernels]") {
    if (!has_gpu()) return;
    Tensor ids = at::randint(0, 11, {300}, at::make_generator<at::CPUGeneratorImpl>(uint64_t(5)), at::TensorOptions().dtype(at::kLong)).to(at::kCUDA);
    for (auto grad : {at::kFloat, at::kBFloat16})
        for (int64_t D : {1032, 7}) {
            Place p{at::Device(at::kCUDA, 0), at::kBFloat16, at::kBFloat16};
            auto w = p.weight({13, D}, 2);
            w->grad = w->grad.to(grad), w->is_grad_stale = true;
            auto add = [&] { kernels::embed(p.leaf({1}, 1), ids, w).backward(p.random({300, D}, 3)); };
            add();
            double want = w->grad.to(at::kDouble).square().sum().item<double>();
            REQUIRE(w->grad_squares.parts.defined());
            CHECK(w->grad_squares.version == int64_t(w->grad._version()));
            CHECK(std::abs(w->grad_squares.parts.sum().item<double>() - want) <= 1e-9 * want);
            add();
            CHECK_FALSE(w->grad_squares.parts.defined());
        }
}

TEST_CASE("cuda embed and rmsnorm: gradients are the same bit for bit in a second run", "[gpu][kernels]") {
    if (!has_gpu()) return;
    Place p{at::Device(at::kCUDA, 0), at::kBFloat16, at::kBFloat16};
    Tensor ids = at::randint(0, 50, {5000}, at::make_generator<at::CPUGeneratorImpl>(uint64_t(6)), at::TensorOptions().dtype(at::kLong));
    CHECK(at::equal(embed_op(ids, 50, 64)(p)[1].value, embed_op(ids, 50, 64)(p)[1].value));
    CHECK(at::equal(norm_op(3000, 128)(p)[2].value, norm_op(3000, 128)(p)[2].value));
}

TEST_CASE("cuda embed: an id outside the vocabulary gives NaN and no gradient", "[gpu][kernels]") {
    if (!has_gpu()) return;
    Place p{at::Device(at::kCUDA, 0), at::kFloat, at::kFloat};
    auto out = embed_op(longs({1, 9, -1}), 4, 8)(p);
    CHECK(out[0].value[0].isfinite().all().item<bool>());
    CHECK(out[0].value[1].isnan().all().item<bool>());
    CHECK(out[0].value[2].isnan().all().item<bool>());
    CHECK((out[1].value[0] == 0.25).all().item<bool>());
    CHECK((out[1].value[3] == 0.25).all().item<bool>());
}

TEST_CASE("cuda adamw, sgd, sum_of_squares: flat ranges of any length and alignment", "[gpu][kernels]") {
    if (!has_gpu()) return;
    // In bf16 master, moments and gradient are fp32, so the limit is that of fp32.
    for (int64_t n : {1, 5, 4096, 100003})
        for (int64_t first : {0, 1, 4}) compare("adamw " + std::to_string(n) + "+" + std::to_string(first), optimizer_op(n, first), 1e-5);
    compare("adamw empty", optimizer_op(0, 0));
}

TEST_CASE("cuda adamw, sgd: bf16 gradients and moments", "[gpu][kernels]") {
    if (!has_gpu()) return;
    auto op = [](const Place& p) -> std::vector<Result> {
        const auto narrow = p.device.is_cuda() ? at::kBFloat16 : at::kDouble;
        Tensor master = p.wide({1001}, 1), grad = p.numbers({1001}, 2, 1, at::kBFloat16, narrow), m = at::zeros({1001}, master.options().dtype(narrow)), v = at::zeros_like(m);
        Tensor buffer = at::zeros_like(m);
        kernels::adamw({master, Tensor()}, grad, m, v, {.lr = 0.01, .step = 1});
        for (int step = 0; step < 2; ++step) kernels::sgd({master, Tensor()}, grad, buffer, {.lr = 0.01, .momentum = 0.9});
        return {{"master", master}, {"m", m}, {"v", v}, {"buffer", buffer}};
    };
    compare("adamw bf16 moments", op, 5e-3, {at::kBFloat16});
}
