#include "core/data/synthetic_domain.h"

#include "core/base/error.h"
#include "core/base/random.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>

namespace moe::data {
namespace {
constexpr int64_t kMinLength = 32, kMaxLength = 1024;
constexpr int64_t kPositionsPerDocument = 4096;   // counter = document × this + position; the last position draws the length
constexpr uint32_t kTokens = 0, kSuccessors = 1, kRanking = 2;
constexpr int kNumSuccessors = 8;

std::array<uint32_t, 4> draw_for(uint64_t seed, int64_t domain, uint32_t what, int64_t counter) {
    return draw({seed, Purpose::synthetic, uint32_t(domain), what}, uint64_t(counter));
}
}  // namespace

SyntheticDomain::SyntheticDomain(int64_t index, int64_t vocab_size, uint64_t seed, int64_t first_document)
    : Domain(fmt::format("synthetic_{}", index)), index_(index), num_tokens_(vocab_size - 1), first_document_(first_document), seed_(seed) {
    MOE_CHECK(vocab_size >= 4, config, "model.vocab_size", fmt::format("{}", vocab_size), "at least 4 for synthetic data", "");
    auto r = draw_for(seed, index, kRanking, 0);
    shift_ = int64_t(r[0] % uint64_t(num_tokens_));
    stride_ = 1 + int64_t(r[1] % uint64_t(num_tokens_ - 1));
    while (std::gcd(stride_, num_tokens_) != 1) stride_ = stride_ % num_tokens_ + 1;
}

uint64_t SyntheticDomain::fingerprint() const {
    return hash_name(fmt::format("{} {} {} {}", index_, num_tokens_, first_document_, seed_));
}

int64_t SyntheticDomain::ranked_token(double u) const {
    // Uniform in the logarithm of the rank: P(rank r) is close to 1 / (r ln n).
    auto rank = int64_t(std::exp(u * std::log(double(num_tokens_ + 1)))) - 1;
    return (std::clamp<int64_t>(rank, 0, num_tokens_ - 1) * stride_ + shift_) % num_tokens_;
}

int64_t SyntheticDomain::successor(int64_t token, int64_t j) const {
    auto r = draw_for(seed_, index_, kSuccessors, token * kNumSuccessors + j);
    return ranked_token(uniform(r[0], r[1]));
}

int64_t SyntheticDomain::next_token(int64_t document, int64_t position, int64_t previous) const {
    auto r = draw_for(seed_, index_, kTokens, document * kPositionsPerDocument + position);
    bool from_previous = previous >= 0 && r[2] >= (1u << 30);
    if (!from_previous) return ranked_token(uniform(r[0], r[1]));
    return successor(previous, std::min(std::countl_zero(r[3]), kNumSuccessors - 1));
}

int64_t SyntheticDomain::length(int64_t document) const {
    auto r = draw_for(seed_, index_, kTokens, document * kPositionsPerDocument + kPositionsPerDocument - 1);
    double text = kMinLength * std::pow(double(kMaxLength) / kMinLength, uniform(r[0], r[1]));
    return int64_t(text) + 1;
}

Chunk SyntheticDomain::chunk(int64_t i) const { return {first_document_ + i, 0, length(first_document_ + i)}; }

int64_t SyntheticDomain::read(int64_t document, int64_t offset, std::span<int64_t> out) const {
    int64_t length_tokens = length(document), end = std::min(length_tokens, offset + int64_t(out.size())), token = -1;
    for (int64_t i = 0; i < end; ++i) {
        token = i == length_tokens - 1 ? num_tokens_ : next_token(document, i, token);
        if (i >= offset) out[size_t(i - offset)] = token;
    }
    return std::max<int64_t>(end - offset, 0);
}

}  // namespace moe::data
