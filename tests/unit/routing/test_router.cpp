#include "core/base/error.h"
#include "core/routing/balance.h"
#include "core/routing/ledger.h"
#include "core/routing/router.h"
#include "core/routing/trace.h"
#include "tests/catch.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <numeric>

using namespace moe;
using namespace moe::routing;

namespace {
RouterSettings settings(int64_t E, int64_t K, int64_t groups, int64_t kept, Scoring scoring = Scoring::sigmoid) {
    RouterSettings s;
    s.num_experts = E; s.top_k = K; s.n_group = groups; s.topk_group = kept; s.scoring = scoring; s.scale = 2.5;
    return s;
}

struct Reference { std::vector<int64_t> ids; std::vector<double> weights; };
/// One token by the paper's text, sorting in plain loops.
Reference route_token(const std::vector<double>& logits, const std::vector<double>& bias, const RouterSettings& s) {
    int64_t E = s.num_experts, per = E / s.n_group;
    std::vector<double> score(logits.size()), choice(logits.size());
    double sum = 0;
    for (double l : logits) sum += std::exp(l / s.temperature);
    for (int64_t e = 0; e < E; ++e) {
        score[e] = s.scoring == Scoring::softmax ? std::exp(logits[e] / s.temperature) / sum : 1 / (1 + std::exp(-logits[e] / s.temperature));
        choice[e] = score[e] + (s.with_bias ? bias[e] : 0);
    }
    std::vector<std::pair<double, int64_t>> groups;
    for (int64_t g = 0; g < s.n_group; ++g) {
        std::vector<double> members(choice.begin() + g * per, choice.begin() + (g + 1) * per);
        std::sort(members.rbegin(), members.rend());
        groups.push_back({s.with_bias && per > 1 ? members[0] + members[1] : members[0], g});
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

std::vector<double> row(const at::Tensor& t) { auto c = t.contiguous(); return {c.data_ptr<double>(), c.data_ptr<double>() + c.numel()}; }
}  // namespace

TEST_CASE("router: ids and weights are those of the paper's text, token by token", "[routing]") {
    struct Case { const char* name; RouterSettings s; double bias_mean; };
    RouterSettings plain = settings(12, 3, 1, 1), grouped = settings(12, 3, 4, 2), softmax = settings(12, 4, 1, 1, Scoring::softmax), v2 = settings(12, 3, 3, 1, Scoring::softmax), warm = grouped;
    softmax.norm_topk = false;
    v2.with_bias = false;
    warm.temperature = 1.7;
    for (auto& c : {Case{"plain", plain, 0}, Case{"groups", grouped, 0}, Case{"groups, all biases below −1", grouped, -3}, Case{"softmax, weights not normalised", softmax, 0},
                    Case{"groups by their best expert, no bias", v2, 0}, Case{"temperature", warm, 0}}) {
        INFO(c.name);
        at::manual_seed(5);
        at::Tensor logits = at::randn({19, 12}, at::kDouble), bias = at::randn({12}, at::kDouble) * 0.3 + c.bias_mean;
        at::Tensor s = scores(logits, c.s), ids = choose(s, c.s.with_bias ? bias : at::Tensor(), c.s), w = weights(s, ids, c.s);
        for (int64_t t = 0; t < 19; ++t) {
            Reference want = route_token(row(logits[t]), row(bias), c.s);
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

TEST_CASE("router: top-k ids are unique per token and within the kept groups", "[routing]") {
    RouterSettings s = settings(16, 4, 4, 2);
    at::Tensor sc = scores(at::randn({100, 16}), s), ids = choose(sc, at::full({16}, -5.0f), s);      // −5: masked experts as 0 would win
    for (int64_t t = 0; t < 100; ++t) {
        std::vector<int64_t> seen, groups;
        for (int64_t k = 0; k < 4; ++k) { seen.push_back(ids[t][k].item<int64_t>()); groups.push_back(seen.back() / 4); }
        std::sort(seen.begin(), seen.end());
        REQUIRE(std::adjacent_find(seen.begin(), seen.end()) == seen.end());
        std::sort(groups.begin(), groups.end());
        REQUIRE(std::unique(groups.begin(), groups.end()) - groups.begin() <= 2);
    }
}

TEST_CASE("router: a bias changes who is chosen but not the weight of the chosen", "[routing]") {
    RouterSettings s = settings(6, 2, 1, 1);
    s.norm_topk = false;
    at::Tensor sc = scores(at::randn({9, 6}, at::kDouble), s), bias = at::zeros({6}, at::kDouble);
    bias[4] = 100;
    at::Tensor ids = choose(sc, bias, s), w = weights(sc, ids, s);
    for (int64_t t = 0; t < 9; ++t) {
        REQUIRE(ids[t][0].item<int64_t>() == 4);
        REQUIRE(w[t][0].item<double>() == Approx(2.5 * sc[t][4].item<double>()));
    }
}

TEST_CASE("router: logits of another width are refused with both widths", "[routing]") {
    REQUIRE_THROWS_WITH(scores(at::randn({3, 5}), settings(6, 2, 1, 1)), Catch::Contains("5") && Catch::Contains("[T, 6]"));
}

TEST_CASE("ledger: padding counts nowhere, domains add up to the totals", "[routing]") {
    Ledger ledger(3, 4, 2, at::kCPU);
    at::Tensor ids = at::tensor({0, 1, 1, 3, 3, 0, 2, 3}, at::kLong).view({4, 2}), domain = at::tensor({0, 1, -1, 1}, at::kInt);
    ledger.count(1, ids, domain);
    ledger.count(1, ids, domain);
    at::Tensor by = ledger.counts_by_domain(), counts = ledger.counts();
    REQUIRE(by.sizes() == at::IntArrayRef({3, 2, 4}));
    REQUIRE(at::equal(by[1], at::tensor({2, 2, 0, 0, 0, 2, 2, 4}, at::kLong).view({2, 4})));
    REQUIRE(at::equal(counts[1], at::tensor({2, 4, 2, 4}, at::kLong)));
    REQUIRE(counts[0].sum().item<int64_t>() + counts[2].sum().item<int64_t>() == 0);
    ledger.clear();
    REQUIRE(ledger.counts().sum().item<int64_t>() == 0);
    REQUIRE_THROWS_AS(ledger.count(3, ids, domain), Error);
}

TEST_CASE("balance: each rule moves the bias towards equal load", "[routing]") {
    at::Tensor counts = at::tensor({10, 2, 6, 6}, at::kLong);        // mean 6
    auto moved = [&](const char* rule) { at::Tensor b = at::zeros({4}, at::kDouble); update_bias(b, counts, 0.1, rule); return b; };
    REQUIRE(at::allclose(moved("sign"), at::tensor({-0.1, 0.1, 0.0, 0.0}, at::kDouble)));
    REQUIRE(at::allclose(moved("magnitude"), at::tensor({-0.4 / 6, 0.4 / 6, 0.0, 0.0}, at::kDouble)));
    at::Tensor skewed = at::tensor({9, 9, 9, 1}, at::kLong), b = at::zeros({4}, at::kDouble);      // signs −, −, −, + : mean −0.5
    update_bias(b, skewed, 0.1, "centred");
    REQUIRE(at::allclose(b, at::tensor({-0.05, -0.05, -0.05, 0.15}, at::kDouble)));
    at::Tensor still = at::zeros({4}, at::kDouble);
    update_bias(still, at::zeros({4}, at::kLong), 0.1, "sign");
    REQUIRE(still.abs().sum().item<double>() == 0);
    REQUIRE_THROWS_AS(update_bias(still, counts, 0.1, "up"), Error);
}

TEST_CASE("trace: load, tokens and examples come from the same raw record", "[routing]") {
    Trace trace(3, {"a", "b"});
    trace.begin(at::tensor({7, 8, 7, 9}, at::kLong), at::tensor({0, 1, 0, -1}, at::kInt));
    trace.add(2, at::tensor({0, 1, 1, 2, 1, 0, 1, 2}, at::kLong).view({4, 2}));
    trace.begin(at::tensor({7}, at::kLong), at::tensor({1}, at::kInt));
    trace.add(2, at::tensor({1, 2}, at::kLong).view({1, 2}));
    REQUIRE(trace.num_tokens() == 5);
    REQUIRE(trace.layers() == std::vector<int64_t>{2});
    REQUIRE(at::equal(trace.load(2), at::tensor({2, 2, 0, 0, 2, 2}, at::kLong).view({2, 3})));
    REQUIRE(trace.tokens(2, 1, 5) == std::vector<std::pair<int64_t, int64_t>>{{7, 3}, {8, 1}});
    REQUIRE(trace.examples(2, 1, 2) == std::vector<int64_t>{1, 4});
    REQUIRE_THROWS_AS(trace.load(0), Error);
    REQUIRE_THROWS_AS(trace.tokens(2, 3, 1), Error);
    REQUIRE_THROWS_AS(Trace(3, {"a"}).ids(), Error);
}
