// How evenly tokens are spread over experts, and how experts and domains go together.
// Letters: E experts, D domains, K experts a token; c_i tokens routed to expert i, c̄ their mean.
#pragma once
#include <cstdint>
#include <span>
#include <vector>

namespace moe::metrics {

/// One layer's load. Every field but num_dead is NaN where nothing was routed.
/// Source: Wang et al., 2408.15664 (MaxVio); Shannon entropy in nats.
struct LoadStatistics {
    double max_vio = 0;              ///< (max c − c̄) / c̄: 0 is balance, E / K − 1 the worst
    double min_vio = 0;              ///< (min c − c̄) / c̄: −1 where an expert got nothing
    double avg_vio = 0;              ///< mean |c_i − c̄| / c̄
    double normalised_entropy = 0;   ///< −Σ p ln p / ln E with p = c / Σ c; 1 is balance (and for one expert)
    double effective_experts = 0;    ///< e^H: between 1 and E
    double variation = 0;            ///< coefficient of variation: the population's standard deviation / c̄
    int64_t num_dead = 0;            ///< experts that got nothing
};

/// Statistics of counts by expert, int64 [E]. Throws moe::Error (shape) for no experts, (data) for a negative count.
LoadStatistics load_statistics(std::span<const int64_t> counts);

/// Shannon entropy in nats of counts taken as frequencies; NaN where all are 0. Throws as load_statistics.
double entropy(std::span<const int64_t> counts);

/// Mutual information in nats of expert and domain, from counts_DE (int64, by rows): Σ p(d, e) ln(p(d, e) / (p(d) p(e))).
/// 0 where routing ignores the domain, at most min(ln D, ln E); NaN where nothing was routed. Throws moe::Error (shape, data).
double mutual_information(std::span<const int64_t> counts_DE, int64_t num_domains);

/// Specialisation N_{i,D} / N_D, float64 [D, E]: the share of a domain's tokens that go to expert i, N_D = Σ_i N_{i,D} / K tokens.
/// Uniform routing gives K / E, a row adds up to K. NaN for a domain without tokens. Throws moe::Error (shape, data).
std::vector<double> specialisation(std::span<const int64_t> counts_DE, int64_t num_domains, int64_t experts_per_token);

/// Load of every expert relative to its domain's mean, c_i / c̄, float64 [D, E]: 1 is balance. NaN for a domain without tokens.
/// Throws moe::Error (shape, data).
std::vector<double> relative_load(std::span<const int64_t> counts_DE, int64_t num_domains);

/// Jensen–Shannon divergence in nats of two counts taken as frequencies, 0 (alike) to ln 2; NaN where one is all 0. Throws moe::Error (shape, data).
double js_divergence(std::span<const int64_t> a, std::span<const int64_t> b);

}  // namespace moe::metrics
