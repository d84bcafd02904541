#include "core/kernels/dropout/dropout.h"
#include "tests/unit/kernels/reference.h"

#include <ATen/TensorOperators.h>

using namespace moe;
using namespace moe::kernels;
using namespace moe::kernels::test;

namespace {
RandomRows rows(int64_t first = 0, int64_t group = 1, int64_t stride = 1) { return {{17, Purpose::expert_dropout, 3, 5}, first, group, stride}; }
Tensor mask(int64_t R, int64_t C, double p, const RandomRows& r, at::ScalarType dtype = at::kDouble) { return dropout_mask(R, C, p, r, dtype, at::kCPU); }
Tensor normals(int64_t R, int64_t C, const RandomRows& r, at::ScalarType dtype = at::kDouble) { return normal_rows(R, C, r, dtype, at::kCPU); }

/// Both kinds of draws, for what holds of either.
using Draw = std::function<Tensor(int64_t, int64_t, const RandomRows&)>;
const Draw kDraws[] = {[](int64_t R, int64_t C, const RandomRows& r) { return mask(R, C, 0.4, r); }, [](int64_t R, int64_t C, const RandomRows& r) { return normals(R, C, r); }};
}  // namespace

TEST_CASE("dropout_mask: a share p is zero, the rest keeps the mean, p = 0 keeps everything", "[kernels][dropout]") {
    for (double p : {0.1, 0.5, 0.9}) {
        INFO("p " << p);
        constexpr int64_t R = 300, C = 201;
        auto x = values(mask(R, C, p, rows()));
        double zeros = 0;
        for (double v : x) {
            REQUIRE((v == 0 || v == 1 / (1 - p)));
            zeros += v == 0;
        }
        CHECK(std::abs(zeros / (R * C) - p) < 5 * std::sqrt(p * (1 - p) / (R * C)));
        for (int64_t c : {0, 1, 2, 3, 200}) {                            // no column is special: each word of a block is drawn
            double column = 0;
            for (int64_t r = 0; r < R; ++r) column += x[size_t(r * C + c)] == 0;
            CHECK(std::abs(column / R - p) < 5 * std::sqrt(p * (1 - p) / R));
        }
    }
    CHECK(bit_equal(mask(9, 7, 0, rows()), at::ones({9, 7}, at::kDouble)));
    CHECK(mask(0, 7, 0.5, rows()).sizes() == at::IntArrayRef({0, 7}));
}

TEST_CASE("normal_rows: mean 0, variance 1, the fourth moment 3, columns uncorrelated", "[kernels][dropout]") {
    constexpr int64_t R = 500, C = 203;
    auto x = values(normals(R, C, rows()));
    double n = R * C, mean = 0, square = 0, fourth = 0, neighbours = 0;
    for (size_t i = 0; i < x.size(); ++i) {
        REQUIRE(std::isfinite(x[i]));
        mean += x[i] / n;
        square += x[i] * x[i] / n;
        fourth += x[i] * x[i] * x[i] * x[i] / n;
        if (i) neighbours += x[i] * x[i - 1] / n;
    }
    CHECK(std::abs(mean) < 5 / std::sqrt(n));
    CHECK(std::abs(square - 1) < 5 * std::sqrt(2 / n));
    CHECK(std::abs(fourth - 3) < 5 * std::sqrt(96 / n));
    CHECK(std::abs(neighbours) < 5 / std::sqrt(n));
}

TEST_CASE("random rows: an element depends on its row's number and its column, not on the matrix that it is in", "[kernels][dropout]") {
    for (auto& draw : kDraws) {
        Tensor whole = draw(40, 21, rows());
        CHECK(bit_equal(draw(11, 21, rows(13)), whole.narrow(0, 13, 11).contiguous()));             // another first row
        for (int64_t C : {1, 2, 3, 4, 5, 18}) CHECK(bit_equal(draw(40, C, rows()), whole.narrow(1, 0, C).contiguous()));
        // Heads 2 and 3 of 5, of tokens 4 …: a group of 2, a stride of 5.
        Tensor heads = draw(6, 21, rows(4 * 5 + 2, 2, 5));
        for (int64_t r = 0; r < 6; ++r) CHECK(bit_equal(heads.select(0, r), whole.select(0, (4 + r / 2) * 5 + 2 + r % 2)));
        int64_t far = int64_t(1) << 40;                                  // tokens beyond 32 bits are other tokens
        CHECK_FALSE(bit_equal(draw(3, 21, rows(far)), draw(3, 21, rows())));
        CHECK(bit_equal(draw(2, 21, rows(far + 1)), draw(3, 21, rows(far)).narrow(0, 1, 2).contiguous()));
    }
}

TEST_CASE("random rows: threads and the dtype change nothing, every part of the key changes all", "[kernels][dropout]") {
    for (auto& draw : kDraws) {
        Tensor one, two;
        with_threads(1, [&] { one = draw(700, 33, rows()); });
        with_threads(2, [&] { two = draw(700, 33, rows()); });
        CHECK(bit_equal(one, two));
        for (RandomKey key : {RandomKey{18, Purpose::expert_dropout, 3, 5}, RandomKey{17, Purpose::router_noise, 3, 5}, RandomKey{17, Purpose::expert_dropout, 4, 5}, RandomKey{17, Purpose::expert_dropout, 3, 6}})
            CHECK_FALSE(bit_equal(one, draw(700, 33, {key, 0, 1, 1})));
    }
    CHECK(bit_equal(mask(30, 9, 0.4, rows(), at::kFloat).gt(0), mask(30, 9, 0.4, rows()).gt(0)));
    CHECK(bit_equal(normals(30, 9, rows(), at::kFloat), normals(30, 9, rows()).to(at::kFloat)));
}

TEST_CASE("dropout: x times its mask, forward and backward, in every dtype", "[kernels][dropout]") {
    for (auto dtype : {at::kDouble, at::kFloat, at::kBFloat16}) {
        Tensor x = leaf(randn("x", {13, 10}), dtype), dy = randn("dy", {13, 10}).to(dtype), m = mask(13, 10, 0.3, rows(2), dtype == at::kDouble ? at::kDouble : at::kFloat), y = dropout(x, 0.3, rows(2));
        CHECK(bit_equal(y.detach(), (x.detach() * m).to(dtype)));
        CHECK(bit_equal(backward(y, {x}, dy)[0], (dy * m).to(dtype)));
        CHECK(bit_equal(dropout(x.detach(), 0.3, rows(2)), y.detach()));
        CHECK(dropout(x, 0, rows(2)).is_same(x));
    }
}

TEST_CASE("dropout: probabilities and shapes that cannot be are named with their values", "[kernels][dropout]") {
    require_error(ErrorKind::usage, "got 1, want 0 or more, below 1", [] { mask(2, 2, 1, rows()); });
    require_error(ErrorKind::usage, "-0.1", [] { dropout(randn("x", {2, 2}), -0.1, rows()); });
    require_error(ErrorKind::shape, "262145", [] { mask(1, 262145, 0.5, rows()); });
    require_error(ErrorKind::shape, "262145", [] { normals(1, 262145, rows()); });
}
