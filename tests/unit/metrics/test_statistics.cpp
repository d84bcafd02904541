#include "core/metrics/statistics.h"
#include "tests/error_of.h"

#include <cmath>

using namespace moe;
using moe::test::error_of;
using namespace moe::metrics;

namespace {
bool near(double a, double b) { return std::abs(a - b) < 1e-12; }
}  // namespace

TEST_CASE("statistics: load of experts against values computed by hand", "[metrics]") {
    std::vector<int64_t> counts = {6, 2, 0, 4};   // mean 3, p = 1/2, 1/6, 0, 1/3
    LoadStatistics s = load_statistics(counts);
    REQUIRE(near(s.max_vio, 1.0));
    REQUIRE(near(s.min_vio, -1.0));
    REQUIRE(near(s.avg_vio, 8.0 / 4 / 3));
    double h = std::log(2.0) / 2 + std::log(6.0) / 6 + std::log(3.0) / 3;
    REQUIRE(near(s.normalised_entropy, h / std::log(4.0)));
    REQUIRE(near(s.effective_experts, std::exp(h)));
    REQUIRE(near(s.variation, std::sqrt((9.0 + 1 + 9 + 1) / 4) / 3));
    REQUIRE(s.num_dead == 1);
}

TEST_CASE("statistics: balance, one expert for all, a single expert, nothing", "[metrics]") {
    std::vector<int64_t> even(7, int64_t(1) << 50), one = {0, 0, 0, 9}, single = {5}, none(3, 0);
    LoadStatistics s = load_statistics(even);
    REQUIRE((near(s.max_vio, 0) && near(s.min_vio, 0) && near(s.avg_vio, 0) && near(s.variation, 0)));
    REQUIRE(near(s.normalised_entropy, 1));
    REQUIRE(std::abs(s.effective_experts - 7) < 1e-9);
    s = load_statistics(one);
    REQUIRE((near(s.max_vio, 3) && near(s.avg_vio, 1.5) && near(s.effective_experts, 1) && near(s.normalised_entropy, 0)));
    REQUIRE(s.num_dead == 3);
    REQUIRE(near(load_statistics(single).normalised_entropy, 1));
    s = load_statistics(none);
    REQUIRE((std::isnan(s.max_vio) && std::isnan(s.normalised_entropy) && std::isnan(s.variation)));
    REQUIRE(s.num_dead == 3);
}

TEST_CASE("statistics: mutual information of expert and domain", "[metrics]") {
    std::vector<int64_t> independent = {2, 4, 6, 1, 2, 3}, determined = {5, 0, 0, 5}, none(4, 0);
    REQUIRE(near(mutual_information(independent, 2), 0));
    REQUIRE(near(mutual_information(determined, 2), std::log(2.0)));
    REQUIRE(std::isnan(mutual_information(none, 2)));
    std::vector<int64_t> table = {3, 1, 0, 2, 2, 4};
    double want = 0, by_domain[] = {4, 8}, by_expert[] = {5, 3, 4};
    for (size_t d = 0; d < 2; ++d) {
        for (size_t e = 0; e < 3; ++e) {
            double p = double(table[d * 3 + e]) / 12;
            if (p > 0) want += p * std::log(p / (by_domain[d] / 12 * by_expert[e] / 12));
        }
    }
    REQUIRE(want > 0.1);
    REQUIRE(near(mutual_information(table, 2), want));
}

TEST_CASE("statistics: specialisation and relative load by domain", "[metrics]") {
    std::vector<int64_t> table = {3, 1, 0, 4, 2, 2, 2, 2, 0, 0, 0, 0};   // 3 domains x 4 experts, 2 experts a token: 4, 4 and 0 tokens
    auto s = specialisation(table, 3, 2), r = relative_load(table, 3);
    std::vector<double> want_s = {0.75, 0.25, 0, 1, 0.5, 0.5, 0.5, 0.5}, want_r = {1.5, 0.5, 0, 2, 1, 1, 1, 1};
    for (size_t i = 0; i < 8; ++i) {
        REQUIRE(near(s[i], want_s[i]));
        REQUIRE(near(r[i], want_r[i]));
    }
    for (size_t i = 8; i < 12; ++i) REQUIRE((std::isnan(s[i]) && std::isnan(r[i])));
}

TEST_CASE("statistics: Jensen-Shannon divergence of two loads", "[metrics]") {
    std::vector<int64_t> a = {6, 2, 0, 4}, twice = {12, 4, 0, 8}, apart = {0, 0, 5, 0}, b = {1, 1, 1, 1}, none(4, 0);
    REQUIRE(near(js_divergence(a, twice), 0));
    REQUIRE(near(js_divergence(a, apart), std::log(2.0)));
    double want = 0, p[] = {0.5, 1.0 / 6, 0, 1.0 / 3};
    for (double x : p) want += 0.5 * (x > 0 ? x * std::log(x / ((x + 0.25) / 2)) : 0) + 0.5 * 0.25 * std::log(0.25 / ((x + 0.25) / 2));
    REQUIRE(near(js_divergence(a, b), want));
    REQUIRE(near(js_divergence(b, a), want));
    REQUIRE(std::isnan(js_divergence(a, none)));
    std::vector<int64_t> shorter = {1, 2};
    REQUIRE(error_of([&] { js_divergence(a, shorter); }).kind() == ErrorKind::shape);
}

TEST_CASE("statistics: wrong tables are errors", "[metrics]") {
    std::vector<int64_t> table = {1, 2, 3}, negative = {1, -1};
    REQUIRE(error_of([&] { load_statistics({}); }).kind() == ErrorKind::shape);
    REQUIRE(error_of([&] { load_statistics(negative); }).kind() == ErrorKind::data);
    REQUIRE(error_of([&] { mutual_information(table, 2); }).kind() == ErrorKind::shape);
    REQUIRE(error_of([&] { relative_load(table, 0); }).kind() == ErrorKind::shape);
    REQUIRE(error_of([&] { specialisation(table, 1, 0); }).kind() == ErrorKind::shape);
}
