// What changes along a run by plan: the learning rate, the sequences of a step, and so the number of steps.
#pragma once
#include "core/config/config.h"
#include "core/data/loader.h"

#include <optional>

namespace moe::train {

/// Learning rate of a step (0-based) of a run of `num_steps`: a linear warm-up from 0, then by lr_decay_style
///   constant      learning_rate;
///   cosine,linear learning_rate until the last lr_decay_ratio of the run begins (null: until the warm-up ends), then down to
///                 min_learning_rate, which the last step has;
///   wsd           as linear, with 0.1 for null. Source: Hu et al., "MiniCPM", 2404.06395;
///   deepseek_v3   of the recipe's 14.8 T tokens: learning_rate for 10 T, a cosine to min_learning_rate over 4.3 T, min_learning_rate
///                 for 333 B, 7.3/22 of it for 167 B, as shares of num_steps; the recipe's minimum is a tenth of its learning rate.
///                 Source: DeepSeek-V3, 2412.19437, 4.2.
/// Steps past the end have the last step's rate.
double learning_rate(const TrainingConfig& config, int64_t step, int64_t num_steps);

/// Sequences of the next step over all ranks, a multiple of micro_batch_size × data_parallel: global_batch_size; or, with
/// batch_size_ramp, start + (global_batch_size − start) · tokens_seen / tokens rounded down, while it lasts; or, with
/// dynamic_batch_tokens, as many as hold that many tokens without padding, as the loader finds in its next sequences.
/// Throws moe::Error (config) where a fixed number or the ramp's start is no such multiple.
int64_t sequences_of_step(const TrainingConfig& config, int64_t tokens_seen, int64_t data_parallel, data::Loader& loader);

/// Length of the run in steps: train_steps; else the steps, of a ramp's growing size, until total_training_tokens or
/// tokens_per_parameter_ratio × parameters are seen; null where none is given. With dynamic_batch_tokens a step counts as
/// that many tokens, rounded up to whole steps' sequences where sequences are packed.
/// Throws moe::Error (config) as sequences_of_step.
std::optional<int64_t> num_steps(const Config& config, int64_t parameters, int64_t data_parallel);

/// Positions that the first `steps` steps see, sequences × seq_length, a ramp's smaller steps as they are. With dynamic_batch_tokens
/// what num_steps() counts for a step. Throws moe::Error (config) as sequences_of_step.
int64_t num_tokens(const Config& config, int64_t steps, int64_t data_parallel);

}  // namespace moe::train
