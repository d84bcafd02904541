#include "core/base/error.h"
#include "core/train/run.h"
#include "tests/catch.h"
#include "tests/small_config.h"

#include <ATen/ATen.h>
#include <c10/core/CPUAllocator.h>
#include <nlohmann/json.hpp>
#include <unistd.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <limits>
#include <new>

using namespace moe;
using namespace moe::train;
namespace fs = std::filesystem;

namespace {
struct Folder {
    fs::path path = fs::temp_directory_path() / ("moelab-run-" + std::to_string(getpid()));
    Folder() { fs::create_directories(path); }
    ~Folder() { std::error_code e; fs::permissions(path, fs::perms::owner_all, e); fs::remove_all(path, e); }
};
RunOptions quiet(bool folder = false) {
    RunOptions o;
    o.log_folder = folder;
    o.console = false;
    return o;
}
Config learnable() {
    Config c = test::small_config();
    c.training.use_fp64 = false;
    c.training.global_batch_size = 8;
    c.training.micro_batch_size = 4;
    c.training.seq_length = 48;
    c.training.train_steps = 60;
    c.model.moe.bias_update_speed = 0.01;
    c.validation.enabled = true;
    c.validation.max_batches = 3;
    return c;
}
/// While it lives, tensors of the CPU are counted as they are made, and fail where none are left.
struct CountedMemory : c10::Allocator {
    int64_t made = 0, left = std::numeric_limits<int64_t>::max();
    CountedMemory() { c10::SetCPUAllocator(this, 255); }
    ~CountedMemory() override { c10::SetCPUAllocator(c10::GetDefaultCPUAllocator(), 255); }
    c10::DataPtr allocate(size_t size) override {
        ++made;
        if (left-- <= 0) throw std::bad_alloc();
        return c10::GetDefaultCPUAllocator()->allocate(size);
    }
    c10::DeleterFnPtr raw_deleter() const override { return c10::GetDefaultCPUAllocator()->raw_deleter(); }
    void copy_data(void* to, const void* from, size_t size) const override { default_copy_data(to, from, size); }
};
}  // namespace

TEST_CASE("run: the loss falls on synthetic domains, every step counts every token once", "[train]") {
    Run run(learnable(), quiet());
    double first = 0, last = 0;
    for (int i = 0; i < 60; ++i) {
        StepMetrics m = run.step();
        if (i == 0) first = m.loss;
        if (i >= 55) last += m.loss / 5;
        REQUIRE(std::isfinite(m.loss));
        for (int64_t layer : run.model().routed_layers()) REQUIRE(run.last_counts()[layer].sum().item<int64_t>() == 8 * 48 * 2);
        REQUIRE(at::equal(run.last_counts_by_domain().sum(1), run.last_counts()));
    }
    REQUIRE(first == Approx(std::log(37)).margin(0.3));
    REQUIRE(last < first - 0.2);
    REQUIRE(run.current_step() == 60);
    REQUIRE(run.model().bias(1).abs().max().item<double>() > 0);
}

TEST_CASE("run: the same configuration gives the same losses twice, another seed does not", "[train]") {
    auto losses = [](Config c) {
        Run run(c, quiet());
        std::vector<double> out;
        run.train(5, [&](const StepMetrics& m) { out.push_back(m.loss); return true; });
        return out;
    };
    Config c = learnable(), other = c;
    other.seed = 12;
    REQUIRE(losses(c) == losses(c));
    REQUIRE(losses(c) != losses(other));
}

TEST_CASE("run: accumulation of 4 times 1 equals once 4: counts equal, loss within 1e-12", "[train]") {
    Config one = test::small_config(), four = one;
    four.training.micro_batch_size = 4;
    Run a(one, quiet()), b(four, quiet());
    for (int i = 0; i < 4; ++i) {
        StepMetrics x = a.step(), y = b.step();
        REQUIRE(std::abs(x.loss - y.loss) < 1e-12);
        REQUIRE(at::equal(a.last_counts(), b.last_counts()));
    }
}

TEST_CASE("run: evaluation moves neither the biases nor the next steps", "[train]") {
    Run a(learnable(), quiet()), b(learnable(), quiet());
    a.train(3);
    b.train(3);
    Tensor before = a.model().bias(1).clone(), counts = a.last_counts().clone();
    routing::Trace trace(5, a.domains());
    Evaluation e = a.evaluate(&trace);
    REQUIRE(e.by_domain.size() == a.domains().size());
    REQUIRE(std::isfinite(e.loss));
    REQUIRE(trace.num_tokens() == 3 * 4 * 48);
    REQUIRE(trace.layers() == a.model().routed_layers());
    REQUIRE(at::equal(before, a.model().bias(1)));
    REQUIRE(at::equal(counts, a.last_counts()));
    REQUIRE(a.step().loss == b.step().loss);
}

