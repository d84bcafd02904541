// From logits to a decision: scores, group-limited top-k, weights.
// Letters: T tokens, E experts, K chosen a token.
#pragma once
#include "core/config/config.h"

#include <ATen/core/Tensor.h>

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

    static RouterSettings from(const MoeConfig& config);
};

/// s = sigmoid(logits / temperature) or softmax over the experts. fp32 or fp64 [T, E]; differentiable.
Tensor scores(const Tensor& logits_TE, const RouterSettings& settings);

/// The decision, without gradient: ids int64 [T, K] of the K largest s + bias among the topk_group best groups; the rest count
/// as −inf (not 0: negative biases would let masked experts win). bias [E] in the scores' type, or undefined.
/// Source: DeepSeek-V3 technical report 2.1.2.
Tensor choose(const Tensor& scores_TE, const Tensor& bias_E, const RouterSettings& settings);

/// Weights of the chosen, [T, K]: s (without bias), divided by its sum + 1e-20 where norm_topk, times scale. Differentiable.
Tensor weights(const Tensor& scores_TE, const Tensor& ids_TK, const RouterSettings& settings);

}  // namespace moe::routing
