#include "core/kernels/muon/muon.h"
#include "tests/muon_reference.h"
#include "tests/unit/kernels/reference.h"

#include <ATen/ops/linalg_svdvals.h>

using namespace moe;
using namespace moe::kernels;
using namespace moe::kernels::test;
using moe::test::PlainMatrix;
using moe::test::PlainMuon;

namespace {
/// Matrix n of [N, R, C].
PlainMatrix plain(const Tensor& x_NRC, int64_t n) { return {x_NRC.size(1), x_NRC.size(2), values(x_NRC[n])}; }
}  // namespace

TEST_CASE("newton_schulz: every matrix of a batch equals plain loops, wide, tall and square", "[kernels][muon]") {
    auto [R, C] = GENERATE(table<int64_t, int64_t>({{5, 9}, {9, 5}, {7, 7}, {1, 6}, {6, 1}}));
    auto [dtype, tolerance] = GENERATE(table<at::ScalarType, double>({{at::kDouble, 1e-12}, {at::kFloat, 2e-5}, {at::kBFloat16, 0.1}}));
    Tensor g = randn("g", {3, R, C}) * 40, got = newton_schulz(dtype == at::kDouble ? g : g.to(at::kFloat), dtype);
    REQUIRE(got.scalar_type() == dtype);
    for (int64_t n = 0; n < 3; ++n) require_close(got[n], moe::test::plain_newton_schulz(plain(g, n)).at, tolerance);
}

TEST_CASE("newton_schulz: singular values come near 1, whatever the size of the matrix's numbers", "[kernels][muon]") {
    for (double size : {1e-4, 1.0, 1e6}) {
        Tensor s = at::linalg_svdvals(newton_schulz(randn("g", {2, 24, 40}) * size, at::kDouble));
        CHECK(s.min().item<double>() > 0.3);
        CHECK(s.max().item<double>() < 1.3);
    }
}

TEST_CASE("newton_schulz: a matrix of zeros stays one beside others", "[kernels][muon]") {
    Tensor g = randn("g", {3, 4, 6});
    g[1].zero_();
    Tensor got = newton_schulz(g, at::kDouble);
    CHECK(got[1].abs().max().item<double>() == 0);
    require_close(got[2], moe::test::plain_newton_schulz(plain(g, 2)).at, 1e-12);
}

TEST_CASE("muon: five steps equal plain loops, with a bf16 copy", "[kernels][muon]") {
    auto [R, C] = GENERATE(table<int64_t, int64_t>({{5, 9}, {9, 5}}));
    auto [dtype, tolerance] = GENERATE(table<at::ScalarType, double>({{at::kDouble, 1e-12}, {at::kFloat, 1e-5}}));
    Tensor p = randn("p", {2, R, C}).to(dtype), buffer = at::zeros_like(p), value = at::zeros_like(p, at::kBFloat16);
    std::vector<PlainMuon> want{PlainMuon(plain(p, 0)), PlainMuon(plain(p, 1))};
    MuonOptions o{0.02, 0.9, 0.3, 0.5, dtype};
    for (int step = 1; step <= 5; ++step) {
        Tensor g = randn("g" + std::to_string(step), {2, R, C}).to(dtype), before = g.clone();
        muon({p, value}, g, buffer, o);
        CHECK(bit_equal(g, before));
        for (int64_t n = 0; n < 2; ++n) want[size_t(n)].step(plain(g, n), 0.02, 0.9, 0.3, 0.5);
    }
    for (int64_t n = 0; n < 2; ++n) {
        require_close(p[n], want[size_t(n)].weight.at, tolerance);
        require_close(buffer[n], want[size_t(n)].buffer.at, tolerance);
    }
    CHECK(bit_equal(value, p.to(at::kBFloat16)));
}

TEST_CASE("muon: bf16 gradients and momentum stay near the exact step", "[kernels][muon]") {
    Tensor p = randn("p", {2, 8, 12}).to(at::kFloat), exact = p.clone(), buffer = at::zeros_like(p, at::kBFloat16), wide = at::zeros_like(p);
    Tensor start = p.clone();
    for (int step = 1; step <= 3; ++step) {
        Tensor g = randn("g" + std::to_string(step), {2, 8, 12}).to(at::kBFloat16);
        muon({p, {}}, g, buffer, {.lr = 0.02});
        muon({exact, {}}, g.to(at::kFloat), wide, {.lr = 0.02});
    }
    REQUIRE(buffer.scalar_type() == at::kBFloat16);
    require_close(p - start, exact - start, 2e-2);
    CHECK_FALSE(bit_equal(p, exact));
}

TEST_CASE("muon: wrong shapes and dtypes are named with their values", "[kernels][muon]") {
    Tensor p = randn("p", {2, 4, 6}), other = randn("o", {2, 6, 4});
    require_error(ErrorKind::shape, "muon: grad: got [2, 6, 4], want [2, 4, 6]", [&] { muon({p, {}}, other, p, {}); });
    require_error(ErrorKind::shape, "3 dims", [&] { muon({p[0], {}}, p[0], p[0], {}); });
    require_error(ErrorKind::dtype, "float16", [&] { muon({p, {}}, p, p.to(at::kHalf), {}); });
    require_error(ErrorKind::dtype, "float16", [&] { newton_schulz(p, at::kHalf); });
}
