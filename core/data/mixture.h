// Which piece of which document stands where: the plan of a stream of sequences.
#pragma once
#include "core/data/domain.h"

#include <memory>
#include <vector>

namespace moe::data {

/// A run of one document's tokens inside one sequence.
struct Piece {
    int32_t domain = 0;
    int64_t document = 0, offset = 0, length = 0;
    int64_t position = 0;   ///< where it begins in its sequence
};

/// How a stream is cut and ordered.
struct MixtureOptions {
    int64_t seq_length = 0;
    bool packing = true;    ///< false: one piece a sequence, the rest is padding
    bool shuffle = true;
    uint64_t shuffle_seed = 0;
};

/// Where one domain stands.
struct Cursor {
    int64_t chunk = 0;      ///< chunks used up, over all epochs
    int64_t offset = 0;     ///< tokens used of the next one
    int64_t tokens = 0;     ///< tokens given so far
};

/// A weighted mixture of domains by tokens. Every piece comes from the domain that is furthest behind its share, so the shares are
/// exact to about one sequence at any time; ties are broken by a seeded draw. A domain gives its chunks in an order that is random
/// in every epoch anew (shuffle) or the documents' own, each chunk once an epoch; a chunk that does not fit goes on in the domain's
/// next piece. Deterministic: no rank, worker or batch size enters.
class Mixture {
public:
    /// `weights` are ≥ 0 and are normalised. Throws moe::Error (config) where all are 0 or one is not a finite number ≥ 0.
    Mixture(std::vector<std::unique_ptr<Domain>> domains, std::vector<double> weights, MixtureOptions options);
    /// The pieces of the next sequence, in order of position.
    std::vector<Piece> next_sequence();
    const std::vector<std::unique_ptr<Domain>>& domains() const { return domains_; }
    const MixtureOptions& options() const { return options_; }
    const std::vector<double>& weights() const { return weights_; }
    const std::vector<Cursor>& cursors() const { return cursors_; }
    /// Goes on from cursors() of another moment; the size is the number of domains.
    void set_cursors(std::vector<Cursor> cursors);

private:
    int32_t choose_domain() const;
    Piece take(int32_t domain, int64_t room);

    std::vector<std::unique_ptr<Domain>> domains_;
    std::vector<double> weights_;
    MixtureOptions options_;
    std::vector<Cursor> cursors_;
    int64_t total_tokens_ = 0;
};

}  // namespace moe::data
