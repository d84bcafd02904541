// A rank that fails amid a run's collectives: its error arrives on all ranks, soon, and the run goes on as if the step had not begun, or after it was restored.
#include "core/base/error.h"
#include "core/train/agree.h"
#include "core/train/run.h"
#include "tests/catch.h"
#include "tests/dist/layouts.h"
#include "tests/small_config.h"

#include <ATen/ATen.h>

#include <dlfcn.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <functional>
#include <fstream>
#include <limits>
#include <memory>
#include <new>
#include <optional>

using namespace moe;
using namespace moe::train;
using test::Layout;

namespace {
constexpr size_t kLarge = 200000;
std::atomic<int64_t> large_left = std::numeric_limits<int64_t>::max();      ///< so many large pieces of memory are given, then none
std::atomic<int> num_freed = 0;                                            ///< communicators
}  // namespace

/// Memory for what is large ends when a test wants that: where a text of that size is made, and nowhere else.
void* operator new(size_t size) {
    void* memory = size >= kLarge && large_left-- <= 0 ? nullptr : std::malloc(size > 0 ? size : 1);
    if (!memory) throw std::bad_alloc();
    return memory;
}
void* operator new(size_t size, const std::nothrow_t&) noexcept { return std::malloc(size > 0 ? size : 1); }
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }

/// In front of the library's, which CMakeLists.txt makes the plugin see: counts.
extern "C" int MPI_Comm_free(void* comm) {
    ++num_freed;
    return reinterpret_cast<int (*)(void*)>(dlsym(RTLD_DEFAULT, "PMPI_Comm_free"))(comm);
}

