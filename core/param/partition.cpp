#include "core/param/param_store.h"

#include "core/base/error.h"

#include <algorithm>

namespace moe {
namespace {
/// Rows of a cut must be multiples of this: FP8 blocks are never cut.
constexpr int64_t kRowMultiple = 128;

/// The places at or around `target` where the bucket may be cut: at most four.
int64_t nearest_cut(const std::vector<Extent>& tensors, int64_t total, int64_t target, bool whole_tensors) {
    auto next = std::upper_bound(tensors.begin(), tensors.end(), target, [](int64_t t, const Extent& e) { return t < e.offset; });
    int64_t after = next == tensors.end() ? total : next->offset;
    std::vector<int64_t> places{after};
    if (next != tensors.begin()) {
        const Extent& e = *std::prev(next);
        int64_t rows = e.shape.empty() ? 1 : e.shape[0], row = 1;
        for (size_t i = 1; i < e.shape.size(); ++i) row *= e.shape[i];
        int64_t below = row > 0 ? (target - e.offset) / row / kRowMultiple * kRowMultiple : 0;
        places.push_back(e.offset);
        for (int64_t r : {below, below + kRowMultiple})
            if (r < rows && !whole_tensors) places.push_back(e.offset + r * row);
    } else {
        places.push_back(0);
    }
    return *std::min_element(places.begin(), places.end(), [&](int64_t a, int64_t b) {
        int64_t da = std::abs(a - target), db = std::abs(b - target);
        return da != db ? da < db : a < b;
    });
}
}  // namespace

std::vector<int64_t> partition(const std::vector<Extent>& tensors, int64_t total, int parts, bool whole_tensors) {
    MOE_CHECK(parts >= 1, internal, "partition", fmt::format("{} parts", parts), "at least 1", "");
    std::vector<int64_t> cuts{0};
    for (int p = 1; p < parts; ++p) {
        auto target = int64_t(__int128(total) * p / parts);
        cuts.push_back(std::max(cuts.back(), nearest_cut(tensors, total, target, whole_tensors)));
    }
    cuts.push_back(total);
    return cuts;
}
}  // namespace moe
