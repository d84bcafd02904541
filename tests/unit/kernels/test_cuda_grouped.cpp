#include "core/base/error.h"
#include "core/kernels/grouped/grouped.h"
#include "tests/unit/kernels/cuda_compare.h"

#include <limits>

#ifdef MOE_WITH_CUDA
#include <ATen/cuda/CUDAContext.h>
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDAGuard.h>
#endif

using namespace moe;
using namespace moe::test;

namespace {
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

bool has_hopper() {
    if (!has_gpu()) return false;
#ifdef MOE_WITH_CUDA
    auto* p = at::cuda::getCurrentDeviceProperties();
    if (p->major == 9 && p->minor == 0) return true;
    std::puts("skipped: no device of compute capability 9.0");
#endif
    return false;
}

/// Groups in tiles of 128 rows, `spare` rows behind the last one that hold NaN, and all operands of the three products.
struct Groups {
    std::vector<int64_t> offsets{0};
    int64_t E, R, O, I;
    Tensor offsets_E1, x, dy, w, dw;

    Groups(std::vector<int64_t> tiles, int64_t out, int64_t in, int64_t spare = 200) : E(int64_t(tiles.size())), O(out), I(in) {
        for (int64_t n : tiles) offsets.push_back(offsets.back() + 128 * n);
        R = offsets.back() + spare;
        offsets_E1 = longs(offsets).to(at::kInt).to(at::kCUDA);
        x = numbers({R, I}, 1), dy = numbers({R, O}, 2), w = numbers({E, O, I}, 3);
        x.narrow(0, offsets.back(), spare).fill_(kNan), dy.narrow(0, offsets.back(), spare).fill_(kNan);
        dw = at::full({E, O, I}, 0.25, w.options().dtype(at::kFloat));
    }
    static Tensor numbers(at::IntArrayRef sizes, uint64_t seed) {
        return at::randn(sizes, at::make_generator<at::CPUGeneratorImpl>(seed), at::TensorOptions().dtype(at::kFloat)).to(at::kBFloat16).to(at::kCUDA);
    }
    Tensor like_y() const { return at::full({R, O}, 7, w.options()); }
    Tensor like_dx() const { return at::full({R, I}, 7, w.options()); }
    Tensor y() const { return into([&](Tensor out) { kernels::grouped_nt(x, offsets_E1, w, out); }, like_y()); }
    Tensor dx() const { return into([&](Tensor out) { kernels::grouped_nn(dy, offsets_E1, w, out); }, like_dx()); }
    /// Written over NaN.
    Tensor written(at::ScalarType dtype = at::kFloat) const { return into([&](Tensor out) {
        double squares = kernels::grouped_tn(dy, x, offsets_E1, out).sum().item<double>(), want = out.to(at::kDouble).square().sum().item<double>();
        CHECK(std::abs(squares - want) <= 1e-6 * want);
    }, at::full_like(dw, kNan, dw.options().dtype(dtype))); }
    Tensor sum(at::ScalarType dtype = at::kFloat) const { return into([&](Tensor out) { kernels::add_grouped_tn(dy, x, offsets_E1, out); }, dw.to(dtype, false, /*copy=*/true)); }

