#include "core/kernels/embed/embed.h"
#include "core/kernels/permute/permute.h"
#include "tests/unit/kernels/reference.h"

using namespace moe;
using namespace moe::kernels;
using namespace moe::kernels::test;

namespace {
Tensor integers(const std::vector<int64_t>& v, at::IntArrayRef sizes) {
    Tensor t = at::empty(sizes, at::kLong);
    std::copy(v.begin(), v.end(), t.mutable_data_ptr<int64_t>());
    return t;
}
/// 5 tokens, 2 choices of 4 experts; expert 2 gets none, three pairs are dropped, token 3 goes nowhere.
const std::vector<int64_t> kIds = {1, 3, 0, 1, 3, -1, -1, -1, 1, 0};
constexpr int64_t kT = 5, kK = 2, kE = 4;
/// {row of each pair or −1, number of rows} by sorting pairs in plain loops.
std::pair<std::vector<int64_t>, int64_t> plain_positions() {
    std::vector<int64_t> position(kIds.size(), -1);
    int64_t row = 0;
    for (int64_t e = 0; e < kE; ++e)
        for (size_t p = 0; p < kIds.size(); ++p)
            if (kIds[p] == e) position[p] = row++;
    return {position, row};
}
}  // namespace

TEST_CASE("embed: rows of the table, and their gradients where ids repeat", "[kernels][embed]") {
    auto dtype = GENERATE(at::kDouble, at::kFloat, at::kBFloat16, at::kHalf);
    constexpr int64_t V = 6, D = 70;
    std::vector<int64_t> ids = {4, 0, 4, 5, 4};
    Tensor w0 = randn("w", {V, D}).to(dtype), dy = randn("dy", {5, D}).to(dtype);
    auto w = weight(w0, dtype);
    Tensor anchor = leaf(at::zeros({1}, at::kDouble)), y = embed(anchor, integers(ids, {5}), w);
    auto table = values(w0), d = values(dy);
    std::vector<double> want(5 * D), grad(V * D, 3.0);
    for (int64_t t = 0; t < 5; ++t)
        for (int64_t i = 0; i < D; ++i) {
            want[t * D + i] = table[ids[t] * D + i];
            grad[ids[t] * D + i] += d[t * D + i];
        }
    require_close(y, want, 0);
    w->grad.fill_(3);
    torch::autograd::grad({y}, {anchor}, {dy}, true, false, true);
    require_close(w->grad, grad, 1e-6);
    w->grad.fill_(NAN);
    w->is_grad_stale = true;
    torch::autograd::grad({y}, {anchor}, {dy}, {}, false, true);
    std::vector<double> without(grad);
    for (double& g : without) g -= 3;
    require_close(w->grad, without, 1e-6);
}

TEST_CASE("embed: a deferred gradient equals an immediate one on any number of threads", "[kernels][embed]") {
    GradSink sink;
    auto now = weight(randn("w", {3, 150}), at::kFloat), later = weight(randn("w", {3, 150}), at::kFloat);
    later->sink = &sink;
    Tensor anchor = leaf(at::zeros({1}, at::kDouble)), ids = integers({2, 2, 0, 2, 1, 0, 2}, {7}), dy = randn("dy", {7, 150}).to(at::kFloat);
    sink.defer(1, 2);
    with_threads(1, [&] { torch::autograd::grad({embed(anchor, ids, now)}, {anchor}, {dy}, {}, false, true); });
    torch::autograd::grad({embed(anchor, ids, later)}, {anchor}, {dy}, {}, false, true);
    CHECK(later->grad.abs().sum().item<double>() == 0);
    with_threads(2, [&] { sink.drain(1, 2); });
    CHECK(bit_equal(now->grad, later->grad));
}

TEST_CASE("embed: ids outside the table are named; no ids give no rows", "[kernels][embed]") {
    auto w = weight(randn("w", {6, 4}));
    require_error(ErrorKind::data, "embed: ids[1]: got 6, want an id in [0, 6)", [&] { embed({}, integers({0, 6}, {2}), w); });
    require_error(ErrorKind::data, "-1", [&] { embed({}, integers({-1}, {1}), w); });
    require_error(ErrorKind::dtype, "int32", [&] { embed({}, integers({1}, {1}).to(at::kInt), w); });
    CHECK(embed({}, integers({}, {0}), w).sizes() == at::IntArrayRef({0, 4}));
}

TEST_CASE("sort_by_expert: rows follow (expert, token, choice), dropped pairs have none", "[kernels][permute]") {
    auto plan = sort_by_expert(integers(kIds, {kT, kK}), kE);
    auto [position, rows] = plain_positions();
    REQUIRE(plan.R == rows);
    CHECK(plan.T == kT);
    CHECK(plan.K == kK);
    require_close(plan.position_TK, std::vector<double>(position.begin(), position.end()), 0);
    require_close(plan.groups.offsets_E1, {0, 2, 5, 5, 7}, 0);
    for (size_t p = 0; p < kIds.size(); ++p)
        if (position[p] >= 0) {
            CHECK(plan.token_R.select(0, position[p]).item<int32_t>() == int32_t(p / kK));
            CHECK(plan.choice_R.select(0, position[p]).item<int32_t>() == int32_t(p % kK));
        }
}

