#include "core/train/agree.h"
#include "core/train/meeting.h"
#include "tests/catch.h"

#include <ctime>

#include <chrono>
#include <thread>

using namespace moe;
using namespace moe::train;

namespace {
dist::Group world_of_its_own() { return dist::world().split(0, dist::world().rank()); }

ErrorParts an_error(const std::string& op) { return {ErrorKind::state, op, "got", "want", "hint", "x.lua:3", -1, "stack traceback:\n\tx"}; }

/// What a call throws; kind internal, op "" for nothing.
template <class F>
ErrorParts thrown_by(F&& f) {
    try {
        f();
    } catch (const Error& e) {
        return e.parts();
    }
    return {};
}
}  // namespace

TEST_CASE("meeting: every rank hears all words in rank order, long and binary ones too", "[train][dist]") {
    Meeting meeting(world_of_its_own());
    for (size_t size : {size_t(0), size_t(5), size_t(300000)}) {
        std::string mine(size + size_t(meeting.rank()), char(meeting.rank()));
        auto words = meeting.hear({"a place", mine});
        REQUIRE(words);
        REQUIRE(int(words->size()) == meeting.size());
        for (int r = 0; r < meeting.size(); ++r) {
            CHECK((*words)[size_t(r)].value == std::string(size + size_t(r), char(r)));
            CHECK((*words)[size_t(r)].place == "a place");
            CHECK(!(*words)[size_t(r)].error);
        }
        judge(*words);
    }
}

TEST_CASE("meeting: who waits for a rank that comes late sleeps", "[train][dist]") {
    Meeting meeting(world_of_its_own());
    timespec before{}, after{};
    int late = meeting.size() - 1;
    if (meeting.rank() == late) std::this_thread::sleep_for(std::chrono::milliseconds(400));
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &before);
    meeting.hear({"here"});
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &after);
    double secs = double(after.tv_sec - before.tv_sec) + 1e-9 * double(after.tv_nsec - before.tv_nsec);
    CHECK(secs < 0.15);
}

TEST_CASE("meeting: an error of one rank is thrown on all, with its rank; one that all bring has none", "[train][dist]") {
    Meeting meeting(world_of_its_own());
    Word mine{"a place"};
    int wrong = meeting.size() - 1;
    if (meeting.rank() == wrong) mine = {"elsewhere", "", an_error("theirs")};
    ErrorParts got = thrown_by([&] { judge(*meeting.hear(mine)); });
    CHECK(got.op == "theirs");
    CHECK(got.rank == wrong);
    CHECK(got.where == "x.lua:3");
    CHECK(got.traceback == an_error("").traceback);
    CHECK(is_agreed(got));
    forget_agreed();
    CHECK(!is_agreed(got));
    note_agreed(got);
    got.hint = "another";
    CHECK(!is_agreed(got));
    got = thrown_by([&] { judge(*meeting.hear({"a place", "", an_error("ours")})); });
    CHECK(got.op == "ours");
    CHECK(got.rank == -1);
}

TEST_CASE("meeting: ranks at different places all learn who is where", "[train][dist]") {
    Meeting meeting(world_of_its_own());
    int other = meeting.size() - 1;
    ErrorParts got = thrown_by([&] { judge(*meeting.hear({meeting.rank() == other ? "run:eval() at x.lua:5" : "run:train(1) at x.lua:4"})); });
    CHECK(got.kind == ErrorKind::dist);
    CHECK(got.rank == other);
    CHECK(got.got.find("run:train(1) at x.lua:4; ") != std::string::npos);
    CHECK(got.got.find(fmt::format("rank {}: run:eval() at x.lua:5", other)) != std::string::npos);
}

TEST_CASE("meeting: with a limit it gives up on a rank that does not come", "[train][dist]") {
    Meeting meeting(world_of_its_own());
    if (meeting.rank() > 0) {
        CHECK(!meeting.hear({"alone"}, 0.05));
        CHECK(meeting.is_broken());
    }
    dist::world().barrier();
    // Who comes later gets no answer that was meant for an earlier meeting.
    if (meeting.rank() > 0) CHECK(thrown_by([&] { meeting.hear({"again"}, 0.05); }).kind == ErrorKind::dist);
    dist::world().barrier();
}

TEST_CASE("meeting: ranks at one place with other arguments learn of it", "[train][dist]") {
    Meeting meeting(world_of_its_own());
    int other = meeting.size() - 1;
    Word mine{"router:mask({experts = …})"};
    mine.digest = meeting.rank() == other ? ~uint64_t(0) : 7;
    ErrorParts got = thrown_by([&] { judge(*meeting.hear(mine)); });
    CHECK(got.op == "ranks with different arguments");
    CHECK(got.rank == other);
}

TEST_CASE("agree: the rank of an error is the one that threw it, none where all did", "[train][dist]") {
    dist::Group world = world_of_its_own();
    int wrong = world.size() - 1;
    ErrorParts got = thrown_by([&] {
        agree(world, [&] {
            if (world.rank() == wrong) throw Error(an_error("one"));
        });
    });
    CHECK(got.op == "one");
    CHECK(got.rank == wrong);
    CHECK(got.traceback == an_error("").traceback);
    CHECK(is_agreed(got));
    got = thrown_by([&] { agree(world, [&] { throw Error(an_error("all")); }); });
    CHECK(got.op == "all");
    CHECK(got.rank == -1);
}
