#include "core/metrics/statistics.h"

#include "core/base/error.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace moe::metrics {
namespace {
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

double checked_sum(std::span<const int64_t> counts) {
    MOE_CHECK(!counts.empty(), shape, "statistics", "0 counts", "at least one expert", "");
    auto smallest = std::min_element(counts.begin(), counts.end());
    MOE_CHECK(*smallest >= 0, data, "statistics", fmt::format("count {} of expert {}", *smallest, smallest - counts.begin()), "counts ≥ 0", "");
    return std::accumulate(counts.begin(), counts.end(), 0.0);
}

int64_t checked_columns(std::span<const int64_t> counts_DE, int64_t num_domains) {
    MOE_CHECK(num_domains > 0 && !counts_DE.empty() && int64_t(counts_DE.size()) % num_domains == 0, shape, "statistics", fmt::format("{} counts for {} domains", counts_DE.size(), num_domains),
              "domains x experts counts", "");
    checked_sum(counts_DE);
    return int64_t(counts_DE.size()) / num_domains;
}

// Every row divided by `scale` of its sum.
template <class F>
std::vector<double> by_row(std::span<const int64_t> counts_DE, int64_t num_domains, F&& divisor) {
    auto num_experts = size_t(checked_columns(counts_DE, num_domains));
    std::vector<double> out(counts_DE.size());
    for (size_t d = 0; d < size_t(num_domains); ++d) {
        auto row = counts_DE.subspan(d * num_experts, num_experts);
        double by = divisor(checked_sum(row), double(num_experts));
        for (size_t e = 0; e < num_experts; ++e) out[d * num_experts + e] = by > 0 ? double(row[e]) / by : kNaN;
    }
    return out;
}
}  // namespace

double entropy(std::span<const int64_t> counts) {
    double sum = checked_sum(counts), h = 0;
    if (sum == 0) return kNaN;
    for (int64_t c : counts) {
        if (c > 0) h -= double(c) / sum * std::log(double(c) / sum);
    }
    return std::max(h, 0.0);   // −0 and rounding
}

LoadStatistics load_statistics(std::span<const int64_t> counts) {
    double n = double(counts.size()), mean = checked_sum(counts) / n;
    auto num_dead = int64_t(std::count(counts.begin(), counts.end(), 0));
    if (mean == 0) return {kNaN, kNaN, kNaN, kNaN, kNaN, kNaN, num_dead};
    auto [low, high] = std::minmax_element(counts.begin(), counts.end());
    double absolute = 0, square = 0;
    for (int64_t c : counts) {
        absolute += std::abs(double(c) - mean);
        square += (double(c) - mean) * (double(c) - mean);
    }
    double h = entropy(counts);
    return {(double(*high) - mean) / mean, (double(*low) - mean) / mean, absolute / n / mean, n > 1 ? h / std::log(n) : 1.0, std::exp(h), std::sqrt(square / n) / mean, num_dead};
}

double mutual_information(std::span<const int64_t> counts_DE, int64_t num_domains) {
    auto num_experts = size_t(checked_columns(counts_DE, num_domains));
    std::vector<int64_t> by_domain(size_t(num_domains), 0), by_expert(num_experts, 0);
    for (size_t i = 0; i < counts_DE.size(); ++i) {
        by_domain[i / num_experts] += counts_DE[i];
        by_expert[i % num_experts] += counts_DE[i];
    }
    // H(expert) + H(domain) − H(expert, domain); NaN where nothing was routed.
    double information = entropy(by_expert) + entropy(by_domain) - entropy(counts_DE);
    return information < 0 ? 0.0 : information;
}

double js_divergence(std::span<const int64_t> a, std::span<const int64_t> b) {
    MOE_CHECK(a.size() == b.size(), shape, "js_divergence", fmt::format("{} and {} counts", a.size(), b.size()), "as many of both", "");
    double sum_a = checked_sum(a), sum_b = checked_sum(b), out = 0;
    if (sum_a == 0 || sum_b == 0) return kNaN;
    for (size_t i = 0; i < a.size(); ++i) {
        double p = double(a[i]) / sum_a, q = double(b[i]) / sum_b, m = (p + q) / 2;
        if (p > 0) out += p * std::log(p / m) / 2;
        if (q > 0) out += q * std::log(q / m) / 2;
    }
    return std::max(out, 0.0);
}

std::vector<double> specialisation(std::span<const int64_t> counts_DE, int64_t num_domains, int64_t experts_per_token) {
    MOE_CHECK(experts_per_token >= 1, shape, "specialisation", fmt::format("{} experts a token", experts_per_token), "at least 1", "");
    return by_row(counts_DE, num_domains, [&](double sum, double) { return sum / double(experts_per_token); });
}

std::vector<double> relative_load(std::span<const int64_t> counts_DE, int64_t num_domains) {
    return by_row(counts_DE, num_domains, [](double sum, double num_experts) { return sum / num_experts; });
}

}  // namespace moe::metrics
