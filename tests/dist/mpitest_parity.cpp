// Two ranks against one process, float64, plain SGD: five steps of every layout that exists, each ≤ 1e-9 apart.
#include "core/base/error.h"
#include "core/train/run.h"
#include "tests/catch.h"
#include "tests/small_config.h"

#include <ATen/ATen.h>

#include <cmath>

using namespace moe;
using namespace moe::train;

namespace {
constexpr int kSteps = 5;
constexpr double kRate = 0.1;

Config config() {
    Config c = test::small_config();
    c.model.moe.num_experts = 6;
    c.model.moe.bias_update_speed = 0.05;
    c.training.optimizer = "sgd";
    c.training.momentum = 0;
    c.training.lr_decay_style = "constant";
    c.training.lr_warmup_steps = 0;
    c.training.learning_rate = kRate;
    c.training.grad_clip = 0;
    c.training.weight_decay = 0;
    c.training.global_batch_size = 8;
    c.training.micro_batch_size = 2;
    return c;
}

struct Outcome {
    std::vector<double> losses, norms;
    std::vector<Tensor> counts;
    std::map<std::string, Tensor> weights, gradients;      ///< gradients of the first step, from the SGD update
    Tensor bias;
};

Outcome five_steps(const Config& c, const dist::Group& world, Mode mode, bool defer) {
    RunOptions quiet;
    quiet.log_folder = quiet.console = false;
    Run run(c, quiet, world);
    run.set_mode(mode);
    run.set_defer(defer);
    for (int64_t layer : run.model().routed_layers()) run.model().bias(layer)[5] = -10;       // an expert that nobody chooses
    auto& store = run.model().store();
    Outcome o;
    for (auto& name : store.names()) o.gradients[name] = store.value(name).clone();
    for (int i = 0; i < kSteps; ++i) {
        StepMetrics m = run.step();
        o.losses.push_back(m.loss);
        o.norms.push_back(m.grad_norm);
        o.counts.push_back(run.last_counts().clone());
        if (i == 0)
            for (auto& [name, before] : o.gradients) before = (before - store.value(name)) / kRate;
    }
    for (auto& name : store.names()) o.weights[name] = store.value(name).clone();
    o.bias = run.model().bias(2).clone();
    return o;
}

struct Difference { double loss = 0, norm = 0, gradient = 0, weight = 0; bool counts = true; };
/// Over the parameters that this rank has.
Difference compare(const Outcome& want, const Outcome& got) {
    Difference d;
    for (int i = 0; i < kSteps; ++i) {
        d.loss = std::max(d.loss, std::abs(want.losses[size_t(i)] - got.losses[size_t(i)]));
        d.norm = std::max(d.norm, std::abs(want.norms[size_t(i)] - got.norms[size_t(i)]));
        d.counts = d.counts && at::equal(want.counts[size_t(i)], got.counts[size_t(i)]);
    }
    for (auto& [name, w] : got.weights) {
        d.weight = std::max(d.weight, (w - want.weights.at(name)).abs().max().item<double>());
        d.gradient = std::max(d.gradient, (got.gradients.at(name) - want.gradients.at(name)).abs().max().item<double>());
    }
    d.counts = d.counts && at::equal(want.bias, got.bias);
    return d;
}
}  // namespace

TEST_CASE("two ranks: DP2, EP2, ZeRO-1 and their modes give one process's loss, gradients, counts and weights", "[dist]") {
    REQUIRE(dist::world().size() == 2);
    Outcome one = five_steps(config(), dist::Group(), Mode::scheduled, false);
    REQUIRE(one.counts[0][2][5].item<int64_t>() == 0);
    struct Case { const char* name; int64_t ep, zero; Mode mode; bool defer; };
    if (dist::world().rank() == 0) fmt::print("{:<34} {:>9} {:>9} {:>9} {:>9}  counts\n", "layout, 2 ranks against 1", "loss", "norm", "gradient", "weight");
    for (auto& k : {Case{"one process, attached", 0, 0, Mode::attached, false}, Case{"one process, deferred", 0, 0, Mode::scheduled, true}, Case{"DP2", 1, 0, Mode::scheduled, false},
                    Case{"DP2, attached", 1, 0, Mode::attached, false}, Case{"DP2, deferred", 1, 0, Mode::scheduled, true}, Case{"DP2, ZeRO-1", 1, 1, Mode::scheduled, false},
                    Case{"EP2", 2, 0, Mode::scheduled, false}, Case{"EP2, attached", 2, 0, Mode::attached, false}, Case{"EP2, ZeRO-1, deferred", 2, 1, Mode::scheduled, true}}) {
        INFO(k.name);
        Config c = config();
        c.distributed.expert_parallel_size = std::max<int64_t>(1, k.ep);
        c.distributed.zero_stage = k.zero;
        Difference d = compare(one, five_steps(c, k.ep == 0 ? dist::Group() : dist::world(), k.mode, k.defer));
        for (double* x : {&d.loss, &d.norm, &d.gradient, &d.weight}) *x = dist::world().all_reduce(*x, dist::ReduceOp::max);
        if (dist::world().rank() == 0) fmt::print("{:<34} {:>9.1e} {:>9.1e} {:>9.1e} {:>9.1e}  {}\n", k.name, d.loss, d.norm, d.gradient, d.weight, d.counts ? "equal" : "DIFFER");
        CHECK(d.loss <= 1e-9);
        CHECK(d.norm <= 1e-9);
        CHECK(d.gradient <= 1e-9);
        CHECK(d.weight <= 1e-9);
        CHECK(d.counts);
    }
}
