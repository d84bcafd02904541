// From logits to a decision: scores, group-limited top-k, weights.
// Letters: T tokens, E experts, K chosen a token.
#pragma once
#include "core/config/config.h"

#include <ATen/core/Tensor.h>

#include <optional>

namespace moe::routing {
using at::Tensor;

/// What turns logits into scores.
enum class Scoring { sigmoid, softmax };

/// A router's rule, from model.moe.
struct RouterSettings {
    int64_t num_experts = 0, top_k = 0, n_group = 1, topk_group = 1;
    Scoring scoring = Scoring::sigmoid;
    bool norm_topk = true;
    double scale = 1, temperature = 1;
    bool with_bias = true;        ///< a group's score is the sum of its two best (with a selection bias) or its best (without)
    std::optional<double> capacity_factor;   ///< null: no pair is dropped
    int64_t min_capacity = 4;

    static RouterSettings from(const MoeConfig& config);
};

/// s = sigmoid(logits / temperature) or softmax over the experts. fp32 or fp64 [T, E]; differentiable.
Tensor scores(const Tensor& logits_TE, const RouterSettings& settings);

/// The decision, without gradient: ids int64 [T, K] of the K largest s + bias among the topk_group best groups; the rest count
/// as −inf (not 0: negative biases would let masked experts win). bias [E] in the scores' type, or undefined.
/// Source: DeepSeek-V3 technical report 2.1.2.
Tensor choose(const Tensor& scores_TE, const Tensor& bias_E, const RouterSettings& settings);

/// A decision that balances perfectly whatever the scores are, for benchmarks: pair (token, choice) goes to expert
/// (token · K + choice) mod E, the token counted over the whole step from first_token. int64 [T, K].
Tensor forced(int64_t num_tokens, int64_t first_token, const RouterSettings& settings, at::Device device);

/// Pairs that an expert takes of one sequence of S tokens: max(min_capacity, ceil(capacity_factor · S · K / E)).
int64_t capacity(int64_t S, const RouterSettings& settings);

/// ids with −1 for the pairs that are over an expert's capacity. The window is a sequence, so that it depends neither on the
/// micro-batch nor on the layout of ranks; an expert keeps the pairs of the largest weight, of equal ones the earlier. Pairs of
/// padding are all −1 and take no room. ids int64 [B · S, K], weights [B · S, K] (any float dtype), counted bool [B · S].
/// Source: DeepSeek-V2 technical report 2.2.4 (the lowest affinities are dropped).
Tensor drop_over_capacity(const Tensor& ids_TK, const Tensor& weights_TK, const Tensor& counted_T, int64_t S, const RouterSettings& settings);

/// Weights of the chosen, [T, K]: s (without bias), divided by its sum + 1e-20 where norm_topk, times scale. Differentiable.
Tensor weights(const Tensor& scores_TE, const Tensor& ids_TK, const RouterSettings& settings);

}  // namespace moe::routing
