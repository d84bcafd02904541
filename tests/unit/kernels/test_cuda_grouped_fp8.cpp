#include "core/base/error.h"
#include "core/kernels/grouped/grouped.h"
#include "tests/unit/kernels/cuda_compare.h"

#include <limits>

#ifdef MOE_WITH_CUDA
#include <ATen/cuda/CUDAContext.h>
#endif

using namespace moe;
using namespace moe::test;

namespace {
bool fits_here() {
    if (!has_gpu()) return false;
    if (kernels::grouped_fp8_fits(128, 128, at::Device(at::kCUDA, 0))) return true;
    std::puts("skipped: no device of compute capability 9.0");
    return false;
}

/// Both products on quantised numbers, `spare` rows behind the last group; without tiles one group of `spare` rows.
struct Groups {
    std::vector<int64_t> ends;
    int64_t E, R, O, I;
    Tensor offsets_E1;
    kernels::QuantizedRows x, dy;
    kernels::QuantizedWeight w;

    Groups(std::vector<int64_t> tiles, int64_t out, int64_t in, int64_t spare) : E(tiles.empty() ? 1 : int64_t(tiles.size())), O(out), I(in) {
        std::vector<int64_t> offsets{0};
        for (int64_t n : tiles) offsets.push_back(offsets.back() + 128 * n);
        R = offsets.back() + spare;
        if (tiles.empty()) offsets.push_back(R);
        else offsets_E1 = longs(offsets).to(at::kInt).cuda();
        ends = offsets;
        Tensor x_bf16 = numbers({R, I}, 1), dy_bf16 = numbers({R, O}, 2);
        x_bf16.slice(0, offsets.back()).fill_(std::numeric_limits<double>::quiet_NaN()), dy_bf16.slice(0, offsets.back()).fill_(std::numeric_limits<double>::quiet_NaN());
        x = kernels::empty_quantized_rows(R, I, x_bf16), dy = kernels::empty_quantized_rows(R, O, x_bf16), w = kernels::empty_quantized_weight(E, O, I, x_bf16);
        kernels::quantize_rows(x_bf16, x), kernels::quantize_rows(dy_bf16, dy), kernels::quantize_weight(numbers({E, O, I}, 3), w);
    }
    static Tensor numbers(at::IntArrayRef sizes, uint64_t seed) {
        Tensor t = at::randn(sizes, at::make_generator<at::CPUGeneratorImpl>(seed), at::TensorOptions().dtype(at::kDouble));
        // Scales that differ along both, so that one scale in another's place shows.
        t *= at::linspace(-2, 2, sizes.back(), t.options()).exp2() * (at::arange(sizes[sizes.size() - 2], t.options()) * 0.37).sin().exp2().unsqueeze(1);
        return t.to(at::kBFloat16).cuda();
    }
    Tensor like(int64_t columns) const { return at::full({R, columns}, 7, at::TensorOptions().dtype(at::kBFloat16).device(at::kCUDA)); }
    Tensor y() const {
        Tensor out = like(O);
        kernels::grouped_nt_fp8(x, offsets_E1, w, out);
        return out;
    }
    Tensor dx() const {
        Tensor out = like(I);
        kernels::grouped_nn_fp8(dy, offsets_E1, w, out);
        return out;
    }
    Tensor reference(const kernels::QuantizedRows& a, int64_t columns, bool transposed) const {
        Tensor out = like(columns).to(at::kCPU, at::kDouble), rows = kernels::dequantize_rows(a).to(at::kCPU, at::kDouble), weight = kernels::dequantize_weight(w).to(at::kCPU, at::kDouble);
        for (int64_t e = 0; e < E; ++e) out.slice(0, ends[e], ends[e + 1]) = rows.slice(0, ends[e], ends[e + 1]).mm(transposed ? weight[e] : weight[e].t());
        return out;
    }
};

void compare_groups(const std::string& what, const Groups& g) {
    Tensor y = g.y(), dx = g.dx();
    check_close(what + " fp8 y", y, g.reference(g.x, g.O, false), 2e-3);
    check_close(what + " fp8 dx", dx, g.reference(g.dy, g.I, true), 2e-3);
    for (int i = 0; i < 5; ++i) {
        CHECK(g.y().equal(y));
        CHECK(g.dx().equal(dx));
    }
}
}  // namespace

TEST_CASE("cuda grouped fp8: products are those of float64 on the same numbers, rows past the end stay as they are", "[gpu][kernels]") {
    if (!fits_here()) return;
    compare_groups("empty at start, middle and end", {{0, 1, 3, 0, 0, 2, 0}, 384, 144, 200});
    compare_groups("groups of one tile", {{1, 1, 1, 1, 1}, 256, 256, 0});
    compare_groups("one group has all", {{0, 0, 5, 0}, 128, 64, 128});
    compare_groups("many tiles a block", {{9, 40, 1, 17, 0, 30}, 656, 272, 0});
    compare_groups("256 groups, most empty", {[] {
                       std::vector<int64_t> tiles(256, 0);
                       for (int e : {3, 4, 100, 254}) tiles[e] = 1;
                       return tiles;
                   }(), 128, 80, 56});
}

TEST_CASE("cuda grouped fp8: one group without offsets takes any number of rows", "[gpu][kernels]") {
    if (!fits_here()) return;
    for (int64_t rows : {1, 100, 128, 333, 1664}) compare_groups(std::to_string(rows) + " rows", {{}, 400, 272, rows});
}

TEST_CASE("cuda grouped fp8: no rows at all leave the result alone, wrong tensors are refused", "[gpu][kernels]") {
    if (!fits_here()) return;
    Groups g({0, 0, 0}, 128, 64, 300);
    CHECK(g.y().equal(g.like(128)));
    CHECK(g.dx().equal(g.like(64)));
    Groups two({1, 1}, 128, 64, 0);
    CHECK_THROWS_AS(kernels::grouped_nt_fp8(two.dy, two.offsets_E1, two.w, two.like(128)), Error);
    CHECK_THROWS_AS(kernels::grouped_nt_fp8(two.x, {}, two.w, two.like(128)), Error);
    CHECK_THROWS_AS(kernels::grouped_nn_fp8(two.dy, two.offsets_E1.to(at::kLong), two.w, two.like(64)), Error);
    CHECK_FALSE(kernels::grouped_fp8_fits(128, 72, at::Device(at::kCUDA, 0)));
    CHECK_FALSE(kernels::grouped_fp8_fits(128, 64, at::kCPU));
}