    /// In float64 on the CPU, group by group.
    Tensor y_reference() const { return by_group(like_y(), [&](int64_t e, const Tensor& rows_x, const Tensor&) { return rows_x.mm(wide(w)[e].t()); }); }
    Tensor dx_reference() const { return by_group(like_dx(), [&](int64_t e, const Tensor&, const Tensor& rows_dy) { return rows_dy.mm(wide(w)[e]); }); }
    Tensor sum_reference() const { return wide(dw) + written_reference(); }
    Tensor written_reference() const {
        Tensor sum = at::zeros({E, O, I}, at::kDouble);
        for (int64_t e = 0; e < E; ++e) sum[e] += rows(wide(dy), e).t().mm(rows(wide(x), e));
        return sum;
    }

private:
    template <class F> static Tensor into(F f, Tensor out) {
        f(out);
        return out;
    }
    static Tensor wide(const Tensor& t) { return t.to(at::kCPU, at::kDouble); }
    Tensor rows(const Tensor& t, int64_t e) const { return t.narrow(0, offsets[e], offsets[e + 1] - offsets[e]); }
    template <class F> Tensor by_group(const Tensor& start, F f) const {
        Tensor out = wide(start);
        for (int64_t e = 0; e < E; ++e) rows(out, e).copy_(f(e, rows(wide(x), e), rows(wide(dy), e)));
        return out;
    }
};

void compare_groups(const std::string& what, const Groups& g) {
    REQUIRE(kernels::grouped_fits(g.w, g.dw));
    check_close(what + " y", g.y(), g.y_reference(), 3e-3);
    check_close(what + " dx", g.dx(), g.dx_reference(), 3e-3);
    check_close(what + " dw", g.sum(), g.sum_reference(), 1e-5);
    Tensor dw = g.written();
    check_close(what + " dw written", dw, g.written_reference(), 1e-5);
    for (int i = 0; i < 4; ++i) CHECK(g.written().equal(dw));
    // A main gradient in bf16: the same sums, rounded once.
    REQUIRE(kernels::grouped_fits(g.w, g.dw.to(at::kBFloat16)));
    CHECK(g.written(at::kBFloat16).equal(dw.to(at::kBFloat16)));
    CHECK(g.sum(at::kBFloat16).equal((dw + g.dw).to(at::kBFloat16)));
    for (int64_t e = 0; e < g.E; ++e)
        if (g.offsets[e] == g.offsets[e + 1]) CHECK(dw[e].eq(0).all().item<bool>());
}
}  // namespace

TEST_CASE("cuda grouped: products and sums are those of float64, rows past the end stay as they are", "[gpu][kernels]") {
    if (!has_hopper()) return;
    compare_groups("empty at start, middle and end", {{0, 1, 3, 0, 0, 2, 0}, 384, 136});
    compare_groups("one group has all", {{0, 0, 5, 0}, 128, 64});
    compare_groups("one group", {{2}, 256, 520, 0});
    compare_groups("many tiles a block", {{9, 40, 1, 17, 0, 30}, 640, 264, 0});
    compare_groups("sums by pairs of blocks, some groups empty", {{0, 3, 0, 9, 1, 0}, 512, 392});
    compare_groups("sums by pairs of blocks, more tiles than blocks", {{2, 0, 3, 1, 2, 1, 1, 3, 1, 0}, 1280, 1032, 0});
    compare_groups("a single step", {{1, 1, 1}, 128, 8});
    compare_groups("256 groups, most empty", {[] {
                       std::vector<int64_t> tiles(256, 0);
                       for (int e : {3, 4, 100, 254}) tiles[e] = 1;
                       return tiles;
                   }(), 128, 72});
}

TEST_CASE("cuda grouped: no rows at all leave every result alone, and write zeros as the sum", "[gpu][kernels]") {
    if (!has_hopper()) return;
    Groups g({0, 0, 0}, 128, 64, 300);
    CHECK(g.y().equal(g.like_y()));
    CHECK(g.dx().equal(g.like_dx()));
    CHECK(g.sum().equal(g.dw));
    CHECK(g.written().equal(at::zeros_like(g.dw)));
    CHECK(g.sum(at::kBFloat16).equal(g.dw.to(at::kBFloat16)));
    CHECK(g.written(at::kBFloat16).equal(at::zeros_like(g.dw, g.dw.options().dtype(at::kBFloat16))));
    Groups none({0, 0}, 128, 64, 0);
    CHECK(none.y().numel() == 0);
    CHECK(none.sum().equal(none.dw));
    CHECK(none.written().equal(at::zeros_like(none.dw)));
}

TEST_CASE("cuda grouped: a NaN stays in its row of the products and in its column of its expert's sum", "[gpu][kernels]") {
    if (!has_hopper()) return;
    Groups g({2, 0, 3, 1}, 384, 136);
    Tensor y = g.y(), dx = g.dx(), sum = g.sum();
    const int64_t row = g.offsets[2] + 77, expert = 2, column = 383;
    g.x[row][5] = kNan, g.dy[row][column] = kNan;
    Tensor y2 = g.y(), dx2 = g.dx(), sum2 = g.sum();
    CHECK(y2[row].isnan().all().item<bool>());
    CHECK(dx2[row].isnan().all().item<bool>());
    y2[row] = y[row], dx2[row] = dx[row];
    CHECK(y2.equal(y));
    CHECK(dx2.equal(dx));
    CHECK(sum2[expert][column].isnan().all().item<bool>());
    CHECK(sum2[expert].select(1, 5).isnan().all().item<bool>());
    sum2[expert][column] = sum[expert][column], sum2[expert].select(1, 5) = sum[expert].select(1, 5);
    CHECK(sum2.equal(sum));
}

