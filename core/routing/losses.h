// Losses that a router adds to the model's: for balance, and against logits that grow. Each is a mean over tokens that count.
// Letters: T = B·S tokens, E experts, K chosen a token; N = E in the formulas' sources.
#pragma once
#include "core/config/config.h"
#include "core/dist/group.h"
#include "core/tensor/factor.h"

#include <ATen/core/Tensor.h>

namespace moe::routing {
using at::Tensor;

/// Weights of the losses; all 0 means none.
struct LossWeights {
    double switch_aux = 0, sequence = 0, global = 0, z = 0, entropy = 0, load = 0;
    /// From model.moe; balance_loss_weight goes to the one that balance_loss_type names.
    static LossWeights from(const MoeConfig& config);
    /// True for any loss that looks at more than one token at a time.
    bool need_window() const { return switch_aux != 0 || sequence != 0 || global != 0 || entropy != 0 || load != 0; }
    bool any() const { return need_window() || z != 0; }
};

/// c_i of the global batch so far in a step, by layer: what the global-batch loss multiplies the local P_i with. Each micro-batch adds
/// its counts, summed over the ranks, before it reads: a running mean.
class GlobalLoad {
public:
    GlobalLoad(int64_t num_layers, int64_t num_experts, dist::Group group, at::Device device);
    /// Adds a micro-batch's counts of a layer (float64 [E], this rank's tokens) and returns c_i / c̄ so far, float64 [E]. A collective.
    Tensor add(int64_t layer, const Tensor& counts_E);
    /// Before a step.
    void clear() { counts_LE_.zero_(); }

private:
    Tensor counts_LE_;
    dist::Group group_;
};

/// What a window of whole sequences was routed to. All tensors on one device.
struct LossWindow {
    Tensor scores_TE;      ///< after sigmoid or softmax, with their graph; p = scores / Σ_E scores
    Tensor ids_TK;         ///< int64, before capacity
    Tensor counted_T;      ///< bool: false for padding
    int64_t B = 1, S = 0;
};

/// The sum of the weighted losses, times `share` for each token that counts: 0-d float64, differentiable in scores. `load_E` (float64
/// [E], no gradient): the global batch's c_i / c̄ so far, for `global`. With f_i = c_i·N/(K·n) of n tokens that count and P_i = their
/// mean p: Switch Σ f_i P_i over the window; sequence-wise the same for each sequence; global Σ load_i P_i; entropy −H(P); load: the
/// squared coefficient of variation of P, N Σ P_i² − 1. Each is multiplied by its window's n, so that micro-batches add up to the
/// mean over tokens. Source: Fedus et al., 2101.03961; DeepSeek-V3 2.1.2; Qiu et al., 2501.11873 (global); Shazeer et al., 1701.06538 (load).
Tensor window_loss(const LossWindow& window, const LossWeights& weights, const Tensor& load_E, const Factor& share);

/// Σ over tokens that count of weight · (log Σ_e exp(logits))² · share: 0-d float64. Source: Zoph et al., 2202.08906.
Tensor z_loss(const Tensor& logits_TE, const Tensor& counted_T, double weight, const Factor& share);

/// c_i of the tokens that count, float64 [E].
Tensor routed_counts(const Tensor& ids_TK, const Tensor& counted_T, int64_t num_experts);

/// x with a loss hung on it: the same values; backward also starts the loss's gradient at `scale`. So a loss made inside a layer
/// needs no way of its own through pipeline stages and recomputation.
Tensor attach_loss(const Tensor& x, const Tensor& loss, double scale);

}  // namespace moe::routing