TEST_CASE("run: a step whose loss is not finite is skipped and counted, too many stop the run", "[train]") {
    Config c = learnable();
    c.training.max_skipped_steps = 3;
    Run run(c, quiet());
    run.train(1);
    Tensor weight = run.model().store().value("lm_head.weight"), before = weight.clone(), bias = run.model().bias(1).clone();
    double keep = weight[0][0].item<double>();
    weight[0][0] = std::nan("");
    StepMetrics m = run.step();
    REQUIRE(m.skipped);
    weight[0][0] = keep;
    REQUIRE(at::equal(weight, before));
    REQUIRE(at::equal(bias, run.model().bias(1)));
    REQUIRE_FALSE(run.step().skipped);
    weight[0][0] = std::nan("");
    run.step();
    run.step();
    REQUIRE_THROWS_WITH(run.step(), Catch::Contains("3 steps in a row"));
}

TEST_CASE("run: a skipped step is told of once it is done: one that fails before, and is undone, leaves no event", "[train]") {
    Folder folder;
    Config c = test::small_config();
    c.output_dir = folder.path;
    c.training.max_skipped_steps = 1000;
    c.checkpointing.enabled = false;
    Run run(c, quiet(true));
    run.model().store().value("lm_head.weight")[0][0] = std::nan("");
    run.step();
    auto num_told = [&] {
        std::ifstream lines(run.folder() + "/events.jsonl");
        int64_t n = 0;
        for (std::string line; std::getline(lines, line);) n += nlohmann::json::parse(line)["event"] == "skip";
        return n;
    };
    CountedMemory memory;
    run.step();
    int64_t of_a_step = memory.made, num_undone = 0;
    for (int64_t last = 1; last <= 12; ++last) {
        INFO("the allocation number " << last << " from a step's end fails");
        int64_t step = run.current_step();
        memory.left = of_a_step - last;
        CHECK_THROWS(run.step());
        memory.left = std::numeric_limits<int64_t>::max();
        CHECK(!run.is_broken());
        num_undone += run.current_step() == step;
        CHECK(num_told() == run.current_step());
        CHECK(int64_t(run.events().size()) == run.current_step());
        run.step();
        CHECK(num_told() == run.current_step());
    }
    CHECK(num_undone > 3);
}

TEST_CASE("run: the folder holds the resolved configuration, the script, the environment, the log and the metrics", "[train]") {
    Folder folder;
    Config c = learnable();
    c.output_dir = folder.path.string();
    std::ofstream(folder.path / "s.lua") << "-- script\n";
    RunOptions o = quiet(true);
    o.script = (folder.path / "s.lua").string();
    o.name = "named";
    std::string at;
    {
        Run run(c, o);
        run.train(2);
        at = run.folder();
        Run second(c, o);
        REQUIRE(second.folder() != at);                    // same second: the next one
    }
    REQUIRE(fs::path(at).parent_path() == folder.path / "named");
    nlohmann::json saved = nlohmann::json::parse(std::ifstream(at + "/config.json")), env = nlohmann::json::parse(std::ifstream(at + "/env.json"));
    REQUIRE(saved["model"]["moe"]["num_experts"] == 5);
    REQUIRE(env.contains("commit"));
    for (auto file : {"script.lua", "log.rank0.txt", "metrics/run.moelog"}) REQUIRE(fs::exists(at + "/" + file));
    REQUIRE(fs::file_size(at + "/metrics/run.moelog") > 100);
}

TEST_CASE("run: an output folder that cannot be written is one clear error", "[train]") {
    Config c = learnable();
    c.output_dir = "/proc/moelab";
    REQUIRE_THROWS_WITH(Run(c, quiet(true)), Catch::Contains("/proc/moelab") && Catch::Contains("output_dir"));
}

TEST_CASE("run: a length of the run is wanted", "[train]") {
    Config c = learnable();
    c.training.train_steps.reset();
    REQUIRE_THROWS_WITH(Run(c, quiet()), Catch::Contains("train_steps"));
}

TEST_CASE("run: every optimizer lowers the loss", "[train]") {
    struct Case { const char* optimizer; double rate; };
    for (auto& k : {Case{"adam", 1e-2}, Case{"sgd", 0.3}, Case{"muon", 1e-2}}) {
        INFO(k.optimizer);
        Config c = learnable();
        c.training.optimizer = k.optimizer;
        c.training.learning_rate = k.rate;
        c.training.weight_decay = k.optimizer == std::string("muon") ? 0.1 : 0;      // pulled through the gradient it would be strong
        c.training.moments_dtype = c.training.grads_dtype = "bf16";
        Run run(c, quiet());
        double first = run.step().loss, last = 0;
        run.train(24, [&](const StepMetrics& m) { last = m.loss; return true; });
        CHECK(last < first - 0.1);
    }
}

