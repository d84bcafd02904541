// Which segments' forward runs again in backward, instead of what it computed being kept.
#pragma once
#include "core/model/model.h"

namespace moe::train {

/// Which segments' forward runs again in backward, by segment: the number of a span, or −1. A span is a run of segments that are
/// recomputed together: only what it reads from outside is kept. mode "none"; "selective": each segment alone whose name, or its last
/// word, the kind, is in `kinds`; "full": each layer as one. Throws moe::Error (config) with the nearest name for one that no segment
/// of any stage has.
std::vector<int> recompute_spans(const Model& model, const std::string& mode, const std::vector<std::string>& kinds);

/// What training.recompute names; where selective checkpointing names nothing, as few segments as a rank asks for that has this
/// memory, of which a part stays free for libraries and gaps. The rank with the least decides for all: a segment that runs again on
/// one rank of a group only would wait for the others. A collective where it is chosen; rank 0 then logs the choice.
std::vector<std::string> recomputed_segments(const Config& config, const dist::Group& world, double obtainable_bytes);

}  // namespace moe::train
