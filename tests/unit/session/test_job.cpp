// Training in the background and interrupts of training: one Lua state, several threads.
#include "lua/session/session.h"
#include "tests/catch.h"

#include <ATen/Parallel.h>

#include <chrono>
#include <filesystem>
#include <future>
#include <iterator>
#include <thread>

using namespace moe;
using namespace moe::lua;

namespace {
constexpr const char* kConfig = R"(
cfg = moe.config { deterministic = true,
  model = { num_layers = 3, vocab_size = 264, first_k_dense_replace = 1, dense_intermediate_size = 64,
    mla = { d_model = 32, d_latent = 16, num_heads = 2, qk_nope_head_dim = 8, qk_rope_head_dim = 8, v_head_dim = 8 },
    moe = { num_experts = 4, num_experts_per_token = 2, expert_intermediate_size = 16, num_shared_experts = 1 } },
  training = { global_batch_size = 4, micro_batch_size = 1, seq_length = 32, train_steps = 100000, learning_rate = 3e-3 },
  data = { dataset_type = "synthetic", synthetic = { domains = 2 } }, validation = { enabled = false } }
function fresh(c) return moe.run { config = c or cfg, console = false, log = false } end
function sum(run) local s = 0 for _, p in pairs(run.model:parameters()) do s = s + p:to("fp64"):abs():sum():item() end return s end
)";

SessionOptions quiet() {
    SessionOptions o;
    o.quiet = true;
    return o;
}

/// Evaluates, and fails with the error's text.
std::vector<std::string> run(Session& s, const std::string& code) {
    Result r = s.eval(code);
    INFO(code);
    if (r.error) FAIL(Error(*r.error).what());
    return r.values;
}
}  // namespace

TEST_CASE("session: the metrics of a step whose line has just been printed are no second time", "[session]") {
    Session s({.print = [](std::string_view) {}, .interactive = true});
    run(s, kConfig);
    run(s, "r = moe.run { config = cfg:with { training = { log_interval = 3 } }, log = false }");
    CHECK(run(s, "r:train(1)").empty());            // the first step has a line
    CHECK(run(s, "_.step == 1 and r.last.step == 1").at(0) == "true");
    CHECK(run(s, "r:train(1)").at(0).starts_with("step: 2 "));
    CHECK(run(s, "r:train(1)").empty());
    CHECK(run(s, "r.last").at(0).starts_with("step: 3 "));
    CHECK(run(s, "r:train(0)").empty());            // nil
}

#ifndef __SANITIZE_THREAD__      // which does not follow libgomp's workers
TEST_CASE("job: the workers that an input's own operators took are let go while it trains", "[session]") {
    auto threads = [] { return std::distance(std::filesystem::directory_iterator("/proc/self/task"), {}); };
    // On a thread of its own, which has no workers yet and whose setting ends with it.
    std::async(std::launch::async, [&] {
        at::set_num_threads(4);
        Session s(quiet());
        run(s, kConfig);
        const auto alone = threads();
        run(s, "big = moe.ones { 2 ^ 20 }; big:sum()");
        CHECK(threads() == alone + 3);           // they stay where nothing trains
        run(s, "r = fresh(); job = r:start(100000); while r.step < 2 do moe.sleep(0.001) end");
        const auto idle = threads();
        CHECK(run(s, "(big + big):sum():item()").size() == 1);
        for (int i = 0; i < 200 && threads() != idle; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(5));      // what ends is listed for a moment
        CHECK(threads() == idle);
    }).get();
}
#endif

TEST_CASE("job: hundreds of inputs while it trains, with callbacks and hooks", "[session]") {
    Session s(quiet());
    run(s, kConfig);
    run(s, "r, seen = fresh(), 0");
    run(s, "r:every(3, function(m) seen = seen + 1 end)");
    run(s, "r.model.router:hook('pre_topk', function(s) return s.scores * 1.0 end)");
    run(s, "job = r:start(100000)");
    int asked = 0;
    for (int i = 0; i < 300; ++i) {
        CHECK(run(s, "1 + 1") == std::vector<std::string>{"2"});
        s.is_complete("for i = 1, 3 do");
        if (i % 50 == 0) run(s, "h = r.model.router:mask { layer = 1, expert = 0 }"), run(s, "h:undo()"), ++asked;
        if (i % 60 == 7) run(s, "r.lr = 1e-3");
        if (i % 100 == 99) run(s, "r:eval { max_batches = 1 }");
        run(s, "do local t = {} for i = 1, 100 do t[i] = moe.zeros { 8 } end end collectgarbage('step')");
    }
    run(s, "job:stop()");
    CHECK(run(s, "seen == r.step // 3").at(0) == "true");
    CHECK(run(s, "job.step == r.step and r.step > 0").at(0) == "true");
    run(s, "r:train(1)");
    CHECK(asked == 6);
}

