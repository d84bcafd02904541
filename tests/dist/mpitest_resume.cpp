// Checkpoints of several ranks: written together, loaded by any other layout, errors on all ranks.
#include "core/base/error.h"
#include "core/train/agree.h"
#include "core/train/run.h"
#include "tests/catch.h"
#include "tests/small_config.h"

#include <ATen/ATen.h>

#include <csignal>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <optional>
#include <sys/resource.h>
#include <unistd.h>

using namespace moe;
using namespace moe::train;
namespace fs = std::filesystem;

namespace {
/// The same folder on all ranks; rank 0 makes and removes it.
struct SharedFolder {
    std::string path = shared_text((fs::temp_directory_path() / ("moelab_mpi_" + std::to_string(getpid()))).string(), dist::world());
    ~SharedFolder() {
        dist::world().barrier();
        std::error_code ignored;
        if (dist::world().rank() == 0) fs::remove_all(path, ignored);
        dist::world().barrier();
    }
};

/// While it lives this process cannot make a file longer than 8 bytes.
struct FullDisk {
    rlimit before{};
    void (*handler)(int) = std::signal(SIGXFSZ, SIG_IGN);
    FullDisk() {
        getrlimit(RLIMIT_FSIZE, &before);
        rlimit full{8, before.rlim_max};
        setrlimit(RLIMIT_FSIZE, &full);
    }
    ~FullDisk() {
        setrlimit(RLIMIT_FSIZE, &before);
        std::signal(SIGXFSZ, handler);
    }
};

struct Layout {
    const char* name;
    std::function<void(Config&)> change;
};
const Layout kLayouts[] = {
    {"data parallel", [](Config&) {}},
    {"ZeRO 1", [](Config& c) { c.distributed.zero_stage = 1; }},
    {"ZeRO 3 and experts in parallel", [](Config& c) { c.distributed.zero_stage = 3; c.distributed.expert_parallel_size = 2; }},
    {"tensor parallel", [](Config& c) { c.distributed.tensor_parallel_size = 2; }},
    {"two stages", [](Config& c) { c.distributed.pipeline_parallel_size = 2; }},
};

Config base(const SharedFolder& folder, const Layout& layout) {
    Config c = test::small_config();
    c.output_dir = folder.path;
    c.model.num_layers = 4;
    c.model.mla.num_heads = 4;
    c.model.moe.num_experts = 6;
    c.model.moe.bias_update_speed = 0.05;
    c.training.use_fp64 = false;
    c.training.use_bf16 = true;
    c.training.use_mtp = true;
    c.training.global_batch_size = 8;
    c.training.micro_batch_size = 2;
    c.training.seq_length = 24;
    c.model.dense_intermediate_size = 288;                 // rows that ZeRO cuts: more than 128
    layout.change(c);
    return c;
}

RunOptions in(const std::string& resume, bool log_folder = true) {
    RunOptions o;
    o.console = false;
    o.resume = resume;
    o.log_folder = log_folder;
    return o;
}

/// Every tensor's bytes.
std::map<std::string, std::string> contents(const std::string& path) {
    store::Checkpoint saved(path);
    std::map<std::string, std::string> all;
    for (const auto& name : saved.names()) {
        Tensor t = saved.read(name);
        all[name].assign(static_cast<const char*>(t.const_data_ptr()), t.nbytes());
    }
    return all;
}
}  // namespace

