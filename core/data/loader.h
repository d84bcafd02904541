// Batches of tokens with a domain label on every token, from a weighted mixture of sources.
// Letters: B sequences, S positions.
#pragma once
#include "core/config/config.h"

#include <ATen/core/Tensor.h>
#include <nlohmann/json_fwd.hpp>

#include <memory>
#include <string>
#include <vector>

namespace moe::data {

/// Whole sequences on the host. Row b is sequence first_sequence + b of the run, whichever rank or worker made it.
struct Batch {
    at::Tensor ids;           ///< int64 [B, S]
    at::Tensor targets;       ///< int64 [B, S]: the next token; −100 where there is none (padding)
    at::Tensor domain;        ///< int32 [B, S]: index into Loader::domains(), of the input token; −1 for padding
    at::Tensor doc_start;     ///< int32 [B, S]: position in the sequence where the token's document starts
    int64_t first_sequence = 0;
    int64_t num_valid() const;    ///< targets that count
};

/// A resumable stream of sequences. Not thread safe.
class Loader {
public:
    virtual ~Loader() = default;
    /// Names of the domains, in the order of the configuration.
    virtual const std::vector<std::string>& domains() const = 0;
    /// Advances by num_sequences and returns those with indices [first, first + count) of them: the ranks of a job all call
    /// with the same num_sequences and each its own part. Throws moe::Error (data, io).
    virtual Batch next(int64_t num_sequences, int64_t first, int64_t count) = 0;
    /// Everything that restore() needs to go on with the next sequence.
    virtual nlohmann::json state() const = 0;
    virtual void restore(const nlohmann::json& state) = 0;
};

/// Opens what `config.data` (or, with `validation`, `config.validation`) names. Throws moe::Error (data, io, config) for what is
/// missing, unreadable or empty.
std::unique_ptr<Loader> open_loader(const Config& config, bool validation);

}  // namespace moe::data
