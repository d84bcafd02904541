#include "core/kernels/route/route.h"
#include "tests/catch.h"
#include "tests/differences.h"
#include "tests/unit/kernels/reference.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>

using namespace moe;
using namespace moe::kernels;
using namespace moe::kernels::test;

namespace {
RouteOptions options(int64_t K, int64_t groups, int64_t kept, bool softmax = false) {
    RouteOptions o;
    o.top_k = K; o.n_group = groups; o.topk_group = kept; o.softmax = softmax; o.scale = 2.5;
    return o;
}

struct Reference { std::vector<int64_t> ids; std::vector<double> weights; };
/// One token by the paper's text, sorting in plain loops.
Reference route_token(const std::vector<double>& logits, const std::vector<double>& bias, const RouteOptions& s) {
    int64_t E = int64_t(logits.size()), per = E / s.n_group;
    std::vector<double> score(logits.size()), choice(logits.size());
    double sum = 0;
    for (double l : logits) sum += std::exp(l / s.temperature);
    for (int64_t e = 0; e < E; ++e) {
        score[e] = s.softmax ? std::exp(logits[e] / s.temperature) / sum : 1 / (1 + std::exp(-logits[e] / s.temperature));
        choice[e] = score[e] + (bias.empty() ? 0 : bias[e]);
    }
    std::vector<std::pair<double, int64_t>> groups;
    for (int64_t g = 0; g < s.n_group; ++g) {
        std::vector<double> members(choice.begin() + g * per, choice.begin() + (g + 1) * per);
        std::sort(members.rbegin(), members.rend());
        groups.push_back({s.best_two && per > 1 ? members[0] + members[1] : members[0], g});
    }
    std::sort(groups.rbegin(), groups.rend());
    std::vector<std::pair<double, int64_t>> allowed;
    for (int64_t i = 0; i < s.topk_group; ++i)
        for (int64_t e = groups[i].second * per; e < (groups[i].second + 1) * per; ++e) allowed.push_back({choice[e], e});
    std::sort(allowed.rbegin(), allowed.rend());
    Reference r;
    double total = 0;
    for (int64_t k = 0; k < s.top_k; ++k) { r.ids.push_back(allowed[k].second); r.weights.push_back(score[allowed[k].second]); total += r.weights.back(); }
    for (double& w : r.weights) w = w / (s.norm_topk ? total : 1) * s.scale;
    return r;
}

std::vector<double> row(const Tensor& t) { auto c = t.contiguous(); return {c.data_ptr<double>(), c.data_ptr<double>() + c.numel()}; }
}  // namespace

TEST_CASE("route: ids and weights are those of the paper's text, token by token", "[kernels][route]") {
    struct Case { const char* name; RouteOptions s; double bias_mean; };
    RouteOptions plain = options(3, 1, 1), grouped = options(3, 4, 2), softmax = options(4, 1, 1, true), v2 = options(3, 3, 1, true), warm = grouped, single = options(2, 12, 5);
    softmax.norm_topk = false;
    v2.best_two = false;
    warm.temperature = 1.7;
    for (auto& c : {Case{"plain", plain, 0}, Case{"groups", grouped, 0}, Case{"groups, all biases below −1", grouped, -3}, Case{"softmax, weights not normalised", softmax, 0},
                    Case{"groups by their best expert, no bias", v2, 0}, Case{"temperature", warm, 0}, Case{"groups of one", single, 0}}) {
        INFO(c.name);
        at::manual_seed(5);
        Tensor logits = at::randn({19, 12}, at::kDouble), bias = at::randn({12}, at::kDouble) * 0.3 + c.bias_mean;
        auto [s, w, ids] = route(logits, c.s.best_two ? bias : Tensor(), c.s);
        for (int64_t t = 0; t < 19; ++t) {
            Reference want = route_token(row(logits[t]), c.s.best_two ? row(bias) : std::vector<double>(), c.s);
            std::vector<std::pair<int64_t, double>> got, expected;
            for (int64_t k = 0; k < c.s.top_k; ++k) {
                got.push_back({ids[t][k].item<int64_t>(), w[t][k].item<double>()});
                expected.push_back({want.ids[k], want.weights[k]});
            }
            std::sort(got.begin(), got.end());
            std::sort(expected.begin(), expected.end());
            for (size_t k = 0; k < got.size(); ++k) {
                REQUIRE(got[k].first == expected[k].first);
                REQUIRE(std::abs(got[k].second - expected[k].second) < 1e-12);
            }
        }
    }
}

TEST_CASE("route: top-k ids are unique per token and within the kept groups", "[kernels][route]") {
    Tensor ids = route(at::randn({100, 16}), at::full({16}, -5.0f), options(4, 4, 2)).ids_TK;      // −5: masked experts as 0 would win
    for (int64_t t = 0; t < 100; ++t) {
        std::vector<int64_t> seen, groups;
        for (int64_t k = 0; k < 4; ++k) { seen.push_back(ids[t][k].item<int64_t>()); groups.push_back(seen.back() / 4); }
        std::sort(seen.begin(), seen.end());
        REQUIRE(std::adjacent_find(seen.begin(), seen.end()) == seen.end());
        std::sort(groups.begin(), groups.end());
        REQUIRE(std::unique(groups.begin(), groups.end()) - groups.begin() <= 2);
    }
}