namespace {
/// Where a rank fails; each once.
enum class Place { none, forward, backward };

/// What the routers' hooks of a run look at: a way to fail in the middle of a segment.
struct Fault {
    Place place = Place::none;
    int calls_before = 0;                    ///< of hooks that could have failed
    bool is_met(Place here) {
        if (place != here || calls_before-- > 0) return false;
        place = Place::none;
        return true;
    }
    static void fail(const char* where) { throw Error({ErrorKind::memory, where, "planned", "no failure", "", "", -1, ""}); }
};

Config config_of(const Layout& layout) {
    Config c = test::small_config();
    c.model.num_layers = 4;
    c.model.mla.num_heads = 4;
    c.model.mla.attn_dropout = 0.1;
    c.model.moe.num_experts = 8;
    c.model.moe.bias_update_speed = 0.05;
    c.training.global_batch_size = 4;
    c.training.micro_batch_size = 1;
    c.training.seq_length = 16;
    c.validation.max_batches = 1;
    c.distributed.pipeline_schedule = "1f1b";
    return layout.of(c);
}

struct Trained {
    std::shared_ptr<Fault> fault = std::make_shared<Fault>();
    std::unique_ptr<Run> run;
    explicit Trained(const Config& c) {
        RunOptions quiet;
        quiet.log_folder = quiet.console = false;
        run = std::make_unique<Run>(c, quiet);
        hook();
    }
    /// Also after restore_from(), which brings the routers back to what the run's interventions say.
    void hook() {
        std::map<int64_t, routing::Intervention> hooks;
        for (int64_t layer : run->model().routed_layers()) {
            routing::Intervention& hook = hooks[layer];
            hook.settings = run->model().router_settings();
            hook.score = [fault = fault](const Tensor& logits, const routing::RouteCall&) {
                if (fault->is_met(Place::forward)) Fault::fail("forward");
                Tensor scores = logits.sigmoid();
                if (scores.requires_grad())
                    scores.register_hook([fault](const Tensor& g) {
                        if (fault->is_met(Place::backward)) Fault::fail("backward");
                        return g;
                    });
                return scores;
            };
        }
        run->model().set_interventions(std::move(hooks));
    }
    void restore_from(const std::string& path) {
        run->restore_from(path);
        hook();
    }
    Run* operator->() { return run.get(); }
    /// Bits of this rank's weights, moments and biases.
    std::map<std::string, Tensor> state() {
        std::map<std::string, Tensor> all;
        for (auto& piece : run->model().store().owned(false)) {
            all[piece.rectangle.name] = piece.master.read().clone();
            for (size_t i = 0; i < piece.state.size(); ++i) all[fmt::format("{}/{}", piece.rectangle.name, i)] = piece.state[i].clone();
        }
        for (int64_t layer : run->model().routed_layers()) all[Model::bias_name(layer)] = run->model().bias(layer).clone();
        return all;
    }
};

/// While it lives this rank gets so many large pieces of memory and no more.
struct FewLarge {
    explicit FewLarge(int64_t num) { large_left = num; }
    ~FewLarge() { large_left = std::numeric_limits<int64_t>::max(); }
};

bool are_equal(const std::map<std::string, Tensor>& a, const std::map<std::string, Tensor>& b) {
    return a.size() == b.size() && std::all_of(a.begin(), a.end(), [&](const auto& x) { return b.contains(x.first) && at::equal(x.second, b.at(x.first)); });
}

double slowest_step_secs = 0;
double secs_since(std::chrono::steady_clock::time_point start) { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(); }
StepMetrics timed_step(Run& run) {
    auto start = std::chrono::steady_clock::now();
    StepMetrics m = run.step();
    slowest_step_secs = std::max(slowest_step_secs, secs_since(start));
    return m;
}

/// What f throws; the same on all ranks, within a second or what some steps take on this machine.
template <class F> ErrorParts failure_of(F&& f) {
    auto start = std::chrono::steady_clock::now();
    ErrorParts parts;
    try {
        f();
        FAIL("nothing was thrown");
    } catch (const Error& e) {
        parts = e.parts();
    }
    CHECK(secs_since(start) < 1 + 5 * slowest_step_secs);
    CHECK(is_agreed(parts));
    CHECK(shared_text(packed_error(parts), dist::world()) == packed_error(parts));
    return parts;
}

void check_planned(const ErrorParts& e, const char* where, int rank) {
    CHECK(e.kind == ErrorKind::memory);
    CHECK(e.op == where);
    CHECK(e.got == "planned");
    CHECK(e.rank == rank);
}

/// While it lives this rank's optimizer has no room for one bucket's moments: an update, or a save, fails in the middle.
struct BrokenMoments {
    Tensor* at = nullptr;
    Tensor kept;
    explicit BrokenMoments(Run& run) {
        for (Bucket& b : run.model().store().buckets())
            if (!b.state.empty() && b.state[0].numel() > 1) at = &b.state[0];
        kept = *at;
        *at = at::zeros({1}, kept.options());
    }
    ~BrokenMoments() { *at = kept; }
};

int64_t resident_bytes() {
    int64_t all = 0, resident = 0;
    std::ifstream("/proc/self/statm") >> all >> resident;
    return resident * 4096;
}

std::vector<Layout> all_layouts() {
    if (dist::world().size() > 2) return test::layouts();
    return {{}, {.zero = 1}, {.zero = 3}, {.ep = 2}, {.tp = 2}, {.pp = 2}, {.ep = 2, .zero = 3}};
}
}  // namespace

