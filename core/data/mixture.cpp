#include "core/data/mixture.h"

#include "core/base/error.h"
#include "core/data/permutation.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace moe::data {

Mixture::Mixture(std::vector<std::unique_ptr<Domain>> domains, std::vector<double> weights, MixtureOptions options)
    : domains_(std::move(domains)), weights_(std::move(weights)), options_(options), cursors_(domains_.size()) {
    for (size_t d = 0; d < weights_.size(); ++d) {
        MOE_CHECK(std::isfinite(weights_[d]) && weights_[d] >= 0, config, "data.sources", fmt::format("weight {} of \"{}\"", weights_[d], domains_[d]->name()),
                  "a finite number ≥ 0", "");
    }
    double sum = std::accumulate(weights_.begin(), weights_.end(), 0.0);
    MOE_CHECK(sum > 0, config, "data.sources", fmt::format("{} sources whose weights add up to {}", domains_.size(), sum), "at least one weight above 0", "");
    for (double& w : weights_) w /= sum;
}

int32_t Mixture::choose_domain() const {
    // The deficits after one more sequence add up to seq_length, so the largest is positive and a weight of 0 is never chosen.
    double best = 0;
    std::vector<int32_t> ties;
    for (size_t d = 0; d < domains_.size(); ++d) {
        double deficit = weights_[d] * double(total_tokens_ + options_.seq_length) - double(cursors_[d].tokens);
        if (deficit > best) ties.clear();
        if (weights_[d] > 0 && deficit >= best) {
            ties.push_back(int32_t(d));
            best = deficit;
        }
    }
    if (ties.size() == 1) return ties[0];
    auto r = draw({options_.shuffle_seed, Purpose::data_source, 0, 0}, uint64_t(total_tokens_) & ((uint64_t(1) << 44) - 1));
    return ties[r[0] % ties.size()];
}

Piece Mixture::take(int32_t domain, int64_t room) {
    const auto& source = *domains_[size_t(domain)];
    auto& cursor = cursors_[size_t(domain)];
    int64_t n = source.num_chunks(), index = cursor.chunk;
    if (n > 0) {
        int64_t epoch = cursor.chunk / n;
        index = cursor.chunk % n;
        if (options_.shuffle) index = permute(index, n, options_.shuffle_seed, hash_name(source.name()), epoch);
    }
    Chunk chunk = source.chunk(index);
    int64_t length = std::min(room, chunk.length - cursor.offset);
    Piece piece{domain, chunk.document, chunk.offset + cursor.offset, length, 0};
    cursor.offset += length;
    cursor.tokens += length;
    total_tokens_ += length;
    if (cursor.offset == chunk.length) {
        ++cursor.chunk;
        cursor.offset = 0;
    }
    return piece;
}

std::vector<Piece> Mixture::next_sequence() {
    std::vector<Piece> pieces;
    int64_t position = 0;
    do {
        pieces.push_back(take(choose_domain(), options_.seq_length - position));
        pieces.back().position = position;
        position += pieces.back().length;
    } while (options_.packing && position < options_.seq_length);
    return pieces;
}

void Mixture::set_cursors(std::vector<Cursor> cursors) {
    cursors_ = std::move(cursors);
    total_tokens_ = 0;
    for (const auto& cursor : cursors_) total_tokens_ += cursor.tokens;
}

}  // namespace moe::data
