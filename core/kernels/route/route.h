// The router's decision: scores, group-limited top-k and weights; and its counting.
// Letters: T tokens, E experts, K chosen a token, G groups, D domains.
#pragma once
#include "core/kernels/common/row_groups.h"

namespace moe::kernels {
using at::Tensor;

/// How logits become a decision.
struct RouteOptions {
    int64_t top_k = 1, n_group = 1, topk_group = 1;
    bool softmax = false;         ///< over the experts; else sigmoid
    bool norm_topk = true;        ///< weights are divided by their sum + 1e-20
    bool best_two = true;         ///< a group's score is the sum of its two best (one where it has but one), else its best
    double scale = 1, temperature = 1;
};

struct Route {
    Tensor scores_TE;             ///< sigmoid or softmax of logits / temperature; differentiable
    Tensor weights_TK;            ///< scores of the chosen (without bias), divided by their sum where norm_topk, times scale; differentiable
    Tensor ids_TK;                ///< int64, by falling score + bias, of equal ones the lower id first
};

/// logits fp32 or fp64 [T, E]; bias [E] of any float dtype or undefined. The K largest of scores + bias among the experts of the
/// topk_group best groups; the others count as −inf (not 0: negative biases would let masked experts win). With `ids_TK` (int64, distinct
/// in a row) the choice is given and only weighed; an id outside [0, E) throws on the CPU, on CUDA it weighs NaN. On CUDA E is at most 1024. Throws moe::Error: shape, dtype, device, usage (options that
/// do not fit E). Source: DeepSeek-V3 technical report 2.1.2.
Route route(const Tensor& logits_TE, const Tensor& bias_E, const RouteOptions& options, const Tensor& ids_TK = {});

/// counts [D + 1, E] += pairs by (domain + 1, id); dropped [E], where defined, += the pairs that `kept` has as −1, padding left out. ids and
/// kept int64 [T, K], domain int32 [T] in −1 (padding) … D − 1, counts and dropped int64, all contiguous on one device. Nothing waits.
void count_pairs(const Tensor& ids_TK, const Tensor& domain_T, const Tensor& kept_TK, Tensor counts_DE, Tensor dropped_E);

}  // namespace moe::kernels
