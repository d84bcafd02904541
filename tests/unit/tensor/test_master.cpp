#include "core/tensor/master.h"

#include "tests/catch.h"

#include <ATen/ATen.h>

#include <bit>
#include <cmath>
#include <limits>

using namespace moe;

namespace {
/// Every exponent and sign, with low halves at, around and between the ties.
at::Tensor many() {
    std::vector<float> x;
    for (uint32_t high = 0; high < 0x10000; high += 7)
        for (uint32_t low : {0u, 1u, 0x1234u, 0x7FFFu, 0x8000u, 0x8001u, 0xFFFFu}) x.push_back(std::bit_cast<float>(high << 16 | low));
    for (uint32_t bits : {0x7F7FFFFFu, 0x7F800000u, 0xFF800000u, 0x80000000u, 0x00000001u}) x.push_back(std::bit_cast<float>(bits));
    return at::tensor(x);
}
}  // namespace

TEST_CASE("master: a weight and its rest give back every fp32 number bit for bit, a NaN without its payload", "[tensor]") {
    at::Tensor x = many();
    auto [weight, rest] = split_master(x);
    CHECK(weight.scalar_type() == at::kBFloat16);
    CHECK(rest.scalar_type() == at::kShort);
    at::Tensor back = joined_master(weight, rest), nan = x.isnan();
    CHECK(nan.any().item<bool>());
    CHECK(at::equal(back.view(at::kInt), x.view(at::kInt).masked_fill(nan, 0x7FC00000)));
    CHECK(at::equal(weight.isnan(), nan));
}

TEST_CASE("master: the weight is the nearest bf16 number, of two the one farther from zero", "[tensor]") {
    at::Tensor x = many();
    x = x.index({x.isfinite()});
    at::Tensor weight = rounded(x, at::kBFloat16), tie = x.view(at::kInt).bitwise_and(0xFFFF).eq(0x8000), even = x.to(at::kBFloat16);
    CHECK(at::equal(weight.masked_fill(tie, 0), even.masked_fill(tie, 0)));
    at::Tensor at_tie = weight.index({tie}).to(at::kDouble).abs(), exact = x.index({tie}).to(at::kDouble).abs();
    CHECK((at_tie > exact).all().item<bool>());
    CHECK(at::equal(rounded(x, at::kHalf), x.to(at::kHalf)));
    CHECK(rounded(x, at::kFloat).is_same(x) == false);
    CHECK(at::equal(rounded(x.to(at::kDouble), at::kBFloat16), weight));
}

TEST_CASE("master: writing sets masters and weights, whatever holds the masters", "[tensor]") {
    at::Tensor x = at::randn({6}), ones = at::ones({6});
    Master whole{at::zeros({6}), {}}, half{at::zeros({6}), at::zeros({6}, at::kHalf)}, split{at::zeros({6}, at::kShort), at::zeros({6}, at::kBFloat16)};
    for (const Master& m : {whole, half, split}) {
        m.write(x);
        CHECK(m.dtype() == at::kFloat);
        CHECK(at::equal(m.read(), x));
        if (m.value.defined()) CHECK(at::equal(m.value, rounded(x, m.value.scalar_type())));
        m.narrow(2, 4).view({2, 2}).write(ones.narrow(0, 0, 4).view({2, 2}));
        CHECK(at::equal(m.read(), at::cat({x.narrow(0, 0, 2), ones.narrow(0, 0, 4)})));
    }
}