TEST_CASE("route: a bias changes who is chosen but not the weight of the chosen", "[kernels][route]") {
    RouteOptions o = options(2, 1, 1);
    o.norm_topk = false;
    Tensor bias = at::zeros({6}, at::kDouble);
    bias[4] = 100;
    auto [sc, w, ids] = route(at::randn({9, 6}, at::kDouble), bias, o);
    for (int64_t t = 0; t < 9; ++t) {
        REQUIRE(ids[t][0].item<int64_t>() == 4);
        REQUIRE(w[t][0].item<double>() == Approx(2.5 * sc[t][4].item<double>()));
    }
}


TEST_CASE("route: gradients of weights and scores are those of the plain formulas", "[kernels][route]") {
    auto softmax = GENERATE(false, true), norm = GENERATE(false, true);
    constexpr int64_t T = 3, E = 7, K = 3;
    RouteOptions o = options(K, 1, 1, softmax);
    o.norm_topk = norm;
    o.temperature = 1.3;
    at::manual_seed(3);
    Tensor logits = at::randn({T, E}, at::kDouble).requires_grad_(true), dw = at::randn({T, K}, at::kDouble), ds = at::randn({T, E}, at::kDouble);
    auto [scores, weights, ids] = route(logits, {}, o);
    ((weights * dw).sum() + (scores * ds).sum()).backward();
    std::vector<double> x = row(logits.detach()), dwv = row(dw), dsv = row(ds);
    auto plain = [&] {
        double total = 0;
        for (int64_t t = 0; t < T; ++t) {
            double sum = 0, chosen = 0, s[E];
            for (int64_t e = 0; e < E; ++e) sum += std::exp(x[t * E + e] / 1.3);
            for (int64_t e = 0; e < E; ++e) s[e] = softmax ? std::exp(x[t * E + e] / 1.3) / sum : 1 / (1 + std::exp(-x[t * E + e] / 1.3));
            for (int64_t e = 0; e < E; ++e) total += s[e] * dsv[t * E + e];
            for (int64_t k = 0; k < K; ++k) chosen += s[ids[t][k].item<int64_t>()];
            for (int64_t k = 0; k < K; ++k) total += 2.5 * s[ids[t][k].item<int64_t>()] / (norm ? chosen : 1) * dwv[t * K + k];
        }
        return total;
    };
    auto want = moe::test::gradient(x, plain), got = row(logits.grad());
    for (size_t i = 0; i < want.size(); ++i) REQUIRE(std::abs(got[i] - want[i]) < 1e-8);
}

TEST_CASE("route: a given choice is only weighed", "[kernels][route]") {
    RouteOptions o = options(2, 1, 1);
    Tensor logits = at::randn({4, 5}, at::kDouble), ids = at::tensor({4, 0, 1, 2, 3, 4, 0, 1}, at::kLong).view({4, 2});
    auto r = route(logits, {}, o, ids);
    REQUIRE(at::equal(r.ids_TK, ids));
    Tensor s = logits.sigmoid().gather(1, ids);
    REQUIRE(at::allclose(r.weights_TK, s / s.sum(-1, true) * 2.5, 1e-12, 1e-12));
}

TEST_CASE("route: equal choices go to the lower id, NaN is chosen first and reaches the weights, infinities stay finite", "[kernels][route]") {
    RouteOptions o = options(2, 1, 1);
    Tensor same = route(at::zeros({1, 6}), {}, o).ids_TK;
    REQUIRE(same[0][0].item<int64_t>() == 0);
    REQUIRE(same[0][1].item<int64_t>() == 1);
    Tensor broken = at::zeros({1, 6});
    broken[0][3] = NAN;
    auto r = route(broken, {}, o);
    REQUIRE(r.ids_TK[0][0].item<int64_t>() == 3);
    REQUIRE(r.weights_TK.isnan().all().item<bool>());
    Tensor far = at::zeros({1, 6});
    far[0][2] = INFINITY;
    far[0][4] = -INFINITY;
    r = route(far, {}, o);
    REQUIRE(r.ids_TK[0][0].item<int64_t>() == 2);
    REQUIRE(r.weights_TK.isfinite().all().item<bool>());
}

TEST_CASE("route: options that do not fit the experts, and other shapes and types, are refused", "[kernels][route]") {
    Tensor logits = at::zeros({3, 6});
    RouteOptions o = options(4, 3, 1);
    require_error(ErrorKind::usage, "at most the 2 experts of 1 groups", [&] { route(logits, {}, o); });
    require_error(ErrorKind::usage, "n_group: got 4", [&] { route(logits, {}, options(1, 4, 1)); });
    require_error(ErrorKind::usage, "top_k: got 7", [&] { route(logits, {}, options(7, 1, 1)); });
    require_error(ErrorKind::shape, "bias", [&] { route(logits, at::zeros({5}), options(2, 1, 1)); });
    require_error(ErrorKind::shape, "ids", [&] { route(logits, {}, options(2, 1, 1), at::zeros({3, 1}, at::kLong)); });
    require_error(ErrorKind::dtype, "logits", [&] { route(logits.to(at::kBFloat16), {}, options(2, 1, 1)); });
    REQUIRE(route(at::zeros({0, 6}), {}, options(2, 1, 1)).weights_TK.sizes() == at::IntArrayRef({0, 2}));
}