TEST_CASE("sort_by_expert: no tokens, and everything dropped", "[kernels][permute]") {
    auto none = sort_by_expert(integers({}, {0, 2}), 3);
    CHECK(none.R == 0);
    require_close(none.groups.offsets_E1, {0, 0, 0, 0}, 0);
    auto dropped = sort_by_expert(integers({-1, -1}, {2, 1}), 3);
    CHECK(dropped.R == 0);
    Tensor y = unpermute({}, at::zeros({0, 4}, at::kFloat), dropped);
    CHECK(y.abs().sum().item<double>() == 0);
    CHECK(y.sizes() == at::IntArrayRef({2, 4}));
}

TEST_CASE("sort_by_expert: groups start at multiples of align, what lies between is rows of zeros", "[kernels][permute]") {
    constexpr int64_t D = 3, align = 4;
    auto plain = sort_by_expert(integers(kIds, {kT, kK}), kE), plan = sort_by_expert(integers(kIds, {kT, kK}), kE, align);
    require_close(plan.groups.offsets_E1, {0, 4, 8, 8, 12}, 0);                 // groups of 2, 3, 0 and 2 rows
    REQUIRE(plan.R == 12);
    Tensor x = leaf(randn("x", {kT, D}), at::kDouble), w = leaf(randn("w", {kT, kK}), at::kDouble);
    auto [rows, weights] = permute(x, w, plan);
    auto [plain_rows, plain_weights] = permute(x, w, plain);
    for (auto [from, to, n] : {std::tuple(0, 0, 2), std::tuple(2, 4, 3), std::tuple(5, 8, 2)}) {
        CHECK(at::equal(rows.narrow(0, to, n), plain_rows.narrow(0, from, n)));
        CHECK(at::equal(weights.narrow(0, to, n), plain_weights.narrow(0, from, n)));
    }
    for (int64_t r : {2, 3, 7, 10, 11}) {
        CHECK(plan.token_R[r].item<int32_t>() == -1);
        CHECK(rows[r].abs().sum().item<double>() == 0);
        CHECK(weights[r].item<double>() == 0);
    }
    CHECK(at::equal(unpermute({}, rows, plan), unpermute({}, plain_rows, plain)));
    Tensor dy = randn("dy", {12, D});
    rows.backward(dy);                                                          // padding's gradient reaches no token
    auto token = values(plan.token_R), dyv = values(dy);
    std::vector<double> want(kT * D);
    for (int64_t r = 0; r < 12; ++r)
        for (int64_t d = 0; d < D && token[r] >= 0; ++d) want[int64_t(token[r]) * D + d] += dyv[r * D + d];
    require_close(x.grad(), want, 1e-12);
    require_error(ErrorKind::usage, "align", [&] { sort_by_expert(integers(kIds, {kT, kK}), kE, 0); });
}

TEST_CASE("permute: rows, weights and gradients equal plain loops", "[kernels][permute]") {
    auto dtype = GENERATE(at::kDouble, at::kFloat, at::kBFloat16, at::kHalf);
    constexpr int64_t D = 9;
    auto plan = sort_by_expert(integers(kIds, {kT, kK}), kE);
    auto [position, R] = plain_positions();
    Tensor x = leaf(randn("x", {kT, D}), dtype), w = leaf(randn("w", {kT, kK}), at::kFloat), dy = randn("dy", {R, D}).to(dtype), dw = randn("dw", {R}).to(at::kFloat);
    auto [rows, weights] = permute(x, w, plan);
    auto xv = values(x), wv = values(w), dyv = values(dy), dwv = values(dw);
    std::vector<double> want_rows(R * D), want_weights(R), want_dx(kT * D), want_dw(kT * kK);
    for (size_t p = 0; p < kIds.size(); ++p) {
        if (position[p] < 0) continue;
        want_weights[position[p]] = wv[p];
        want_dw[p] = dwv[position[p]];
        for (int64_t d = 0; d < D; ++d) {
            want_rows[position[p] * D + d] = xv[p / kK * D + d];
            want_dx[p / kK * D + d] += dyv[position[p] * D + d];
        }
    }
    require_close(rows, want_rows, 0);
    require_close(weights, want_weights, 0);
    auto g = torch::autograd::grad({rows, weights}, {x, w}, {dy, dw});
    require_close(g[0], want_dx, dtype == at::kBFloat16 ? 4e-3 : dtype == at::kHalf ? 6e-4 : 1e-6);
    require_close(g[1], want_dw, 0);
    auto only_x = torch::autograd::grad({permute(x, w, plan).first}, {x}, {dy});
    CHECK(bit_equal(only_x[0], g[0]));
}

