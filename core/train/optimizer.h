#pragma once
#include "core/config/config.h"
#include "core/param/param_store.h"

namespace moe::train {

/// Learning rate of a step (0-based) by warm-up and decay: cosine, linear or constant. `num_steps` is the length of the run.
double learning_rate(const TrainingConfig& config, int64_t step, int64_t num_steps);

/// Moments that an optimizer keeps: adamw 2, sgd 0. Throws moe::Error (config) for one that is not built yet.
int num_moments(const std::string& optimizer);

/// Norm of all main gradients over all ranks, each element once. A collective over the world.
double grad_norm(ParamStore& store, const dist::Group& world);

/// One pass over every bucket's own part: clip (scale = min(1, clip / norm) where clip > 0), update, then gather compute weights
/// and zero the gradients. step counts from 1.
void update(ParamStore& store, const TrainingConfig& config, double lr, double norm, int64_t step);

}  // namespace moe::train
