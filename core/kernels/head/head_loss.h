#pragma once
#include "core/tensor/factor.h"
#include "core/tensor/weight.h"

namespace moe::kernels {

/// Target of a token that counts in no loss (padding).
constexpr int64_t kIgnore = -100;

struct HeadLossOptions {
    Factor scale;                         ///< usually 1 / valid tokens of the global batch
    int64_t chunk = 0;                    ///< tokens whose logits exist at a time; 0: 1024 on a CPU, on a GPU equal shares of as many as 1.6 GB of logits hold
    int64_t keep_bytes = 256 << 20;       ///< the logits' gradient is kept for backward up to this size, else computed again
    /// The caller promises that backward follows, once, with 1 from above: then forward makes both gradients, the weight's is added there
    /// and then, and the logits are made only once.
    bool gradients_in_forward = false;
};

/// Sum over valid tokens of cross entropy · scale, in chunks: x [T, D], w.value [V, D], targets int64 [T] (kIgnore = none) →
/// 0-d float64 on x's device. Where `token_loss` is given it becomes float32 [T], unscaled, 0 where ignored.
/// Throws moe::Error (data) for a target outside [0, V) on the CPU.
Tensor head_loss(const Tensor& x_TD, const WeightPtr& w_VD, const Tensor& targets_T, const HeadLossOptions& options, Tensor* token_loss = nullptr);

}  // namespace moe::kernels
