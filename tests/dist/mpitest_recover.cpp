// Ranks that leave a sequence of calls at any place: the others hear of it in any of their groups, and all groups work afterwards.
#include "core/base/error.h"
#include "core/dist/group.h"
#include "tests/catch.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <deque>
#include <fstream>
#include <map>
#include <random>
#include <thread>

using namespace moe;
using namespace moe::dist;
using at::Tensor;

namespace {
struct Left {};

/// World, neighbours in twos, and every second rank: no group but the first has all of another.
struct Groups {
    Group world = dist::world().duplicate(), pair = world.split(world.rank() / 2, world.rank()), comb = world.split(world.rank() % 2, world.rank());
    const Group& of(uint32_t i) const { return i % 3 == 0 ? world : i % 3 == 1 ? pair : comb; }
};

std::vector<int64_t> equal_counts(const Group& g, int64_t n) { return std::vector<int64_t>(size_t(g.size()), n); }

/// One call of each kind with results that can be told.
void check_all(const Group& g) {
    Tensor sum = at::full({1000}, double(g.rank()), at::kDouble);
    g.all_reduce(sum);
    REQUIRE(at::equal(sum, at::full({1000}, g.size() * (g.size() - 1) / 2.0, at::kDouble)));
    Tensor all = at::zeros({3L * g.size()}, at::kLong);
    g.all_gather(at::full({3}, int64_t(g.rank()), at::kLong), all, equal_counts(g, 3));
    REQUIRE(at::equal(all, at::arange(3L * g.size(), at::kLong).floor_divide(3)));
    Tensor rows = g.all_to_all_rows(at::arange(g.size(), at::kLong) + 10 * g.rank(), equal_counts(g, 1), equal_counts(g, 1));
    REQUIRE(at::equal(rows, 10 * at::arange(g.size(), at::kLong) + g.rank()));
    if (g.size() == 1) return;
    Tensor out = at::full({20000}, float(g.rank())), in = at::zeros({20000});
    g.send(out, (g.rank() + 1) % g.size());
    int from = (g.rank() + g.size() - 1) % g.size();
    g.receive(in, from);
    g.flush();
    REQUIRE(at::equal(in, at::full({20000}, float(from))));
}

/// Calls that `seed` chooses, the same on all ranks; before the call number `leaves` this rank throws. `sent` lives until all of it has left.
void random_calls(const Groups& groups, uint32_t seed, int num_calls, int leaves, std::deque<Tensor>& sent) {
    std::mt19937 random(seed);
    std::map<const Group*, std::deque<int64_t>> on_their_way;
    auto receive = [&](const Group& g) {
        auto& sizes = on_their_way[&g];
        if (sizes.empty()) return;
        Tensor in = at::zeros({sizes.front()});
        sizes.pop_front();
        g.receive(in, (g.rank() + g.size() - 1) % g.size());
    };
    for (int call = 0; call < num_calls; ++call) {
        const Group& g = groups.of(random());
        uint32_t kind = random() % 9;
        int64_t n = std::array<int64_t, 3>{1, 700, 60000}[random() % 3];
        if (call == leaves) throw Left();
        Tensor data = at::ones({n}), whole = at::ones({n * g.size()});
        auto counts = equal_counts(g, n);
        switch (kind) {
            case 0: g.all_reduce(data); break;
            case 1: g.broadcast(data, g.size() - 1); break;
            case 2: g.all_gather(data, whole, counts); break;
            case 3: g.reduce_scatter(whole, data, counts); break;
            case 4: g.all_to_all_rows(whole, counts, counts); break;
            case 5: g.barrier(); break;
            case 6:
            case 7:
                if (g.size() == 1) break;
                g.send(sent.emplace_back(data), (g.rank() + 1) % g.size());
                on_their_way[&g].push_back(n);
                break;
            default: receive(g);
        }
    }
    for (const Group* g : {&groups.world, &groups.pair, &groups.comb}) {
        while (!on_their_way[g].empty()) receive(*g);
        g->flush();
    }
    groups.world.barrier();
}

int64_t resident_bytes() {
    int64_t all = 0, resident = 0;
    std::ifstream("/proc/self/statm") >> all >> resident;
    return resident * 4096;
}
}  // namespace

