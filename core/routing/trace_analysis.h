// What can be said of a trace beyond load: its decisions, co-activation, flow between layers, specialisation to tokens, and how two traces differ.
// Letters: N tokens that count (padding does not), K chosen a token, E experts, D domains, V token ids.
#pragma once
#include "core/routing/trace.h"

namespace moe::routing {

/// Means over the tokens of one layer. What needs scores is NaN in a trace without details.
struct DecisionStatistics {
    int64_t num_tokens = 0;
    double groups_hit = 0;              ///< number of groups among a token's K experts
    double token_entropy = 0;           ///< H(p_t) / ln E, p_t the token's scores over their sum: 1 where the router does not tell experts apart
    double token_information = 0;       ///< H(mean p) − mean H(p), nats: 0 where all tokens get the same scores
    double gate_margin = 0;             ///< the K-th selection score minus the next one's, over tokens that have a next one
    double changed_by_bias = 0;         ///< share of the chosen that would not be chosen without the bias
    double drop_rate = 0;               ///< share of the chosen that capacity dropped; 0 where it drops none
};
/// Throws moe::Error (config) for a layer without a router.
DecisionStatistics decision_statistics(const Trace& trace, int64_t layer);

/// Experts that no token came to in each run of `window` tokens that count, one after the other, int64 [W]; tokens after the last whole window are left out. Throws moe::Error (usage) for a window
/// that is less than 1 or more than all tokens.
at::Tensor dead_experts(const Trace& trace, int64_t layer, int64_t window);

/// N_ij, int64 [E, E]: tokens that chose both i and j, all pairs of a token's K; on the diagonal the tokens of i.
at::Tensor coactivation(const Trace& trace, int64_t layer);

/// int64 [E, E]: tokens that chose i in layer `from` and j in layer `to`; and int64 [E], the tokens of i.
std::pair<at::Tensor, at::Tensor> flow(const Trace& trace, int64_t from, int64_t to);

/// Sum of the weights by expert, float64 [E]. Throws moe::Error (state) for a trace without weights.
at::Tensor weight_sums(const Trace& trace, int64_t layer);

/// How token ids spread over experts.
struct VocabularyLoad {
    std::vector<int64_t> ids, counts;   ///< [V]: ids that occur at least min_count times, ascending, and how often
    at::Tensor load_VE;                 ///< int64 [V, E]
};
VocabularyLoad vocabulary_load(const Trace& trace, int64_t layer, int64_t min_count);

/// Mean over tokens of |E_t(a) ∩ E_t(b)| / K in one layer of two traces of the same tokens: saturation, where they are of two checkpoints. K is
/// b's. `by_expert`, where given, becomes float64 [E]: of the tokens that an expert has in b, the share that it had in a; NaN for none. Both traces are in memory
/// for it. Throws moe::Error (data) for other tokens.
double overlap(const Trace& a, const Trace& b, int64_t layer, at::Tensor* by_expert = nullptr);

}  // namespace moe::routing
