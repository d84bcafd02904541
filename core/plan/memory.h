// Memory that training needs on a rank, from the configuration alone.
#pragma once
#include "core/config/config.h"

#include <cstdint>

namespace moe::plan {

/// Bytes on the fullest rank of a run. Weights, gradients and optimizer state are what the parameter store allocates, but for padding
/// and for where ZeRO and pipeline stages cut; activations are an estimate of what the segments of a step keep, within about a
/// factor of two.
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

}  // namespace moe::plan
