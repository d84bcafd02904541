// What somebody has changed about one layer's router while a model lives: experts masked or ablated, another top-k, functions of a script.
// Letters: T tokens, E experts, K chosen a token, V tokens of the vocabulary.
#pragma once
#include "core/base/random.h"
#include "core/routing/router.h"

#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace moe::routing {

/// What scripts draw for; the next after base/random.h's list.
constexpr Purpose kScriptPurpose = Purpose(9);

/// Where a decision is made.
struct RouteCall {
    int64_t layer = 0, step = 0;          ///< absolute layer; optimizer steps done
    bool training = false;
    Tensor token_ids_T;                   ///< int64: the tokens that are routed
    uint64_t seed = 0;                    ///< of this layer, step and micro-batch: what a script draws depends on nothing else
    /// For errors: "layer 1, at step 5", the step that is trained, or "layer 1, outside of training".
    std::string place() const;
};

/// Scores from logits, with their graph: [T, E] → [T, E]. Part of the model, so a recomputation calls it again.
using ScoreFunction = std::function<Tensor(const Tensor& logits_TE, const RouteCall& call)>;
/// Other scores for choice and weights: [T, E] without a graph. bias [E] may be undefined.
using PreTopK = std::function<Tensor(const Tensor& logits_TE, const Tensor& scores_TE, const Tensor& bias_E, const RouteCall& call)>;
/// Other ids and weights, both [T, K]; an undefined one stays as it is, and new ids without weights are weighed anew.
using PostTopK = std::function<std::pair<Tensor, Tensor>(const Tensor& ids_TK, const Tensor& weights_TK, const Tensor& scores_TE, const RouteCall& call)>;

/// Everything that differs from the router's own rule in one layer.
struct Intervention {
    RouterSettings settings;              ///< with another top_k or temperature
    Tensor bias_E;                        ///< added to the scores in the choice alone, −inf where an expert is masked; undefined for none
    Tensor kept_E;                        ///< weights are multiplied by it: 0 for an ablated expert, else 1; undefined for none
    Tensor forced;                        ///< int64 [K], the choice of every token, or [V, K], the choice by token id; undefined for none
    bool bias_frozen = false;             ///< the balance leaves the layer's bias alone
    ScoreFunction score;
    std::vector<PreTopK> pre_topk;
    std::vector<PostTopK> post_topk;
    /// Asked in the catch of what a function threw, or what it gave: true where the failure is kept for later, and the function counts as if it had
    /// changed nothing. Null: all is thrown at once.
    std::function<bool()> keep;
    /// Functions of a script, which no recorded graph could call.
    bool calls_scripts() const { return score || !pre_topk.empty() || !post_topk.empty(); }
};

/// What hooks decided: saved outputs, so that a recomputation takes them as they were.
struct HookResults {
    Tensor scores_TE, weights_TK;         ///< undefined where no hook changed them
};

/// kernels::route under an intervention. bias [E] is the layer's own, or undefined. With `again` the choice `given_TK` and `hooked` are
/// taken and no hook runs. The gradient goes through a hook's result as if the hook had added a constant. Throws moe::Error (shape,
/// dtype, usage) for what a hook gives that is not as described above, or names an expert twice or one that is not there, unless change.keep keeps it.
kernels::Route route(const Intervention& change, const Tensor& logits_TE, const Tensor& bias_E, const RouteCall& call, const Tensor& given_TK, bool again, HookResults& hooked);

/// The K largest of scores + bias among the experts of the topk_group best groups, as kernels::route, from scores: int64 [T, K]. No graph.
Tensor choose(const Tensor& scores_TE, const Tensor& bias_E, const kernels::RouteOptions& options);
/// Weights of a choice, as kernels::route, from scores and with their graph: [T, K].
Tensor weigh(const Tensor& scores_TE, const Tensor& ids_TK, const kernels::RouteOptions& options);

/// Throws moe::Error (usage) where the experts that are left cannot fill a token's choice in every case: with groups, those of any
/// topk_group groups that may win. `masked` has E entries.
void check_enough_experts(const std::vector<bool>& masked, const RouterSettings& settings, int64_t layer);

}  // namespace moe::routing
