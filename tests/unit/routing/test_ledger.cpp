#include "core/base/error.h"
#include "core/routing/balance.h"
#include "core/routing/ledger.h"
#include "core/routing/trace.h"
#include "tests/catch.h"

#include <ATen/ATen.h>

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
