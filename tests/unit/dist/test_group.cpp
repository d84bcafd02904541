#include "core/dist/group.h"

#include "core/dist/layout.h"
#include "core/dist/plugin.h"

#include <ATen/ATen.h>
#include <unistd.h>

#include <cstdlib>
#include <fstream>

#include "tests/error_of.h"      // last: a LibTorch header defines a CHECK of its own

using namespace moe;
using moe::test::error_of;
using at::Tensor;
using namespace moe::dist;

namespace {
/// Claims several ranks without any: what checks see before a library does. Every call fails as a library would.
struct BrokenBackend : Backend {
    int rank_, size_;
    BrokenBackend(int rank, int size) : rank_(rank), size_(size) {}
    int rank() const override { return rank_; }
    int size() const override { return size_; }
    std::unique_ptr<Backend> split(int, int) override { return std::make_unique<BrokenBackend>(rank_ % 2, 2); }
    std::unique_ptr<Backend> duplicate() override { return std::make_unique<BrokenBackend>(rank_, size_); }
    bool has_failed() const override { return false; }
    void recover() override { fail(); }
    bool is_flushed() override { fail(); }
    void barrier() override { fail(); }
    void broadcast(void*, int64_t, DType, int) override { fail(); }
    void all_reduce(void*, int64_t, DType, ReduceOp) override { fail(); }
    void all_gather(const void*, void*, const int64_t*, DType) override { fail(); }
    void reduce_scatter(const void*, void*, const int64_t*, DType, ReduceOp) override { fail(); }
    void all_to_all(const void*, const int64_t*, void*, const int64_t*, DType) override { fail(); }
    void send(const void*, int64_t, DType, int) override { fail(); }
    void receive(void*, int64_t, DType, int) override { fail(); }
    bool has_message(int) override { fail(); }
    void flush() override { fail(); }
    [[noreturn]] static void fail() { throw std::runtime_error("the cable is cut"); }
};
Group broken(int rank = 1, int size = 4) { return Group(std::make_shared<BrokenBackend>(rank, size)); }
}  // namespace

TEST_CASE("group: of one rank every collective is the identity", "[dist]") {
    Group one;
    Tensor x = at::arange(6, at::kFloat), before = x.clone(), out = at::zeros({6}, at::kFloat);
    one.barrier();
    one.broadcast(x, 0);
    one.all_reduce(x);
    CHECK(at::equal(x, before));
    CHECK(one.all_reduce(2.5, ReduceOp::max) == 2.5);
    CHECK(one.all_reduce(int64_t(7)) == 7);
    one.all_gather(x, out, {6});
    CHECK(at::equal(out, before));
    out.zero_();
    one.reduce_scatter(x, out, {6});
    CHECK(at::equal(out, before));
    one.reduce_scatter(x, x, {6});
    CHECK(at::equal(x, before));
    Tensor rows = x.view({3, 2});
    CHECK(one.all_to_all_rows(rows, {3}, {3}).data_ptr() == rows.data_ptr());
    CHECK(one.split(3, 0).size() == 1);
    CHECK(error_of([&] { one.all_gather(x, out, {5}); }).kind() == ErrorKind::shape);
    CHECK(error_of([&] { one.broadcast(x, 1); }).kind() == ErrorKind::dist);
}