TEST_CASE("failures: in forward, backward and evaluation of any rank they arrive on all, and the run goes on bit for bit", "[train][dist]") {
    int rank = dist::world().rank(), size = dist::world().size();
    for (const Layout& layout : all_layouts()) {
        INFO(layout.name());
        Config c = config_of(layout);
        Trained want(c), run(c);
        for (int step = 0; step < 2; ++step) {
            int wrong = step % size;
            StepMetrics before = timed_step(*want.run);
            for (Place place : {Place::forward, Place::backward}) {
                const char* where = place == Place::forward ? "forward" : "backward";
                INFO("step " << step << ", " << where << " of rank " << wrong);
                Tensor counts = run->last_counts();
                if (rank == wrong) *run.fault = {place, step};
                check_planned(failure_of([&] { run->step(); }), where, wrong);
                CHECK(!run->is_broken());
                CHECK(run->current_step() == step);
                CHECK(run->last_counts().is_same(counts));
            }
            StepMetrics m = run->step();
            CHECK(m.loss == before.loss);
            CHECK(m.grad_norm == before.grad_norm);
            CHECK(m.tokens == before.tokens);
        }
        double loss = want->evaluate().loss;
        if (rank == size - 1) *run.fault = {Place::forward, 1};
        check_planned(failure_of([&] { run->evaluate(); }), "forward", size - 1);
        CHECK(run->evaluate().loss == loss);
        // Two ranks, each at its own place: the lower one's, or whichever came first.
        *run.fault = rank == 0 ? Fault{Place::backward, 1} : rank == 1 ? Fault{Place::forward, 1} : Fault{};
        ErrorParts both = failure_of([&] { run->step(); });
        CHECK((both.rank == 0 || both.rank == 1));
        CHECK(both.op == (both.rank == 0 ? "backward" : "forward"));
        *run.fault = {};
        CHECK(run->step().loss == want->step().loss);
        CHECK(are_equal(run.state(), want.state()));
    }
}

TEST_CASE("failures: after one amid the change of weights the run wants to be restored, and then goes on bit for bit", "[train][dist]") {
    test::SharedFolder folder;
    int rank = dist::world().rank(), wrong = dist::world().size() - 1;
    for (const Layout& layout : all_layouts()) {
        INFO(layout.name());
        Trained run(config_of(layout));
        run->step();
        std::string saved = folder.path + "/saved", other = folder.path + "/other";
        run->save(saved);
        double loss = timed_step(*run.run).loss;
        auto want = run.state();
        run.restore_from(saved);
        {
            std::optional<BrokenMoments> broken;
            if (rank == wrong) broken.emplace(*run.run);
            CHECK(failure_of([&] { run->save(other); }).rank == wrong);
            CHECK(!std::filesystem::exists(other));
            CHECK(!run->is_broken());
            CHECK(failure_of([&] { run->step(); }).rank == wrong);
        }
        CHECK(run->is_broken());
        for (const std::function<void()>& call : std::initializer_list<std::function<void()>>{[&] { run->step(); }, [&] { run->save(other); }, [&] { run->evaluate(); }, [&] { run->intervene("mask", {{"layer", 2}, {"expert", 1}}); }}) {
            try {
                call();
                FAIL("a broken run went on");
            } catch (const Error& e) {
                CHECK(e.kind() == ErrorKind::state);
                CHECK(e.parts().hint.find("run:restore") != std::string::npos);
            }
        }
        CHECK(!run->save_on_exit());
        run.restore_from(saved);
        CHECK(run->current_step() == 1);
        CHECK(run->step().loss == loss);
        CHECK(are_equal(run.state(), want));
    }
}

TEST_CASE("failures: a hundred of them leave nothing behind", "[train][dist]") {
    int rank = dist::world().rank(), size = dist::world().size();
    Layout layout = size == 2 ? Layout{.zero = 3, .pp = 2} : Layout{.ep = 2, .pp = 2};
    Config c = config_of(layout);
    c.model.num_layers = 2;
    c.model.first_k_dense_replace = 0;
    c.training.seq_length = 8;
    Trained want(c), run(c);
    int64_t early = 0;
    for (int i = 0; i < 100; ++i) {
        int wrong = i % size;
        if (rank == wrong) *run.fault = {i % 3 == 0 ? Place::backward : Place::forward, i % 2};
        check_planned(failure_of([&] { run->step(); }), i % 3 == 0 ? "backward" : "forward", wrong);
        if (i == 30) early = resident_bytes();
    }
    CHECK(resident_bytes() - early < int64_t(8) << 20);
    CHECK(run->step().loss == want->step().loss);
    CHECK(are_equal(run.state(), want.state()));
}

