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
    at::Tensor targets;       ///< int64 [B, S]: the next token of the document; −100 where there is none (its last token, padding)
    at::Tensor domain;        ///< int32 [B, S]: index into Loader::domains(), of the input token; −1 for padding
    at::Tensor doc_start;     ///< int32 [B, S]: position in the sequence where the token's piece of a document starts, whether or not data.document_mask hides what is before
    int64_t first_sequence = 0;
    int64_t num_valid() const;    ///< targets that count
};

/// A resumable stream of sequences. Not thread safe by itself; data.preprocessing.num_workers threads of its own prepare about the
/// next two calls' sequences, the same whatever their number (0: the calling thread reads).
class Loader {
public:
    virtual ~Loader() = default;
    /// Names of the domains, in the order of the configuration.
    virtual const std::vector<std::string>& domains() const = 0;
    /// Advances by num_sequences and returns those with indices [first, first + count) of them: the ranks of a job all call
    /// with the same num_sequences and each its own part. Throws moe::Error (data, io).
    virtual Batch next(int64_t num_sequences, int64_t first, int64_t count) = 0;
    /// How many of the next sequences hold at least `tokens` tokens, padding not counted: a multiple of `multiple`, at least that.
    /// Does not advance. Throws moe::Error (usage) for tokens < 0 or multiple < 1.
    virtual int64_t sequences_for_tokens(int64_t tokens, int64_t multiple) = 0;
    /// Everything that restore() needs to go on with the next sequence; what was only prepared ahead is not in it.
    virtual nlohmann::json state() const = 0;
    /// Goes on from a state() of the same data. Throws moe::Error (state) for one of other data.
    virtual void restore(const nlohmann::json& state) = 0;
    /// Tokens of all domains together, end-of-document tokens included; −1 where they never end. A short validation set is read
    /// again from its start once it is used up.
    virtual int64_t tokens_per_epoch() const { return -1; }
    /// Lines that were left out of all domains together (data.bad_lines = "skip").
    virtual int64_t num_bad_lines() const { return 0; }
};

/// Opens what `config.data` (or, with `validation`, `config.validation`) names: a mixture of `sources`, or the subfolders of `path`
/// weighted by their size, or synthetic domains (for validation: other documents of the same processes). Validation is in the
/// documents' order; open it again, or restore its first state, for every evaluation. Throws moe::Error (data, io, config) for what
/// is missing, unreadable or empty.
std::unique_ptr<Loader> open_loader(const Config& config, bool validation);

}  // namespace moe::data