TEST_CASE("group: bad arguments and failures of the library are errors with the rank", "[dist]") {
    Group g = broken();
    auto failed = error_of([&] { g.all_reduce(at::zeros({2})); });
    CHECK(failed.kind() == ErrorKind::dist);
    CHECK(failed.parts().rank == 1);
    CHECK(failed.parts().got == "the cable is cut");
    CHECK(error_of([&] { g.all_reduce(1.0); }).parts().op == "dist.all_reduce");
    auto half = error_of([&] { g.all_reduce(at::zeros({2}, at::kHalf)); });
    CHECK(half.kind() == ErrorKind::dtype);
    CHECK(half.parts().rank == 1);
    CHECK(error_of([&] { g.broadcast(at::zeros({3, 4}).t(), 0); }).kind() == ErrorKind::shape);
    Tensor x = at::zeros({4}), out = at::zeros({10});
    CHECK(error_of([&] { g.all_gather(x, out, {2, 4, 4}); }).kind() == ErrorKind::shape);
    CHECK(error_of([&] { g.all_gather(x, out, {2, 3, 4, 1}); }).kind() == ErrorKind::shape);
    CHECK(error_of([&] { g.all_gather(x, out, {2, 4, 5, -1}); }).kind() == ErrorKind::shape);
    CHECK(error_of([&] { g.all_gather(x, out.to(at::kDouble), {2, 4, 4, 0}); }).kind() == ErrorKind::dtype);
    CHECK(error_of([&] { g.all_gather(x, out, {2, 4, 4, 0}); }).kind() == ErrorKind::dist);
    CHECK(error_of([&] { g.all_to_all_rows(at::zeros({4, 2}), {1, 1, 1, 2}, {0, 1, 0, 0}); }).kind() == ErrorKind::shape);
    CHECK(error_of([&] { g.all_to_all_rows(at::zeros({4, 2}), {1, 1, 1, 1}, {0, 2, 0, 0}); }).kind() == ErrorKind::shape);
}

TEST_CASE("group: what runs before the next collective runs once, in groups of several ranks, the outer one after the inner", "[dist]") {
    int outer = 0, inner = 0;
    BeforeCollectives a([&] { ++outer; });
    Group().barrier();
    CHECK(outer == 0);
    {
        BeforeCollectives b([&] {
            ++inner;
            throw std::logic_error("no");
        });
        CHECK_THROWS_AS(broken().barrier(), std::logic_error);
        CHECK(error_of([&] { broken().all_reduce(1.0); }).kind() == ErrorKind::dist);
    }
    CHECK((inner == 1 && outer == 0));
    CHECK(error_of([&] { broken().all_reduce(1.0); }).kind() == ErrorKind::dist);
    BeforeCollectives::pass();
    CHECK(outer == 1);
}

TEST_CASE("mesh: sizes that the ranks do not allow are errors in the config's terms", "[dist]") {
    DistributedConfig config;
    Mesh one = make_mesh(config, Group());
    CHECK((one.dp.size() == 1 && one.ep.size() == 1 && one.expert_dp.size() == 1 && one.tp.size() == 1));
    config.data_parallel_size = 2;
    auto e = error_of([&] { make_mesh(config, Group()); });
    CHECK(e.kind() == ErrorKind::config);
    CHECK(e.parts().op == "distributed.data_parallel_size");
    config.data_parallel_size = -1;
    config.expert_parallel_size = 3;
    e = error_of([&] { make_mesh(config, broken()); });
    CHECK(e.kind() == ErrorKind::config);
    CHECK(e.parts().op == "distributed.expert_parallel_size");
    CHECK(e.parts().got == "3");
    config.expert_parallel_size = 2;
    Mesh four = make_mesh(config, broken());
    CHECK((four.dp.size() == 4 && four.ep.size() == 2 && four.expert_dp.size() == 2));
    config.expert_parallel_size = 4;
    four = make_mesh(config, broken());
    CHECK((four.ep.size() == 4 && four.expert_dp.size() == 1));
    config.tensor_parallel_size = 2;
    Mesh cut = make_mesh(config, broken());
    CHECK((cut.tp.size() == 2 && cut.dp.size() == 2 && cut.stage.size() == 4 && cut.ep.size() == 4 && cut.pp.size() == 1));
    config.expert_parallel_size = 1;
    config.pipeline_parallel_size = 2;
    Mesh staged = make_mesh(config, broken());
    CHECK((staged.tp.size() == 2 && staged.dp.size() == 1 && staged.stage.size() == 2 && staged.expert_dp.size() == 2 && staged.pp.size() == 2 && staged.tied.size() == 4));
    config.tensor_parallel_size = 3;
    CHECK(error_of([&] { make_mesh(config, broken()); }).parts().op == "distributed.tensor_parallel_size");
    config.tensor_parallel_size = 1;
    config.context_parallel_size = 2;
    CHECK(error_of([&] { make_mesh(config, broken()); }).parts().op == "distributed.context_parallel_size");
}

