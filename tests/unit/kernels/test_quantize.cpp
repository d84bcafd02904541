#include "core/base/error.h"
#include "core/kernels/quantize/quantize.h"
#include "tests/unit/kernels/cuda_compare.h"

#include <cmath>
#include <limits>

using namespace moe;
using namespace moe::test;
using kernels::QuantizedRows;
using kernels::QuantizedWeight;

namespace {
Tensor random_numbers(at::IntArrayRef sizes, uint64_t seed, at::ScalarType dtype = at::kBFloat16) {
    Tensor x = at::randn(sizes, at::make_generator<at::CPUGeneratorImpl>(seed), at::TensorOptions().dtype(at::kDouble));
    // Sizes that differ from block to block.
    return (x * at::linspace(-12, 12, sizes.back(), x.options()).exp2()).to(dtype);
}
QuantizedRows rows_of(const Tensor& x, const Tensor& used = {}) {
    QuantizedRows q = kernels::empty_quantized_rows(x.size(0), x.size(1), x);
    q.scale_KR.fill_(-1);
    q.q_RK.fill_(0.5);
    kernels::quantize_rows(x, q, used);
    return q;
}
QuantizedWeight weight_of(const Tensor& w) {
    QuantizedWeight q = kernels::empty_quantized_weight(w.dim() == 3 ? w.size(0) : 1, w.size(-2), w.size(-1), w);
    kernels::quantize_weight(w, q);
    return q;
}
Tensor bytes(const Tensor& q) { return q.cpu().view(at::kByte); }

/// The E4M3 number nearest to x, ties to even mantissas, by its definition in float64: 3 bits after the point, exponents from -6, subnormals of 2^-9.
double nearest_e4m3(double x) {
    if (x == 0) return 0;
    const int exponent = std::max(int(std::floor(std::log2(std::fabs(x)))), -6);
    const double step = std::ldexp(1.0, exponent - 3);
    return std::min(std::nearbyint(std::fabs(x) / step) * step, 448.0) * (x < 0 ? -1 : 1);
}
}  // namespace

TEST_CASE("quantize: a row's blocks of 128 have their largest value at 448, the rest is the nearest E4M3", "[kernels]") {
    const int64_t R = 5, K = 300;
    Tensor x = random_numbers({R, K}, 1, at::kFloat);
    QuantizedRows got = rows_of(x);
    REQUIRE(got.scale_KR.sizes() == at::IntArrayRef({3, 8}));
    Tensor q = got.q_RK.to(at::kDouble), wide = x.to(at::kDouble);
    for (int64_t r = 0; r < R; ++r)
        for (int64_t b = 0; b < 3; ++b) {
            Tensor block = wide[r].slice(0, b * 128, std::min<int64_t>(b * 128 + 128, K));
            const double scale = got.scale_KR[b][r].item<double>();
            CHECK(std::fabs(scale / (block.abs().max().item<double>() / 448) - 1) < 1e-7);
            for (int64_t k = 0; k < block.numel(); ++k) {
                const double value = block[k].item<double>() / scale, rounded = q[r][b * 128 + k].item<double>();
                // A value next to the middle of two numbers may go either way in fp32.
                CHECK((rounded == nearest_e4m3(value) || rounded == nearest_e4m3(value * (1 + 1e-6)) || rounded == nearest_e4m3(value * (1 - 1e-6))));
            }
        }
    check_close("rows, against bf16's own numbers", kernels::dequantize_rows(rows_of(x.to(at::kBFloat16))), x, 4e-2);
}

TEST_CASE("quantize: a weight's scales are those of 128 x 128, and its transposed copy holds the same numbers", "[kernels]") {
    for (auto [E, O, I] : {std::tuple<int64_t, int64_t, int64_t>{2, 256, 144}, {1, 16, 400}, {3, 130, 129}}) {
        Tensor w = random_numbers({E, O, I}, 2);
        QuantizedWeight got = weight_of(w);
        CHECK(bytes(got.q_EIO).equal(bytes(got.q_EOI).transpose(1, 2)));
        for (int64_t e = 0; e < E; ++e)
            for (int64_t o = 0; o < got.scale_EOI.size(1); ++o)
                for (int64_t i = 0; i < got.scale_EOI.size(2); ++i) {
                    Tensor block = w[e].slice(0, o * 128, std::min<int64_t>(o * 128 + 128, O)).slice(1, i * 128, std::min<int64_t>(i * 128 + 128, I)).to(at::kDouble);
                    CHECK(std::fabs(got.scale_EOI[e][o][i].item<double>() / (block.abs().max().item<double>() / 448) - 1) < 1e-7);
                }
        check_close("weight", kernels::dequantize_weight(got), w, 5e-2);
    }
    Tensor flat = random_numbers({64, 32}, 3);
    CHECK(bytes(weight_of(flat).q_EOI[0]).equal(bytes(weight_of(flat.unsqueeze(0)).q_EOI[0])));
}