TEST_CASE("run: a batch ramp and dynamic batches count the tokens that they take", "[train]") {
    Config ramp = learnable(), dynamic = ramp;
    ramp.training.train_steps.reset();
    ramp.training.total_training_tokens = 20 * 48;
    ramp.training.batch_size_ramp = BatchSizeRamp{4, 10 * 48};
    Run a(ramp, quiet());
    REQUIRE(a.num_steps() == 4);                                  // 4, 4, 4 and 8 sequences
    int64_t seen = 0;
    for (int64_t sequences : {4, 4, 4, 8, 8}) {
        StepMetrics m = a.step();
        seen += sequences * 48;
        REQUIRE(m.tokens == seen);
        REQUIRE(m.tokens_per_sec == Approx(double(sequences * 48) / m.step_secs));
        REQUIRE(a.last_counts()[1].sum().item<int64_t>() == sequences * 48 * 2);
    }
    dynamic.training.dynamic_batch_tokens = 48 * 4 + 1;
    Run b(dynamic, quiet());
    REQUIRE(b.step().tokens == 8 * 48);                           // 5 sequences hold them, micro-batches have 4
}

namespace {
std::vector<double> losses_of(Run& run, int64_t steps) {
    std::vector<double> out;
    run.train(steps, [&](const StepMetrics& m) { out.push_back(m.loss); return true; });
    return out;
}
Config in_fp16() {
    Config c = learnable();
    c.training.use_fp16 = true;
    return c;
}
}  // namespace

TEST_CASE("run: fp16 follows fp32 within 2 % over 20 steps, with losses and norms unscaled", "[train]") {
    Run half(in_fp16(), quiet()), single(learnable(), quiet());
    REQUIRE(half.model().store().value("lm_head.weight").scalar_type() == at::kHalf);
    REQUIRE(half.model().store().master("lm_head.weight").scalar_type() == at::kFloat);
    StepMetrics x = half.step(), y = single.step();
    REQUIRE_FALSE(x.skipped);
    REQUIRE(x.loss == Approx(y.loss).epsilon(1e-3));
    REQUIRE(x.loss != y.loss);
    REQUIRE(x.grad_norm == Approx(y.grad_norm).epsilon(0.02));
    auto got = losses_of(half, 19), want = losses_of(single, 19);
    for (size_t i = 0; i < want.size(); ++i) REQUIRE(got[i] == Approx(want[i]).epsilon(0.02));
    REQUIRE(want.back() < want.front() - 0.05);
    REQUIRE(std::isfinite(half.evaluate().loss));
    REQUIRE(half.model().logits(at::zeros({1, 4}, at::kLong)).scalar_type() == at::kFloat);
}

TEST_CASE("run: an fp16 step that overflows is skipped and lowers the scale until steps are good again", "[train]") {
    Run run(in_fp16(), quiet());
    run.train(2);
    run.loss_scale().restore({{"scale", double(1 << 26)}, {"good_steps", 0}});
    Tensor before = run.model().store().master("lm_head.weight").clone();
    int skipped = 0;
    double scale = run.loss_scale().value();
    while (run.step().skipped) {
        ++skipped;
        REQUIRE(run.loss_scale().value() == scale / 2);
        REQUIRE(at::equal(before, run.model().store().master("lm_head.weight")));
        scale = run.loss_scale().value();
    }
    REQUIRE(skipped >= 3);
    REQUIRE(skipped < 10);
    REQUIRE_FALSE(at::equal(before, run.model().store().master("lm_head.weight")));
    REQUIRE(run.loss_scale().value() == scale);
    for (double loss : losses_of(run, 5)) REQUIRE(std::isfinite(loss));
}

TEST_CASE("log line: the keys come in the documented order and loss: is there once", "[train]") {
    StepMetrics m;
    m.step = 10; m.loss = 4.871234; m.grad_norm = 1.20412; m.lr = 3e-4; m.tokens_per_sec = 7800.4; m.tflops = 0.1; m.mfu = 0.001; m.memory_gib = 0.62; m.max_vio = 1.31;
    REQUIRE(m.line() == "step: 10 loss: 4.87123 grad_norm: 1.2041 lr: 3.0e-04 tps: 7800 tflops: 0.10 mfu: 0.1% memory: 0.62GiB maxvio: 1.31");
    REQUIRE(nlohmann::json::parse(m.json())["loss"] == 4.871234);
}
