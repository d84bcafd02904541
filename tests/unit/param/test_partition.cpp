#include "core/param/param_store.h"

#include "tests/catch.h"

#include <algorithm>
#include <numeric>

using namespace moe;

namespace {
/// Every place where a bucket may be cut, listed plainly.
std::vector<int64_t> places(const std::vector<Extent>& tensors, int64_t total) {
    std::vector<int64_t> list{0, total};
    for (const Extent& e : tensors) {
        int64_t row = 1;
        for (size_t i = 1; i < e.shape.size(); ++i) row *= e.shape[i];
        for (int64_t r = 0; r < (e.shape.empty() ? 1 : e.shape[0]); r += 128) list.push_back(e.offset + r * row);
    }
    return list;
}
std::vector<Extent> bucket(const std::vector<std::vector<int64_t>>& shapes, int64_t& total) {
    std::vector<Extent> list;
    total = 0;
    for (const auto& shape : shapes) {
        list.push_back({total, shape});
        int64_t n = std::accumulate(shape.begin(), shape.end(), int64_t(1), std::multiplies<>());
        total += (n + 15) / 16 * 16;
    }
    return list;
}
}  // namespace

TEST_CASE("partition: each cut is the nearest allowed place to an equal share", "[param]") {
    const std::vector<std::vector<std::vector<int64_t>>> cases = {
        {{1000, 3}, {7}, {257, 33}, {128, 5}}, {{5}, {6}, {7}}, {{4096, 16}}, {{127, 999}}, {{}, {1}, {300}}, {{513, 2, 3}, {64, 64, 2}}};
    for (const auto& shapes : cases) {
        int64_t total;
        auto tensors = bucket(shapes, total);
        auto allowed = places(tensors, total);
        for (int parts : {1, 2, 3, 4, 7, 16}) {
            auto cuts = partition(tensors, total, parts);
            REQUIRE(int(cuts.size()) == parts + 1);
            CHECK(cuts.front() == 0);
            CHECK(cuts.back() == total);
            CHECK(std::is_sorted(cuts.begin(), cuts.end()));
            for (int p = 1; p < parts; ++p) {
                int64_t share = total * p / parts, best = total;
                for (int64_t place : allowed) best = std::min(best, std::abs(place - share));
                CHECK(std::count(allowed.begin(), allowed.end(), cuts[p]) > 0);
                CHECK(std::abs(cuts[p] - share) == best);
            }
        }
    }
}

TEST_CASE("partition: with whole tensors each cut is the nearest tensor start to an equal share", "[param]") {
    const std::vector<std::vector<std::vector<int64_t>>> cases = {{{1000, 3}, {7}, {257, 33}, {128, 5}}, {{4096, 16}}, {{513, 2, 3}, {64, 64, 2}, {300, 300}}};
    for (const auto& shapes : cases) {
        int64_t total;
        auto tensors = bucket(shapes, total);
        std::vector<int64_t> allowed{total};
        for (const Extent& e : tensors) allowed.push_back(e.offset);
        for (int parts : {1, 2, 3, 4, 7}) {
            auto cuts = partition(tensors, total, parts, /*whole_tensors=*/true);
            REQUIRE(int(cuts.size()) == parts + 1);
            CHECK(std::is_sorted(cuts.begin(), cuts.end()));
            for (int p = 1; p < parts; ++p) {
                int64_t share = total * p / parts, best = total;
                for (int64_t place : allowed) best = std::min(best, std::abs(place - share));
                CHECK(std::count(allowed.begin(), allowed.end(), cuts[p]) > 0);
                CHECK(std::abs(cuts[p] - share) == best);
            }
        }
    }
}

TEST_CASE("partition: an empty bucket has empty parts", "[param]") {
    CHECK(partition({}, 0, 3) == std::vector<int64_t>{0, 0, 0, 0});
}
