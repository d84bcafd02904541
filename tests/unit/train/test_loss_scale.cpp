#include "core/base/error.h"
#include "core/train/loss_scale.h"
#include "tests/catch.h"

#include <nlohmann/json.hpp>

using namespace moe;
using namespace moe::train;

TEST_CASE("loss scale: halves on overflow, doubles after 2000 good steps, never goes below 1", "[train]") {
    LossScale s(true);
    REQUIRE(s.value() == 65536);
    REQUIRE(s.update(false));
    REQUIRE(s.value() == 32768);
    for (int i = 0; i < 1999; ++i) REQUIRE_FALSE(s.update(true));
    REQUIRE(s.value() == 32768);
    s.update(true);
    REQUIRE(s.value() == 65536);
    for (int i = 0; i < 1999; ++i) s.update(true);
    REQUIRE(s.update(false));                                     // the count starts again
    for (int i = 0; i < 1999; ++i) s.update(true);
    REQUIRE(s.value() == 32768);
    for (int i = 0; i < 15; ++i) REQUIRE(s.update(false));
    REQUIRE(s.value() == 1);
    REQUIRE_FALSE(s.update(false));                               // not lowered: it is the least
    REQUIRE(s.value() == 1);
}

TEST_CASE("loss scale: outside fp16 it is 1 for ever", "[train]") {
    LossScale s;
    REQUIRE_FALSE(s.update(false));
    for (int i = 0; i < 2001; ++i) s.update(true);
    REQUIRE(s.value() == 1);
}

TEST_CASE("loss scale: its state goes through JSON, anything else is refused", "[train]") {
    LossScale a(true), b(true), fixed;
    a.update(false);
    for (int i = 0; i < 1500; ++i) a.update(true);
    auto state = nlohmann::json::parse(a.state().dump());
    b.restore(state);
    REQUIRE(b.value() == 32768);
    for (int i = 0; i < 500; ++i) b.update(true);
    REQUIRE(b.value() == 65536);
    fixed.restore(state);
    REQUIRE(fixed.value() == 1);
    for (auto bad : {R"({"scale": 0.5, "good_steps": 0})", R"({"scale": 8})", R"([1])", R"({"scale": "x", "good_steps": 0})", R"({"scale": 8, "good_steps": -1})"})
        REQUIRE_THROWS_AS(b.restore(nlohmann::json::parse(bad)), Error);
    REQUIRE(b.value() == 65536);
}
