// Counter-based randomness (Philox 4x32-10): a draw depends on its key and counter only, never on what ran before. So
// dropout, noise, data order and initial weights do not depend on the layout of ranks, on recomputation, on resume or on
// the number of workers. Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
#pragma once
#include <array>
#include <cstdint>
#include <string_view>

namespace moe {

/// What a stream of draws is for. Values are part of the numbers drawn: append, never reorder.
enum class Purpose : uint32_t { init = 1, attention_dropout = 2, expert_dropout = 3, router_noise = 4, data_source = 5, data_document = 6, synthetic = 7, sampling = 8 };

/// Philox 4x32-10: four 32-bit draws from a 128-bit counter and a 64-bit key.
inline std::array<uint32_t, 4> philox(std::array<uint32_t, 4> c, uint64_t key) {
    auto k0 = uint32_t(key), k1 = uint32_t(key >> 32);
    for (int round = 0; round < 10; ++round) {
        uint64_t a = uint64_t(0xD2511F53u) * c[0], b = uint64_t(0xCD9E8D57u) * c[2];
        c = {uint32_t(b >> 32) ^ c[1] ^ k0, uint32_t(b), uint32_t(a >> 32) ^ c[3] ^ k1, uint32_t(a)};
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return c;
}

/// Names a stream: (seed, purpose, step, layer).
struct RandomKey {
    uint64_t seed = 0;
    Purpose purpose = Purpose::init;
    uint32_t step = 0, layer = 0;
};

/// Four draws for one (global token index, block of four features). Layers to 2^16, blocks to 2^16, tokens to 2^44:
/// the token's upper 12 bits share a word with the purpose, whose values stay below 2^20.
inline std::array<uint32_t, 4> draw(const RandomKey& k, uint64_t token, uint32_t block = 0) {
    return philox({uint32_t(token), k.step, k.layer | block << 16, uint32_t(k.purpose) | uint32_t(token >> 32) << 20}, k.seed);
}

/// Uniform in [0, 1) with 53 bits from two draws.
inline double uniform(uint32_t high, uint32_t low) { return double((uint64_t(high) << 32 | low) >> 11) * 0x1p-53; }

/// Stable 64-bit hash of a name (FNV-1a), so that a parameter's stream does not depend on where it is stored.
constexpr uint64_t hash_name(std::string_view name) {
    uint64_t h = 0xcbf29ce484222325ull;
    for (char c : name) h = (h ^ uint8_t(c)) * 0x100000001b3ull;
    return h;
}

/// Standard normal values for elements [first, first + count) of the parameter `name`: element i depends on (seed, name, i)
/// only. float64 on the host. Source: Box and Muller, 1958.
void normal(uint64_t seed, std::string_view name, int64_t first, int64_t count, double* out);

}  // namespace moe