TEST_CASE("failures: a step that cannot begin on one rank begins on none", "[train][dist]") {
    int rank = dist::world().rank(), size = dist::world().size();
    Config c = config_of({});
    c.data.dataset_name = std::string(kLarge, 'x');          // part of what the loader says of its position, which a step keeps before it begins
    Trained want(c), run(c);
    timed_step(*run.run);
    want->step();
    for (int wrong = 0; wrong < size; ++wrong) {
        INFO("rank " << wrong);
        ErrorParts e = failure_of([&] {
            std::optional<FewLarge> none;
            if (rank == wrong) none.emplace(0);
            run->step();
        });
        CHECK(e.kind == ErrorKind::memory);
        CHECK(e.rank == wrong);
        CHECK(!run->is_broken());
        CHECK(run->current_step() == 1);
    }
    CHECK(run->step().loss == want->step().loss);
    CHECK(are_equal(run.state(), want.state()));
}

TEST_CASE("failures: a run that fails while it is made leaves none of its groups", "[train][dist]") {
    RunOptions quiet;
    quiet.log_folder = quiet.console = false;
    for (const Layout& layout : all_layouts()) {
        INFO(layout.name());
        Config c = config_of(layout);
        int before = num_freed;
        { Run run(c, quiet); }
        int of_a_run = num_freed - before;
        CHECK(of_a_run > 0);
        c.training.compile_graphs = "on";
        before = num_freed;
        CHECK(failure_of([&] { Run run(c, quiet); }).op == "training.compile_graphs");
        CHECK(num_freed - before == of_a_run);
    }
    // Sizes that do not fit the ranks.
    Config c = config_of({.pp = 3});
    int before = num_freed;
    CHECK_THROWS_WITH(Run(c, quiet), Catch::Contains("tensor_parallel_size 1 x pipeline_parallel_size 3"));
    CHECK(num_freed - before == 1);
    // Wherever one rank has no more memory.
    c = config_of(all_layouts().back());
    c.data.dataset_name = std::string(kLarge, 'x');
    int of_a_run = num_freed;
    { Run run(c, quiet); }
    of_a_run = num_freed - of_a_run;
    bool is_made = false;
    int num_built = 0;
    for (int num = 0; !is_made; ++num) {
        INFO("after " << num << " large pieces");
        before = num_freed;
        try {
            std::optional<FewLarge> few;
            if (dist::world().rank() == 1) few.emplace(num);
            Run run(c, quiet);
            is_made = true;
        } catch (const Error& e) {
            CHECK(e.parts().rank == 1);
            int freed = num_freed - before;
            CHECK((freed == of_a_run || (freed == 0 && num_built == 0)));           // once groups were made, every later failure frees them
            num_built += freed > 0;
        }
    }
    CHECK(num_built > 0);
}

TEST_CASE("together: errors that all ranks throw have no rank, and an inner one's stays what it was", "[train][dist]") {
    dist::Group world = dist::world().duplicate();
    int wrong = world.size() - 1;
    ErrorParts e = failure_of([&] { together(world, [] { Fault::fail("all"); }); });
    CHECK(e.op == "all");
    CHECK(e.rank == -1);
    e = failure_of([&] {
        together(world, [&] {
            world.all_reduce(1.0);
            agree(world, [&] {
                if (world.rank() == wrong) throw std::bad_alloc();
            });
        });
    });
    CHECK(e.kind == ErrorKind::memory);
    CHECK(e.rank == wrong);
    int64_t least = -1, most = -1;
    e = failure_of([&] {
        together(
            world,
            [&] {
                if (world.rank() == wrong) Fault::fail("one");
                world.barrier();
            },
            [&] { return world.rank() == wrong ? int64_t(5) : int64_t(7); }, [&](int64_t a, int64_t b) { least = a, most = b; });
    });
    CHECK(e.rank == wrong);
    CHECK(least == 5);
    CHECK(most == 7);
    CHECK(world.all_reduce(int64_t(1)) == world.size());
}
