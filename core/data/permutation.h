// A random order that needs no memory.
#pragma once
#include "core/base/random.h"

#include <bit>

namespace moe::data {

/// Element i of a random permutation of [0, n), i in [0, n): a function of (seed, stream, epoch, i), so that a resumed run needs no
/// saved order. A balanced Feistel network over the next even power of two; values ≥ n walk on through it.
/// Source: Luby and Rackoff, 1988; Black and Rogaway, "Ciphers with arbitrary finite domains", 2002.
inline int64_t permute(int64_t i, int64_t n, uint64_t seed, uint64_t stream, int64_t epoch) {
    constexpr uint32_t kRounds = 6;
    int half = (std::bit_width(uint64_t(n > 1 ? n - 1 : 1)) + 1) / 2;
    uint64_t mask = (uint64_t(1) << half) - 1, value = uint64_t(i);
    do {
        uint64_t left = value >> half, right = value & mask;
        for (uint32_t round = 0; round < kRounds; ++round) {
            auto r = draw({seed ^ stream, Purpose::data_document, uint32_t(epoch), round}, right);
            uint64_t mixed = left ^ ((uint64_t(r[1]) << 32 | r[0]) & mask);
            left = right;
            right = mixed;
        }
        value = left << half | right;
    } while (value >= uint64_t(n));
    return int64_t(value);
}

}  // namespace moe::data
