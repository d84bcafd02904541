// What a step of a run changes before its weights.
#pragma once
#include "core/train/run.h"

#include <nlohmann/json.hpp>

namespace moe::train {

struct Run::StepBegin {
    nlohmann::json position;                 ///< of the data
    LossScale loss_scale;
    Tensor counts, counts_by_domain, dropped;
    int64_t step_tokens, skipped, skipped_in_a_row;
};

}  // namespace moe::train
