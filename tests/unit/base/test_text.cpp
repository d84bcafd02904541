#include "core/base/suggest.h"
#include "core/base/units.h"
#include "tests/catch.h"

#include <limits>

using namespace moe;

TEST_CASE("suggest: distances of known pairs", "[base][suggest]") {
    CHECK(edit_distance("", "") == 0);
    CHECK(edit_distance("", "abc") == 3);
    CHECK(edit_distance("kitten", "sitting") == 3);
    CHECK(edit_distance("exprets", "experts") == 1);     // neighbours swapped
    CHECK(edit_distance("ab", "ba") == 1);
    CHECK(edit_distance("TopK", "topk") == 0);
}

TEST_CASE("suggest: the distance is symmetric and keeps the triangle inequality on short words", "[base][suggest]") {
    std::vector<std::string> words = {"", "a", "ab", "abc", "cab", "topk", "top_k", "group"};
    for (auto& x : words)
        for (auto& y : words) {
            CHECK(edit_distance(x, y) == edit_distance(y, x));
            CHECK((edit_distance(x, y) == 0) == (x == y));
        }
}

TEST_CASE("suggest: the nearest name, a name that contains the word, or nothing", "[base][suggest]") {
    CHECK(nearest(std::string(400000, 'a'), {"a"}) == "");           // at once: no name is that long
    std::vector<std::string> names = {"num_experts", "num_experts_per_token", "n_group", "dropout"};
    CHECK(nearest("num_expert", names) == "num_experts");
    CHECK(nearest("experts", names) == "num_experts");
    CHECK(nearest("drpout", names) == "dropout");
    CHECK(nearest("zzzzzzzz", names).empty());
    CHECK(nearest("x", {}).empty());
    CHECK(nearest("load", {"grad", "lens", "rand"}).empty());        // two letters of four are another word
    CHECK(nearest("lod", {"load"}) == "load");
    CHECK(nearest("learnin_rat", {"learning_rate"}) == "learning_rate");
    CHECK(did_you_mean("drpout", names) == "did you mean \"dropout\"?");
    CHECK(did_you_mean("zzzzzzzz", names).empty());
}

TEST_CASE("units: counts, bytes and times", "[base][units]") {
    CHECK(format_count(671026404352.0) == "671.0 B");
    CHECK(format_count(15.71e9) == "15.71 B");
    CHECK(format_count(97559552) == "97.6 M");
    CHECK(format_count(1.0264e12) == "1.03 T");
    CHECK(format_count(512) == "512");
    CHECK(format_count(7350.4) == "7350");
    CHECK(format_count(1.2345) == "1.23");
    CHECK(format_bytes(512) == "512 B");
    CHECK(format_bytes(665720012) == "0.62 GiB");
    CHECK(format_bytes(3 * 0x1p20) == "3.0 MiB");
    CHECK(format_secs(0.042) == "42 ms");
    CHECK(format_secs(3.21) == "3.2 s");
    CHECK(format_secs(125) == "2 min 05 s");
    CHECK(format_secs(3720) == "1 h 02 min");
    CHECK(format_secs(3 * 86400 + 4 * 3600) == "3 d 04 h");
    CHECK(format_secs(59.97) == "1 min 00 s");
    CHECK(format_secs(std::numeric_limits<double>::infinity()) == "unknown");
}
