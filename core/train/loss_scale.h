// fp16's loss scale: gradients of a loss multiplied by it stay inside half's range.
#pragma once
#include <nlohmann/json_fwd.hpp>

#include <cstdint>

namespace moe::train {

/// A power of two that follows the gradients: halved after a step whose gradient is not finite (never below 1), doubled after
/// 2000 finite steps in a row. Source: Micikevicius et al., "Mixed precision training", 1710.03740.
class LossScale {
public:
    /// `dynamic`: from 2^16 on, as fp16 wants; else 1 for ever.
    explicit LossScale(bool dynamic = false) : dynamic_(dynamic), value_(dynamic ? 65536 : 1) {}
    double value() const { return value_; }
    /// After a step's gradient norm is known; the same on all ranks. True where the scale was lowered.
    bool update(bool finite);
    /// {"scale", "good_steps"}.
    nlohmann::json state() const;
    /// Goes on from state(); a scale that is not dynamic stays 1. Throws moe::Error (state) for anything else.
    void restore(const nlohmann::json& state);

private:
    bool dynamic_;
    double value_;
    int64_t good_steps_ = 0;      ///< finite ones since the scale last moved
};

}  // namespace moe::train
