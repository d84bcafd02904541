#include "core/tensor/weight.h"
#include "tests/catch.h"

using namespace moe;

TEST_CASE("GradSink: runs at once by default, keeps and drains by segment and micro-batch", "[tensor]") {
    GradSink sink;
    std::vector<int> ran;
    sink.add([&] { ran.push_back(0); });
    sink.defer(2, 0);
    sink.add([&] { ran.push_back(1); });
    sink.defer(2, 1);
    sink.add([&] { ran.push_back(2); });
    sink.defer(2, 0);
    sink.add([&] { ran.push_back(3); });
    CHECK(sink.num_queued() == 3);
    sink.drain(2, 0);
    CHECK(ran == std::vector<int>{0, 1, 3});
    sink.reset();
    CHECK(sink.num_queued() == 0);
    sink.add([&] { ran.push_back(4); });
    CHECK(ran == std::vector<int>{0, 1, 3, 4});
}