TEST_CASE("cuda grouped: repeats, another stream and a replayed graph give the same bits", "[gpu][kernels]") {
    if (!has_hopper()) return;
    Groups g({9, 0, 14, 1, 6}, 512, 320);
    Tensor y = g.y(), dx = g.dx(), sum = g.sum();
    for (int i = 0; i < 5; ++i) {
        CHECK(g.y().equal(y));
        CHECK(g.dx().equal(dx));
        CHECK(g.sum().equal(sum));
    }
#ifdef MOE_WITH_CUDA
    Tensor y2 = g.like_y(), sum2 = g.dw.clone();
    c10::cuda::CUDAStream stream = c10::cuda::getStreamFromPool();
    at::cuda::CUDAGraph graph;
    {
        at::cuda::device_synchronize();
        c10::cuda::CUDAStreamGuard guard(stream);
        graph.capture_begin();
        kernels::grouped_nt(g.x, g.offsets_E1, g.w, y2);
        kernels::add_grouped_tn(g.dy, g.x, g.offsets_E1, sum2);
        graph.capture_end();
        graph.replay();
        // Other groups through the same graph: the kernels read them when they run.
        stream.synchronize();
        CHECK(y2.equal(y));
        CHECK(sum2.equal(sum));
        g.offsets_E1.copy_(at::tensor({0, 128, 128, 256, 384, 512}, at::kInt));
        y2.fill_(7);
        graph.replay();
        stream.synchronize();
    }
    g.offsets = {0, 128, 128, 256, 384, 512};
    check_close("other groups in a graph", y2, g.y_reference(), 3e-3);
#endif
}

TEST_CASE("grouped: nothing on the CPU fits, and the products refuse it", "[kernels]") {
    Tensor cpu = at::zeros({2, 128, 64}, at::kBFloat16);
    CHECK_FALSE(kernels::grouped_fits(cpu));
    CHECK_FALSE(kernels::grouped_fits({}));
    CHECK_THROWS_AS(kernels::grouped_nt(at::zeros({128, 64}, at::kBFloat16), at::zeros({3}, at::kInt), cpu, at::zeros({128, 128}, at::kBFloat16)), Error);
}

TEST_CASE("cuda grouped: what does not fit is said by grouped_fits and refused by the products", "[gpu][kernels]") {
    if (!has_hopper()) return;
    auto w = [](int64_t O, int64_t I, at::ScalarType t = at::kBFloat16) { return at::zeros({2, O, I}, at::TensorOptions().dtype(t).device(at::kCUDA)); };
    CHECK(kernels::grouped_fits(w(128, 8)));
    CHECK(kernels::grouped_fits(w(128, 8), w(128, 8, at::kFloat)));
    CHECK_FALSE(kernels::grouped_fits(w(64, 8)));
    CHECK_FALSE(kernels::grouped_fits(w(128, 12)));
    CHECK_FALSE(kernels::grouped_fits(w(128, 8, at::kFloat)));
    CHECK(kernels::grouped_fits(w(128, 8), w(128, 8)));
    CHECK_FALSE(kernels::grouped_fits(w(128, 8), w(128, 8, at::kDouble)));
    CHECK_FALSE(kernels::grouped_fits(w(128, 16).slice(2, 0, 8)));
    Groups g({1, 1}, 128, 64);
    CHECK_THROWS_AS(kernels::grouped_nt(g.x, g.offsets_E1.to(at::kLong), g.w, g.like_y()), Error);
    CHECK_THROWS_AS(kernels::grouped_nt(g.x, g.offsets_E1.cpu(), g.w, g.like_y()), Error);
    CHECK_THROWS_AS(kernels::grouped_nt(g.dy, g.offsets_E1, g.w, g.like_y()), Error);
    CHECK_THROWS_AS(kernels::grouped_nt(g.x.narrow(1, 0, 56), g.offsets_E1, g.w, g.like_y()), Error);
    CHECK_THROWS_AS(kernels::add_grouped_tn(g.dy, g.x, g.offsets_E1, g.dw.to(at::kDouble)), Error);
}
