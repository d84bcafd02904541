#pragma once
#include <c10/core/ScalarType.h>

#include <string>

namespace moe {

/// Which type each kind of number has. Router weights, norms' statistics, softmax and losses are at least fp32 in all of them.
struct Precision {
    at::ScalarType compute = at::kFloat;   ///< weights as products read them, activations
    at::ScalarType master = at::kFloat;    ///< what the optimizer updates
    at::ScalarType grad = at::kFloat;      ///< main gradients
    at::ScalarType moments = at::kFloat;   ///< optimizer's state; its arithmetic is in the master type
    bool fp8 = false;                      ///< the layers' products in E4M3 between bf16 activations

    /// "fp64" (tests), "fp32", "bf16" or "fp16" (compute in it; fp32 master, gradients and moments), "fp8" (as bf16, with E4M3 products).
    /// Throws moe::Error (config) for another word.
    static Precision named(const std::string& name);
    bool operator==(const Precision&) const = default;
};

}  // namespace moe
