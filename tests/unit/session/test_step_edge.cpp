// Turns of a step edge: ranks as threads of one process.
#include "core/train/step_edge.h"
#include "tests/catch.h"

#include <algorithm>
#include <atomic>
#include <barrier>
#include <chrono>
#include <memory>
#include <random>
#include <thread>
#include <vector>

using moe::train::StepEdge;

namespace {
constexpr int kRanks = 3, kRequests = 60;

void pause_up_to(std::mt19937& random, int micros) { std::this_thread::sleep_for(std::chrono::microseconds(random() % unsigned(micros))); }

/// Threads that train in step: what train_on_ranks does, with the smallest number found through shared memory.
struct Ranks {
    StepEdge edges[kRanks];
    std::atomic<int64_t> steps[kRanks] = {}, asked[kRanks] = {};
    std::atomic<bool> stops[kRanks] = {}, pauses[kRanks] = {};
    std::barrier<> together{kRanks};
    std::vector<std::thread> trainers;

    Ranks() {
        for (auto& edge : edges) edge.begin_turns();
        for (int r = 0; r < kRanks; ++r) trainers.emplace_back([this, r] { train(r); });
    }
    void train(int r) {
        std::mt19937 random{unsigned(100 + r)};
        edges[r].set_trainer();
        for (;;) {
            asked[r] = edges[r].asked();
            together.arrive_and_wait();
            int64_t by_all = asked[0];
            for (auto& n : asked) by_all = std::min(by_all, n.load());
            together.arrive_and_wait();
            edges[r].grant_up_to(by_all);
            if (stops[r]) break;
            if (pauses[r]) {
                edges[r].wait_for_more_than(by_all);
                continue;
            }
            pause_up_to(random, 300);
            ++steps[r];
        }
        edges[r].end_turns();
    }
    void join() {
        for (auto& t : trainers) t.join();
    }
};
}  // namespace

TEST_CASE("step edge: in turns, what all ranks ask for happens at the same step on all, however late each asks", "[session]") {
    Ranks ranks;
    std::vector<int64_t> at[kRanks];
    std::vector<std::thread> sessions;
    for (int r = 0; r < kRanks; ++r)
        sessions.emplace_back([&, r] {
            std::mt19937 random{unsigned(r)};
            StepEdge& edge = ranks.edges[r];
            for (int i = 0; i < kRequests; ++i) {
                pause_up_to(random, 500);
                if (i % 10 == 7) {
                    bool pause = i % 20 == 7;
                    edge.ask([&, r, pause] { ranks.pauses[r] = pause; }, true);
                    at[r].push_back(pause ? ranks.steps[r].load() : -1);
                    continue;
                }
                edge.lock();
                edge.lock();                                // twice by one thread
                int64_t step = ranks.steps[r];
                pause_up_to(random, 200);
                at[r].push_back(step == ranks.steps[r] ? step : -2);    // no step meanwhile
                edge.unlock();
                edge.unlock();
            }
            edge.ask([&, r] { ranks.stops[r] = true; }, false);
        });
    for (auto& t : sessions) t.join();
    ranks.join();
    REQUIRE(at[0].size() == size_t(kRequests));
    CHECK(ranks.steps[0] > 10);
    for (int r = 0; r < kRanks; ++r) {
        CHECK((at[r] == at[0]));
        CHECK(ranks.steps[r] == ranks.steps[0]);
        CHECK(std::count(at[r].begin(), at[r].end(), -2) == 0);
    }
}

TEST_CASE("step edge: requests that are left at the end of turns are granted, and the edge is a plain one again", "[session]") {
    StepEdge edge;
    CHECK(!edge.has_turns());
    edge.begin_turns();
    std::atomic<bool> locked = false, done = false;
    std::thread waits([&] {
        edge.lock();
        locked = true;
        edge.unlock();
    });
    edge.ask([&] { done = true; }, false);
    while (edge.asked() < 2) std::this_thread::yield();
    CHECK(!locked);
    edge.end_turns();
    waits.join();
    CHECK(locked);
    CHECK(done);
    CHECK(edge.has_turns());
    edge.ask([&] { done = false; }, true);
    CHECK(!done);
    CHECK(edge.lock_unless([] { return true; }));
    edge.unlock();
    edge.forget_turns();
    CHECK(!edge.has_turns());
}

TEST_CASE("step edge: it is whose thread holds it, with turns and without", "[session]") {
    StepEdge edge;
    for (bool turns : {false, true}) {
        if (turns) edge.begin_turns();
        CHECK(!edge.is_mine());
        std::thread grants([&] {
            if (!turns) return;
            edge.set_trainer();
            edge.wait_for_more_than(0);
            edge.grant_up_to(1);
        });
        edge.lock();
        edge.lock();
        CHECK(edge.is_mine());
        std::thread([&] { CHECK(!edge.is_mine()); }).join();
        edge.unlock();
        CHECK(edge.is_mine());
        edge.unlock();
        CHECK(!edge.is_mine());
        grants.join();
    }
}

TEST_CASE("step edge: who waits for a request that is left at the end of turns goes on when it is done", "[session]") {
    StepEdge edge;
    edge.begin_turns();
    edge.set_trainer();
    std::atomic<bool> done = false, was_done = false;
    std::thread waits([&] {
        auto request = [&] {
            edge.lock();
            edge.unlock();                                      // wakes all that wait at the edge
            std::this_thread::sleep_for(std::chrono::milliseconds(30));
            done = true;
        };
        edge.ask(request, true);
        was_done = done.load();
    });
    while (edge.asked() < 1) std::this_thread::yield();
    edge.forget_turns();
    CHECK(edge.has_turns());
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
    edge.end_turns();
    waits.join();
    CHECK(was_done);
}
