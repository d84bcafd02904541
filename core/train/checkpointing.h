// Saving and loading of a run's state: weights, optimizer state and router biases as pieces of logical tensors, so that any other
// layout of ranks can load them, and a JSON object with everything else.
#pragma once
#include "core/model/model.h"
#include "core/store/checkpoint.h"

#include <nlohmann/json_fwd.hpp>

#include <memory>
#include <string>

namespace moe::train {

/// The tensors that this rank writes: master weights under their logical names, the optimizer's state as "optimizer/I/<name>",
/// router biases (rank 0) under Model::bias_name. Over all ranks each element once. Views: valid until the next step.
std::vector<store::Piece> pieces_of(Model& model);

/// Fills weights, optimizer state and biases of this rank's part of the model. Throws moe::Error (data), on all ranks, for a name
/// that is missing or left over, a wrong shape or a corrupt piece; the model may be half filled then. A collective.
void load_state(Model& model, const store::Checkpoint& checkpoint);

/// Weights and biases only, of a checkpoint, a run folder (its newest one) or a folder or file in safetensors with Hugging Face's names.
/// A collective. Throws moe::Error (data) as load_state, (io) for what cannot be read.
void load_weights(Model& model, const std::string& path);

/// Writes the checkpoints of one run over its ranks. Calls are collectives over `world`.
class Checkpointing {
public:
    /// `folder`: of the periodic ones, "" for none. `id`: the same on all ranks, another in every attempt of every run.
    Checkpointing(const Config& config, const std::string& folder, int64_t attempt, const std::string& id, const dist::Group& world);
    /// Begins a save into `path` ("": <folder>/step_N), after the one before. Throws that one's error, on all ranks.
    void begin(Model& model, int64_t step, const nlohmann::json& meta, const std::string& path);
    /// Until the last save is complete, on all ranks. Throws its moe::Error on all of them, once.
    void finish();
    /// Until this rank's part of it is done, not a collective. Throws as finish(), where it failed here.
    void finish_here() { writer_->wait(); }
    /// Whether the last save has failed on this rank, and finish() would throw. Not a collective.
    bool has_failed() const { return writer_->has_failed(); }

private:
    dist::Group world_;
    std::unique_ptr<store::CheckpointWriter> writer_;
};

}  // namespace moe::train