TEST_CASE("unpermute: sums a token's rows onto the base, with gradients", "[kernels][permute]") {
    auto dtype = GENERATE(at::kDouble, at::kFloat, at::kBFloat16, at::kHalf);
    bool with_base = GENERATE(true, false);
    constexpr int64_t D = 5;
    auto plan = sort_by_expert(integers(kIds, {kT, kK}), kE);
    auto [position, R] = plain_positions();
    Tensor y = leaf(randn("y", {R, D}), dtype), base = leaf(randn("base", {kT, D}), dtype), dout = randn("dout", {kT, D}).to(dtype);
    Tensor out = unpermute(with_base ? base : Tensor(), y, plan);
    auto yv = values(y), want = with_base ? values(base) : std::vector<double>(kT * D), dv = values(dout);
    std::vector<double> want_dy(R * D);
    for (size_t p = 0; p < kIds.size(); ++p)
        for (int64_t d = 0; d < D && position[p] >= 0; ++d) {
            want[p / kK * D + d] += yv[position[p] * D + d];
            want_dy[position[p] * D + d] = dv[p / kK * D + d];
        }
    require_close(out, want, dtype == at::kBFloat16 ? 4e-3 : dtype == at::kHalf ? 6e-4 : 1e-6);
    auto g = torch::autograd::grad({out}, with_base ? std::vector<Tensor>{y, base} : std::vector<Tensor>{y}, {dout});
    require_close(g[0], want_dy, 0);
    if (with_base) CHECK(bit_equal(g[1], dout));
}

TEST_CASE("permute_and_input: x goes on as it is, and the gradients of both ways are added", "[kernels][permute]") {
    constexpr int64_t D = 9;
    auto plan = sort_by_expert(integers(kIds, {kT, kK}), kE);
    Tensor x = leaf(randn("x", {kT, D})), w = leaf(randn("w", {kT, kK})), dy = randn("dy", {plan.R, D}), more = randn("more", {kT, D});
    auto [rows, weights, same] = permute_and_input(x, w, plan);
    auto [want_rows, want_weights] = permute(x, w, plan);
    CHECK(bit_equal(rows, want_rows));
    CHECK(bit_equal(weights, want_weights));
    CHECK(same.const_data_ptr() == x.const_data_ptr());
    auto f = [&] {
        auto [a, unused, b] = permute_and_input(x.detach(), w.detach(), plan);
        return sum_of_products(a, dy) + sum_of_products(b, more);
    };
    require_close(torch::autograd::grad({rows, same}, {x}, {dy, more})[0], differences(x, f), 1e-9);
    auto again = permute_and_input(x, w, plan);
    CHECK(bit_equal(torch::autograd::grad({std::get<2>(again)}, {x}, {more})[0], more));
}

TEST_CASE("unpermute: two bases are added in one rounding, each gets the whole gradient", "[kernels][permute]") {
    auto [dtype, tolerance] = GENERATE(table<at::ScalarType, double>({{at::kDouble, 1e-14}, {at::kFloat, 1e-6}, {at::kBFloat16, 4e-3}, {at::kHalf, 6e-4}}));
    constexpr int64_t D = 5;
    auto plan = sort_by_expert(integers(kIds, {kT, kK}), kE);
    auto [position, R] = plain_positions();
    Tensor y = leaf(randn("y", {R, D}), dtype), base = leaf(randn("base", {kT, D}), dtype), more = leaf(randn("more", {kT, D}), dtype), dout = randn("dout", {kT, D}).to(dtype);
    Tensor out = unpermute(base, y, plan, more);
    auto yv = values(y), want = values(base), mv = values(more);
    for (size_t i = 0; i < want.size(); ++i) want[i] += mv[i];
    for (size_t p = 0; p < kIds.size(); ++p)
        for (int64_t d = 0; d < D && position[p] >= 0; ++d) want[p / kK * D + d] += yv[position[p] * D + d];
    require_close(out, want, tolerance);
    auto g = torch::autograd::grad({out}, {base, more}, {dout});
    CHECK(bit_equal(g[0], dout));
    CHECK(bit_equal(g[1], dout));
    require_error(ErrorKind::usage, "unpermute: base", [&] { unpermute({}, y, plan, more); });
    require_error(ErrorKind::shape, "unpermute: more", [&] { unpermute(base, y, plan, randn("m", {kT, D + 1}).to(dtype)); });
}

TEST_CASE("permute: wrong ids and shapes are named with their values", "[kernels][permute]") {
    require_error(ErrorKind::shape, "ids[1][0]: got 4, want an expert in [0, 4)", [] { sort_by_expert(integers({0, 4}, {2, 1}), 4); });
    require_error(ErrorKind::shape, "got -2", [] { sort_by_expert(integers({-2}, {1, 1}), 4); });
    auto plan = sort_by_expert(integers(kIds, {kT, kK}), kE);
    require_error(ErrorKind::shape, "permute: x: got [4, 3], want [5, any]", [&] { permute(randn("x", {4, 3}), randn("w", {kT, kK}), plan); });
    require_error(ErrorKind::shape, "unpermute: y: got [3, 3], want [7, any]", [&] { unpermute({}, randn("y", {3, 3}), plan); });
}