TEST_CASE("quantize: zeros and tiny values have a scale of 1, NaN and infinity stay within their block", "[kernels]") {
    Tensor x = random_numbers({4, 256}, 4, at::kFloat);
    x[0].slice(0, 0, 128).zero_();
    x[1].slice(0, 0, 128).fill_(1e-38);
    x[2][5] = std::numeric_limits<float>::quiet_NaN();
    x[3][200] = -std::numeric_limits<float>::infinity();
    QuantizedRows q = rows_of(x);
    Tensor back = kernels::dequantize_rows(q);
    CHECK(q.scale_KR[0][0].item<float>() == 1);
    CHECK(q.scale_KR[0][1].item<float>() == 1);
    CHECK(back.slice(0, 0, 2).slice(1, 0, 128).eq(0).all().item<bool>());
    CHECK(back[2].slice(0, 0, 128).isnan().all().item<bool>());
    CHECK(back[3].slice(0, 128, 256).isnan().all().item<bool>());
    CHECK(back[2].slice(0, 128, 256).isfinite().all().item<bool>());
    CHECK(back[3].slice(0, 0, 128).isfinite().all().item<bool>());
}

TEST_CASE("quantize: rows that do not count stay as they are, and wrong tensors are refused", "[kernels]") {
    Tensor x = random_numbers({6, 128}, 5);
    QuantizedRows part = rows_of(x, at::tensor({4}, at::kInt)), all = rows_of(x);
    CHECK(bytes(part.q_RK).slice(0, 0, 4).equal(bytes(all.q_RK).slice(0, 0, 4)));
    CHECK(part.q_RK.slice(0, 4).to(at::kFloat).eq(0.5).all().item<bool>());
    CHECK(part.scale_KR.slice(1, 4).eq(-1).all().item<bool>());
    CHECK_THROWS_AS(kernels::quantize_rows(x, kernels::empty_quantized_rows(6, 256, x)), Error);
    CHECK_THROWS_AS(kernels::quantize_rows(x.to(at::kDouble), kernels::empty_quantized_rows(6, 128, x)), Error);
    CHECK_THROWS_AS(kernels::quantize_weight(x, kernels::empty_quantized_weight(1, 128, 6, x)), Error);
    CHECK(rows_of(x.slice(0, 0, 0)).q_RK.numel() == 0);
}

TEST_CASE("cuda quantize: the CPU's bits", "[gpu][kernels]") {
    if (!has_gpu()) return;
    for (at::ScalarType dtype : {at::kBFloat16, at::kFloat}) {
        for (auto [R, K] : {std::pair<int64_t, int64_t>{1, 8}, {33, 128}, {130, 264}, {257, 1408}}) {
            Tensor x = random_numbers({R, K}, 6, dtype);
            x[0].zero_();
            if (R > 20) x[20][7] = std::numeric_limits<float>::quiet_NaN(), x[21][8 % K] = std::numeric_limits<float>::infinity();
            QuantizedRows want = rows_of(x), got = rows_of(x.cuda());
            INFO(R << " x " << K);
            CHECK(kernels::dequantize_rows(got).cpu().equal(kernels::dequantize_rows(want)) == (R <= 20));      // NaN differs from NaN
            CHECK(kernels::dequantize_rows(got).cpu().nan_to_num(7).equal(kernels::dequantize_rows(want).nan_to_num(7)));
            CHECK(got.scale_KR.cpu().nan_to_num(7).equal(want.scale_KR.nan_to_num(7)));
        }
        for (auto [E, O, I] : {std::tuple<int64_t, int64_t, int64_t>{2, 256, 144}, {1, 16, 400}, {3, 272, 16}, {2, 384, 256}}) {
            Tensor w = random_numbers({E, O, I}, 7, dtype);
            QuantizedWeight want = weight_of(w), got = weight_of(w.cuda());
            INFO(E << " x " << O << " x " << I);
            CHECK(bytes(got.q_EOI).equal(bytes(want.q_EOI)));
            CHECK(bytes(got.q_EIO).equal(bytes(want.q_EIO)));
            CHECK(got.scale_EOI.cpu().equal(want.scale_EOI));
        }
    }
    Tensor x = random_numbers({300, 256}, 8);
    QuantizedRows part = rows_of(x.cuda(), at::tensor({70}, at::kInt).cuda()), all = rows_of(x);
    CHECK(bytes(part.q_RK).slice(0, 0, 70).equal(bytes(all.q_RK).slice(0, 0, 70)));
    CHECK(part.q_RK.cpu().slice(0, 96).to(at::kFloat).eq(0.5).all().item<bool>());
}
