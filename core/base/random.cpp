#include "core/base/random.h"

#include <cmath>
#include <numbers>

namespace moe {
void normal(uint64_t seed, std::string_view name, int64_t first, int64_t count, double* out) {
    uint64_t key = seed ^ hash_name(name);
    for (int64_t i = first; i < first + count;) {
        uint64_t pair = uint64_t(i) / 2;      // one counter gives the elements 2·pair and 2·pair + 1
        auto r = philox({uint32_t(pair), uint32_t(pair >> 32), 0, uint32_t(Purpose::init)}, key);
        double u = 1.0 - uniform(r[0], r[1]), angle = 2 * std::numbers::pi * uniform(r[2], r[3]);
        double radius = std::sqrt(-2 * std::log(u));
        if (i % 2 == 0) {
            out[i - first] = radius * std::cos(angle);
            ++i;
            if (i == first + count) break;
        }
        out[i - first] = radius * std::sin(angle);
        ++i;
    }
}
}  // namespace moe