TEST_CASE("resume: every layout goes on bit for bit, and loads what any other has saved") {
    SharedFolder folder;
    std::vector<std::string> saved;
    for (const Layout& layout : kLayouts) {
        INFO(layout.name);
        Config c = base(folder, layout);
        c.experiment_name = fmt::format("layout {}", saved.size());
        Run run(c, in(""));
        run.train(3);
        saved.push_back(run.save("three"));
        std::vector<double> losses;
        run.train(2, [&](const StepMetrics& m) { return losses.push_back(m.loss), losses.push_back(m.grad_norm), true; });
        std::string end = run.save("five");
        run.close();
        Run again(c, in(saved.back()));
        REQUIRE(again.folder() == run.folder());
        REQUIRE(again.attempt() == 1);
        std::vector<double> same;
        again.train(2, [&](const StepMetrics& m) { return same.push_back(m.loss), same.push_back(m.grad_norm), true; });
        REQUIRE(same == losses);
        REQUIRE((contents(again.save("again")) == contents(end)));
    }
    auto first = contents(saved[0]);
    REQUIRE(first.contains("optimizer/1/model.layers.3.mlp.experts.5.down_proj.weight"));
    REQUIRE(first.contains(Model::bias_name(3)));
    for (const auto& path : saved) {
        INFO(path);
        auto want = contents(path);
        REQUIRE(want.size() == first.size());
        for (const Layout& layout : kLayouts) {
            INFO(layout.name);
            Run other(base(folder, layout), in(path, false));
            REQUIRE(other.current_step() == 3);
            REQUIRE((contents(other.save(folder.path + "/copy")) == want));
        }
        // One rank loads it, and several load what one has saved.
        on_rank_0(dist::world(), [&] {
            Run single(base(folder, kLayouts[0]), in(path, false), dist::Group());
            REQUIRE((contents(single.save(folder.path + "/single")) == want));
        });
        Run many(base(folder, kLayouts[2]), in(folder.path + "/single", false));
        REQUIRE((contents(many.save(folder.path + "/copy")) == want));
    }
}

TEST_CASE("checkpointing: what fails on one rank is an error on all, and leaves nothing behind") {
    SharedFolder folder;
    Run run(base(folder, kLayouts[1]), in(""));
    run.train(1);
    std::string blocked = folder.path + "/.blocked.partial/rank_1.safetensors/in the way";
    if (dist::world().rank() == 0) fs::create_directories(blocked);
    dist::world().barrier();
    try {
        run.save(folder.path + "/blocked");
        FAIL("no moe::Error was thrown");
    } catch (const Error& e) {
        REQUIRE(e.kind() == ErrorKind::io);
        REQUIRE(std::string(e.what()).find("rank 1") != std::string::npos);
    }
    REQUIRE(!fs::exists(folder.path + "/blocked"));
    REQUIRE(!fs::exists(folder.path + "/.blocked.partial"));
    std::string path = run.save(folder.path + "/blocked");
    store::Checkpoint(path).verify();
    run.close();
    Config other = base(folder, kLayouts[1]);
    other.seed = 5;
    for (const auto& [config, what, kind] : {std::tuple(other, path, ErrorKind::config), std::tuple(base(folder, kLayouts[1]), folder.path + "/none", ErrorKind::io)}) {
        try {
            Run refused(config, in(what));
            FAIL("no moe::Error was thrown");
        } catch (const Error& e) {
            REQUIRE(e.kind() == kind);
        }
    }
    dist::world().barrier();
}

TEST_CASE("run folder: a full disk under rank 0's metrics or events is one error on all ranks, and the run can go on") {
    SharedFolder folder;
    Run run(base(folder, kLayouts[1]), in(""));
    run.train(1);
    bool writes = dist::world().rank() == 0;
    auto fails = [&](auto f) {
        try {
            f();
        } catch (const Error& e) {
            return e.kind() == ErrorKind::io && e.parts().rank == 0;
        }
        return false;
    };
    REQUIRE(fails([&] {
        std::optional<FullDisk> full;
        if (writes) full.emplace();
        run.step();
    }));
    REQUIRE(run.current_step() == 2);
    run.train(1);
    fs::path events = fs::path(run.folder()) / "events.jsonl";
    if (writes) {
        fs::remove(events);
        fs::create_symlink("/dev/full", events);
    }
    dist::world().barrier();
    REQUIRE(fails([&] { run.save("three"); }));
    run.train(1);
    REQUIRE(run.current_step() == 4);
}

TEST_CASE("checkpointing: a wish to stop on one rank stops all of them after a save") {
    SharedFolder folder;
    Config c = base(folder, kLayouts[1]);
    Run run(c, in(""));
    run.train(1);
    if (dist::world().rank() == dist::world().size() - 1) request_stop();
    run.train(5);
    clear_stop();
    REQUIRE(run.current_step() == 2);
    REQUIRE(store::last_checkpoint(run.folder() + "/checkpoints")->step == 2);
}
