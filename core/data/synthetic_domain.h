// Tokens of a random Markov process: something to learn when there is no data.
#pragma once
#include "core/data/domain.h"

namespace moe::data {

/// A random first-order Markov process over tokens 0 … vocab_size − 2; vocab_size − 1 ends a document. Documents are 32 to 1024
/// tokens long (uniform in the logarithm) and never end. After token a comes, with probability 3/4, one of eight successors of a
/// (the j-th with probability proportional to 2^−j), else a token of the domain's own Zipf-like ranking, P(rank r) about 1/r.
/// A domain has its own ranking and its own successors, so domains differ, and the entropy is far below ln(vocab_size).
/// Tokens are a function of (seed, domain, document, position) only.
class SyntheticDomain final : public Domain {
public:
    /// `index` is the domain's number. Documents count from `first_document`, so that held-out ones come from the same process.
    /// Throws moe::Error (config) for vocab_size < 4.
    SyntheticDomain(int64_t index, int64_t vocab_size, uint64_t seed, int64_t first_document);
    int64_t num_chunks() const override { return -1; }
    int64_t num_tokens() const override { return -1; }
    uint64_t fingerprint() const override;
    Chunk chunk(int64_t i) const override;
    int64_t read(int64_t document, int64_t offset, std::span<int64_t> out) const override;

private:
    int64_t ranked_token(double u) const;
    int64_t successor(int64_t token, int64_t j) const;
    int64_t next_token(int64_t document, int64_t position, int64_t previous) const;
    int64_t length(int64_t document) const;

    int64_t index_, num_tokens_, first_document_, stride_, shift_;
    uint64_t seed_;
};

}  // namespace moe::data
