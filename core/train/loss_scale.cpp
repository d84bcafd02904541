#include "core/train/loss_scale.h"

#include "core/base/error.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cmath>

namespace moe::train {
namespace {
constexpr double kLeastScale = 1, kFactor = 2;
constexpr int64_t kGoodSteps = 2000;
}  // namespace

bool LossScale::update(bool finite) {
    if (!dynamic_) return false;
    if (finite) {
        if (++good_steps_ < kGoodSteps) return false;
        // Beyond float's range the scaled loss itself would not be finite: no step could be good.
        value_ = std::min(value_ * kFactor, double(int64_t(1) << 62));
        good_steps_ = 0;
        return false;
    }
    double before = value_;
    value_ = std::max(kLeastScale, value_ / kFactor);
    good_steps_ = 0;
    return value_ < before;
}

nlohmann::json LossScale::state() const { return {{"scale", value_}, {"good_steps", good_steps_}}; }

void LossScale::restore(const nlohmann::json& state) {
    bool known = state.is_object() && state.contains("scale") && state.contains("good_steps") && state["scale"].is_number() && state["good_steps"].is_number_integer();
    double scale = known ? state["scale"].get<double>() : 0;
    MOE_CHECK(known && std::isfinite(scale) && scale >= kLeastScale && state["good_steps"].get<int64_t>() >= 0, state, "loss scale", state.dump(),
              "{\"scale\": 1 or more, \"good_steps\": 0 or more}", "the checkpoint is damaged");
    if (!dynamic_) return;
    value_ = scale;
    good_steps_ = state["good_steps"].get<int64_t>();
}

}  // namespace moe::train