TEST_CASE("layout: on one rank every verb returns the tensor itself", "[dist]") {
    Layout layout{Mesh{}};
    Tensor x = at::randn({5, 3}).requires_grad_(), offsets = at::tensor({0, 2, 2, 5}, at::kLong);
    auto plan = layout.ep.plan(offsets);
    CHECK(plan.send == std::vector<int64_t>{5});
    CHECK(plan.recv == std::vector<int64_t>{5});
    CHECK(!plan.expert_Q.defined());
    CHECK(at::equal(plan.offsets, offsets));
    CHECK(layout.ep.dispatch(x, plan).is_same(x));
    CHECK(layout.ep.combine(x, plan).is_same(x));
    CHECK(layout.tp.enter(x).is_same(x));
    CHECK(layout.tp.exit(x).is_same(x));
    CHECK(layout.cp.gather(x).is_same(x));
    CHECK(layout.tp.part(x).is_same(x));
    CHECK(error_of([&] { TensorParallel{broken()}.enter(x); }).kind() == ErrorKind::dist);
    CHECK(error_of([&] { TensorParallel{broken()}.exit(x); }).kind() == ErrorKind::shape);
    CHECK(error_of([&] { TensorParallel{broken()}.part(x); }).kind() == ErrorKind::shape);
    CHECK(error_of([&] { layout.ep.plan(at::zeros({3})); }).kind() == ErrorKind::dtype);
    CHECK(error_of([&] { layout.ep.plan(at::zeros({2, 2}, at::kLong)); }).kind() == ErrorKind::shape);
    CHECK(error_of([&] { ExpertParallel{broken()}.plan(at::zeros({6}, at::kLong)); }).parts().op == "distributed.expert_parallel_size");
}

TEST_CASE("world: a missing or wrong plugin says what to install", "[dist]") {
    auto none = error_of([] { open_plugin({"/nonexistent/libmoelab_mpi.so"}); });
    CHECK(none.kind() == ErrorKind::dist);
    CHECK(std::string(none.what()).find("libopenmpi-dev") != std::string::npos);
    CHECK(std::string(none.what()).find("/nonexistent/libmoelab_mpi.so") != std::string::npos);
    std::string file = std::string(P_tmpdir) + "/moelab_not_a_plugin_" + std::to_string(getpid()) + ".so";
    std::ofstream(file) << "text";
    CHECK(error_of([&] { open_plugin({file}); }).kind() == ErrorKind::dist);
    std::remove(file.c_str());
    setenv("MOELAB_MPI_PLUGIN", "/elsewhere/mpi.so", 1);
    auto files = plugin_candidates();
    unsetenv("MOELAB_MPI_PLUGIN");
    REQUIRE(files.size() == 3);
    CHECK(files[0].ends_with("lib/libmoelab_mpi.so"));
    CHECK(files[2] == "/elsewhere/mpi.so");
}

TEST_CASE("world: a launcher's environment tells of several ranks", "[dist]") {
    auto with = [](const char* name, const char* value) {
        setenv(name, value, 1);
        bool launched = launched_with_ranks();
        unsetenv(name);
        return launched;
    };
    CHECK(!launched_with_ranks());
    CHECK(with("OMPI_COMM_WORLD_SIZE", "2"));
    CHECK(!with("OMPI_COMM_WORLD_SIZE", "1"));
    CHECK(with("PMI_SIZE", "4"));
    CHECK(!with("SLURM_NTASKS", "4"));
    setenv("MOELAB_BACKEND", "mpi", 1);
    CHECK(with("SLURM_NTASKS", "4"));
    unsetenv("MOELAB_BACKEND");
}
