#include "core/base/error.h"
#include "core/routing/balance.h"
#include "core/routing/ledger.h"
#include "core/routing/trace.h"
#include "core/routing/trace_analysis.h"
#include "tests/catch.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <numeric>

using namespace moe;
using namespace moe::routing;

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

TEST_CASE("trace: a small limit streams to disk, and margins, entropies and changes by the bias are those of a plain loop", "[routing]") {
    const int64_t T = 5, E = 6, K = 2, B = 7;
    kernels::RouteOptions options;
    options.top_k = K;
    at::Tensor bias = at::tensor({0.3, -0.2, 0.0, 0.1, -0.4, 0.2}, at::kDouble);
    Trace whole({E, 1, T, {"a", "b"}, "bytes"}), streamed({E, 1, T, {"a", "b"}, "bytes"}, {true, 1, ""});
    std::vector<double> margins, entropies, changes;
    at::manual_seed(5);
    at::Tensor mean = at::zeros({E}, at::kDouble);
    for (int64_t b = 0; b < B; ++b) {
        at::Tensor logits = at::randn({T, E}, at::kDouble), domain = at::tensor({0, 1, -1, 0, 1}, at::kInt);
        kernels::Route route = kernels::route(logits, bias, options);
        for (Trace* trace : {&whole, &streamed}) {
            trace->begin(at::arange(T, at::kLong) + b, domain, T);
            trace->add(3, route.ids_TK);
            trace->add_details(3, logits, bias, route, options);
        }
        for (int64_t t = 0; t < T; ++t) {
            std::vector<double> score(E), chosen(E);
            double sum = 0, h = 0;
            for (int64_t e = 0; e < E; ++e) {
                score[size_t(e)] = 1 / (1 + std::exp(-logits[t][e].item<double>()));
                chosen[size_t(e)] = score[size_t(e)] + bias[e].item<double>();
                sum += score[size_t(e)];
            }
            for (double x : score) h -= x / sum * std::log(x / sum);
            auto sorted = chosen, plain = score;
            std::sort(sorted.rbegin(), sorted.rend());
            std::sort(plain.rbegin(), plain.rend());
            int64_t changed = 0;
            for (int64_t e = 0; e < E; ++e) changed += chosen[size_t(e)] >= sorted[K - 1] && score[size_t(e)] < plain[K - 1];
            if (t == 2) continue;
            margins.push_back(sorted[K - 1] - sorted[K]);
            entropies.push_back(h / std::log(double(E)));
            changes.push_back(double(changed));
            for (int64_t e = 0; e < E; ++e) mean[e] += score[size_t(e)] / sum;
        }
    }
    streamed.finish();
    REQUIRE(at::equal(whole.experts(3), streamed.experts(3)));
    REQUIRE(at::equal(whole.weights(3), streamed.weights(3)));
    REQUIRE(at::equal(whole.position(), streamed.position()));
    auto mean_of = [](const std::vector<double>& x) { return std::accumulate(x.begin(), x.end(), 0.0) / double(x.size()); };
    mean /= mean.sum();
    double information = -(mean * mean.log()).sum().item<double>() - mean_of(entropies) * std::log(double(E));
    for (const Trace* trace : {&whole, &streamed}) {
        DecisionStatistics s = decision_statistics(*trace, 3);
        REQUIRE(s.num_tokens == 4 * B);
        REQUIRE(std::abs(s.gate_margin - mean_of(margins)) < 1e-3);
        REQUIRE(std::abs(s.token_entropy - mean_of(entropies)) < 1e-3);
        REQUIRE(std::abs(s.changed_by_bias - mean_of(changes) / K) < 1e-12);
        REQUIRE(std::abs(s.token_information - information) < 2e-3);
        REQUIRE(s.groups_hit == 1);
    }
    REQUIRE_THROWS_AS(streamed.begin(at::zeros({1}, at::kLong), at::zeros({1}, at::kInt)), Error);
}
