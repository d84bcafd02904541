#pragma once
#include <c10/core/ScalarType.h>

#include <string>

namespace moe {

/// Which type each kind of number has. Router weights, norms' statistics, softmax and losses are at least fp32 in all of them.
struct Precision {
    at::ScalarType compute = at::kFloat;   ///< weights as products read them, activations
    at::ScalarType master = at::kFloat;    ///< what the optimizer updates, its moments
    at::ScalarType grad = at::kFloat;      ///< main gradients

    /// "fp64" (tests), "fp32" or "bf16" (bf16 compute, fp32 master and gradients). Throws moe::Error (config) for another word.
    static Precision named(const std::string& name);
    bool operator==(const Precision&) const = default;
};

}  // namespace moe
