#include "core/kernels/route/route.h"
#include "tests/unit/kernels/cuda_compare.h"

using namespace moe;
using namespace moe::test;

namespace {
/// fp32 and fp64 agree on the choice unless two choices are within rounding: logits on a grid of 1/64 keep them apart.
Tensor spread(int64_t T, int64_t E) {
    auto gen = at::make_generator<at::CPUGeneratorImpl>(uint64_t(5));
    return at::rand({T, E}, gen, at::TensorOptions().dtype(at::kDouble)).argsort(int64_t(-1), false).to(at::kDouble) / 64 - double(E) / 128;
}

void check_route(const char* what, int64_t T, int64_t E, kernels::RouteOptions o, bool with_bias, bool given = false) {
    INFO(what);
    auto gen = at::make_generator<at::CPUGeneratorImpl>(uint64_t(6));
    auto doubles = at::TensorOptions().dtype(at::kDouble);
    Tensor logits = spread(T, E), bias = with_bias ? at::randint(-8, 8, {E}, gen, doubles) / 8 : Tensor(), dw = at::randn({T, o.top_k}, gen, doubles), ds = at::randn({T, E}, gen, doubles);
    Tensor ids = given ? at::arange(T * o.top_k, at::kLong).remainder(E).view({T, o.top_k}) : Tensor();
    auto run = [&](at::Device device, at::ScalarType dtype) {
        auto move = [&](const Tensor& t) { return t.defined() ? t.detach().to(device, dtype, false, true) : t; };      // a leaf of its own
        Tensor x = move(logits).requires_grad_(true);
        auto r = kernels::route(x, move(bias), o, given ? ids.to(device) : ids);
        ((r.weights_TK * move(dw)).sum() + (r.scores_TE * move(ds)).sum()).backward();
        Tensor both = x.grad().clone();
        x.mutable_grad().reset();
        kernels::route(x, move(bias), o, given ? ids.to(device) : ids).weights_TK.backward(move(dw));
        return std::tuple(r, both, x.grad());
    };
    auto [want, both, only] = run(at::kCPU, at::kDouble);
    for (auto [dtype, bound] : {std::pair(at::kDouble, 1e-12), std::pair(at::kFloat, 2e-5)}) {
        auto [got, got_both, got_only] = run(at::Device(at::kCUDA, 0), dtype);
        CHECK(at::equal(got.ids_TK.cpu(), want.ids_TK));
        check_close("weights", got.weights_TK, want.weights_TK, bound);
        check_close("scores", got.scores_TE, want.scores_TE, bound);
        check_close("dlogits", got_both, both, bound);
        check_close("dlogits of the weights alone", got_only, only, bound);
    }
}
kernels::RouteOptions options(int64_t K, int64_t groups = 1, int64_t kept = 1, bool softmax = false, bool norm = true) {
    kernels::RouteOptions o;
    o.top_k = K; o.n_group = groups; o.topk_group = kept; o.softmax = softmax; o.norm_topk = norm; o.scale = 2.5; o.temperature = 1.25;
    return o;
}
}  // namespace

TEST_CASE("cuda route: choices, weights, scores and gradients are those of the CPU", "[gpu][kernels]") {
    if (!has_gpu()) return;
    check_route("16B", 1000, 64, options(6, 1, 1, true, false), true);
    check_route("671B", 333, 256, options(8, 8, 4), true);
    check_route("few experts", 77, 5, options(2), true);
    check_route("all experts", 9, 8, options(8), false);
    check_route("groups by their best", 50, 60, options(6, 6, 3, true), false);
    check_route("more choices than a warp", 20, 100, options(40), true);
    check_route("given", 50, 64, options(6), true, true);
    check_route("one token, one expert", 1, 1, options(1), false);
    check_route("no tokens", 0, 8, options(2), true);
    auto best = options(4, 4, 2, true);
    best.best_two = false;
    check_route("best expert of a group", 64, 20, best, false);
    check_route("many experts", 10, 1000, options(8), true);
    CHECK_THROWS_AS(kernels::route(at::zeros({2, 1025}, at::kCUDA), {}, options(1)), Error);
}

TEST_CASE("cuda route: NaN and infinities give what the CPU gives", "[gpu][kernels]") {
    if (!has_gpu()) return;
    Tensor logits = at::zeros({3, 40});
    logits[0][33] = NAN;
    logits[1][7] = INFINITY;
    logits[2][7] = -INFINITY;
    auto want = kernels::route(logits, {}, options(3)), got = kernels::route(logits.to(at::kCUDA), {}, options(3));
    CHECK(at::equal(got.ids_TK.cpu(), want.ids_TK));
    CHECK(at::allclose(got.weights_TK.cpu(), want.weights_TK, 1e-5, 1e-6, /*equal_nan=*/true));
}

TEST_CASE("cuda count_pairs: counts by domain and drops are those of the CPU, in shared and in device memory", "[gpu][kernels]") {
    if (!has_gpu()) return;
    for (auto [T, K, E, D] : {std::tuple(5000, 6, 64, 4), std::tuple(700, 2, 900, 30), std::tuple(1, 1, 1, 1), std::tuple(0, 2, 4, 2)}) {
        auto gen = at::make_generator<at::CPUGeneratorImpl>(uint64_t(4));
        Tensor ids = at::randint(0, E, {T, K}, gen, at::kLong), domain = at::randint(-1, D, {T}, gen, at::kInt);
        Tensor kept = ids.masked_fill(at::rand({T, K}, gen).lt(0.2), -1);
        Tensor counts = at::full({D + 1, E}, 3, at::kLong), dropped = at::full({E}, 2, at::kLong), counts_gpu = counts.to(at::kCUDA), dropped_gpu = dropped.to(at::kCUDA), plain = counts.to(at::kCUDA);
        kernels::count_pairs(ids, domain, kept, counts, dropped);
        kernels::count_pairs(ids.to(at::kCUDA), domain.to(at::kCUDA), kept.to(at::kCUDA), counts_gpu, dropped_gpu);
        kernels::count_pairs(ids.to(at::kCUDA), domain.to(at::kCUDA), {}, plain, {});
        CHECK(at::equal(counts_gpu.cpu(), counts));
        CHECK(at::equal(dropped_gpu.cpu(), dropped));
        CHECK(at::equal(plain.cpu(), counts));
    }
}
