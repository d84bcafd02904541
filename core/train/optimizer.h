#pragma once
#include "core/config/config.h"
#include "core/param/param_store.h"

namespace moe::train {

/// Types of a run: training.precision(), with moments and main gradients in bf16 where moments_dtype and grads_dtype say so.
/// Throws moe::Error (config) for a precision that is not built.
Precision precision_of(const TrainingConfig& config);

/// Moments that an optimizer keeps: adamw, adam and muon 2 (muon's matrices use the first as their momentum, the second stays
/// zero there), sgd 1 with momentum, else 0. Throws moe::Error (config) for an unknown one.
int num_moments(const TrainingConfig& config);

/// Whether Muon moves this parameter by its own rule: a matrix of a hidden layer, that is of two dims and neither embedding, nor
/// output head, nor router gate, nor frozen. Gate and up of a feed-forward are two matrices, as are those of every expert.
bool is_hidden_matrix(const ParamStore& store, const std::string& name);

/// Norm of all main gradients over all ranks, each element once. A collective over the world.
double grad_norm(ParamStore& store, const dist::Group& world);

/// One pass over every bucket's own part: clip (scale = min(1, clip / norm) where clip > 0), update, then gather compute weights
/// and zero the gradients. step counts from 1. Main gradients are `loss_scale` times the loss's; `norm` is of the loss's.
/// Under muon the store must be built with whole_tensors, else moe::Error (internal) where ZeRO has cut a matrix; what tensor
/// parallelism has cut is gathered, and every rank of tp makes the whole step.
void update(ParamStore& store, const TrainingConfig& config, double lr, double norm, int64_t step, double loss_scale = 1);

}  // namespace moe::train