TEST_CASE("job: the session can end while it trains", "[session]") {
    for (int i = 0; i < 3; ++i) {
        Session s(quiet());
        run(s, kConfig);
        run(s, "r = fresh() r:on('step', function(m) last = m.step end) r:start(100000)");
        std::this_thread::sleep_for(std::chrono::milliseconds(10 * i));
    }
}

TEST_CASE("interrupt: a step is given up at its next segment and undone", "[session]") {
    Session s(quiet());
    run(s, kConfig);
    run(s, "a, b = fresh(), fresh()");
    for (int i = 0; i < 4; ++i) {
        std::chrono::steady_clock::time_point asked;
        std::thread other([&] {
            std::this_thread::sleep_for(std::chrono::milliseconds(60 + 7 * i));
            asked = std::chrono::steady_clock::now();
            s.interrupt();
        });
        Result r = s.eval("a:train(1000000)");
        double late = std::chrono::duration<double>(std::chrono::steady_clock::now() - asked).count();
        other.join();
        REQUIRE(r.error);
        CHECK(r.error->kind == ErrorKind::interrupted);
        CHECK(late < 1);                                       // 50 ms on a machine that does nothing else
    }
    run(s, "b:train(a.step)");
    CHECK(run(s, "sum(a) == sum(b)").at(0) == "true");
    run(s, "a:train(2) b:train(2)");
    CHECK(run(s, "sum(a) == sum(b)").at(0) == "true");
}

TEST_CASE("interrupt: ends a wait for a job, the second one the job", "[session]") {
    Session s(quiet());
    run(s, kConfig);
    run(s, "r = fresh() job = r:start(1000000)");
    for (int i = 0; i < 2; ++i) {
        std::thread other([&] {
            std::this_thread::sleep_for(std::chrono::milliseconds(50));
            s.interrupt();
        });
        Result r = s.eval("job:wait()");
        other.join();
        REQUIRE(r.error);
        CHECK(r.error->kind == ErrorKind::interrupted);
        if (i == 0) CHECK(run(s, "job:status()").at(0) == "running");
    }
    run(s, "while job:status() == 'running' do end");
    CHECK(run(s, "job:status()").at(0) == "stopped");
    run(s, "r:train(1)");
}

TEST_CASE("hooks: functions of inputs are stored with their source", "[session]") {
    Session s(quiet());
    run(s, kConfig);
    run(s, "r = fresh() k = 3");
    run(s, "local a, b = 0.5, { 1, 2 }\nr.model.router:hook('pre_topk', function(s)\n  return s.scores * a + b[1]\nend)");
    run(s, "r.model.router:hook('pre_topk', function(s) return s.scores end) r.schedule = function(step) return 1e-3 / k end");
    CHECK(run(s, "r.events[1].args['function'].source").at(0) == "function(s)\n  return s.scores * a + b[1]\nend");
    CHECK(run(s, "r.events[3].args['function'].source").at(0) == "function(step) return 1e-3 / k end");
    run(s, "function named(step) return 1e-3 end r.schedule = named");
    CHECK(run(s, "r.events[4].args['function'].source").at(0) == "function(step) return 1e-3 end");
    run(s, "local t = {} function t.f(step) return 2e-3 end r.schedule = t.f r:train(2)");
    CHECK(run(s, "r.lr").at(0) == "0.002");
    Result bad = s.eval("local c <const> = 4; r.schedule = function(step) return c end");
    REQUIRE(bad.error);
    CHECK(bad.error->kind == ErrorKind::usage);
}
