// Memory that training needs on a rank, from the configuration alone.
#pragma once
#include "core/config/config.h"

#include <cstdint>
#include <string>
#include <vector>

namespace moe::plan {

/// Bytes on the fullest rank of a run. Weights, gradients and optimizer state are what the parameter store allocates, but for padding
/// and for where ZeRO and pipeline stages cut; activations are what the segments of a step keep on a GPU, counted op by op, and the largest of what is alive for a while.
/// H100, 2026-11-22: train_16b_5l 54.5 GiB at batch 4 and 64.6 at 8, where this says 53.8 and 63.9. On a CPU or with documents in sequences, widths that are padded or no
/// fused attention, more.
struct Memory {
    double weights = 0;        ///< as products read them, in the compute type (the router's in the master type)
    double gradients = 0;      ///< main gradients
    double optimizer = 0;      ///< master weights where they are apart from the weights, and moments
    double activations = 0;    ///< of the micro-batches in flight
    double total() const { return weights + gradients + optimizer + activations; }
};

/// Memory of training `config` on `ranks` processes, MTP modules included. Throws moe::Error (config) while vocab_size is null, and for
/// parallel sizes that do not fit that number of ranks.
Memory memory(const Config& config, int64_t ranks);

/// Names of segments ("layers.3.experts") to compute again in backward so that training fits `budget` bytes on a rank: those first that free most for what they cost, no more than it
/// takes, none where it fits as it is; all that can be where even that does not fit. Throws as memory().
std::vector<std::string> choose_recompute(const Config& config, int64_t ranks, double budget);

}  // namespace moe::plan