TEST_CASE("recover: whoever leaves at whatever call, the others hear of it, and all groups work again", "[dist]") {
    Groups groups;
    const Group& world = groups.world;
    constexpr int kRounds = 160, kCalls = 25;
    int num_failed = 0;
    int64_t early = 0;
    for (int round = 0; round < kRounds; ++round) {
        INFO("round " << round);
        // None, one, or any ranks leave; the same numbers on all ranks.
        std::mt19937 random(uint32_t(round) * 7919u + 1);
        std::vector<int> leaves(size_t(world.size()), -1);
        int mode = round % 4;
        for (int& at : leaves)
            if (mode == 3) at = int(random() % (2 * kCalls)) - kCalls;
        if (mode == 1 || mode == 2) leaves[random() % leaves.size()] = int(random() % kCalls);
        bool any = std::any_of(leaves.begin(), leaves.end(), [](int at) { return at >= 0; }), failed = false, heard = false;
        std::deque<Tensor> sent;
        try {
            random_calls(groups, uint32_t(round), kCalls, leaves[size_t(world.rank())], sent);
        } catch (const Left&) {
            failed = true;
            REQUIRE(!world.has_failed());
        } catch (const Error& e) {
            failed = heard = true;
            REQUIRE(world.has_failed());
            REQUIRE(e.kind() == ErrorKind::dist);
            REQUIRE(e.parts().got == "another rank has failed");
            // Until all have come to recover(), nothing is begun.
            CHECK_THROWS_AS(groups.pair.size() > 1 ? groups.pair.barrier() : world.barrier(), Error);
            // Nor does who waits for a message look for it for ever.
            CHECK_THROWS_AS(world.has_message((world.rank() + 1) % world.size()), Error);
        }
        REQUIRE(failed == any);
        if (failed) {
            if (round % 5 == 0 && heard) std::this_thread::sleep_for(std::chrono::milliseconds(2));
            world.recover();
            REQUIRE(!world.has_failed());
            ++num_failed;
            REQUIRE(world.all_reduce(int64_t(!heard)) >= 1);
        }
        for (uint32_t i = 0; i < 3; ++i) check_all(groups.of(i));
        if (round == kRounds / 4) early = resident_bytes();
    }
    CHECK(num_failed > kRounds / 2);
    CHECK(resident_bytes() - early < int64_t(8) << 20);
}

TEST_CASE("recover: a group of its own goes on while another has failed", "[dist]") {
    Group one = dist::world().duplicate(), other = dist::world().duplicate();
    bool leaves = one.rank() == one.size() - 1;
    if (!leaves) CHECK_THROWS_AS(one.barrier(), Error);
    std::thread recovers;
    if (leaves) recovers = std::thread([&] { one.recover(); });
    check_all(other);
    if (leaves) recovers.join();
    else one.recover();
    check_all(one);
}

TEST_CASE("recover: what calls cost", "[.bench]") {
    Group world = dist::world().duplicate();
    auto time = [&](const char* what, int times, auto&& call) {
        for (int i = 0; i < times / 10 + 1; ++i) call();
        world.barrier();
        auto start = std::chrono::steady_clock::now();
        for (int i = 0; i < times; ++i) call();
        double secs = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        if (world.rank() == 0) fmt::print("{:<24} {:>10.2f} µs\n", what, 1e6 * secs / times);
    };
    for (int64_t n : {1L, 1000L, 1000000L}) {
        Tensor data = at::ones({n});
        time(fmt::format("all_reduce of {}", n).c_str(), n > 100000 ? 100 : 3000, [&] { world.all_reduce(data); });
    }
}
