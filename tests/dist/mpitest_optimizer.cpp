// Optimizers over several ranks against one process, float64: five steps, weights ≤ 1e-9 apart; and what fp16 sends.
#include "core/base/error.h"
#include "core/train/optimizer.h"
#include "core/train/run.h"
#include "tests/catch.h"
#include "tests/small_config.h"

#include <ATen/ATen.h>

#include <cmath>

using namespace moe;
using namespace moe::train;

namespace {
Config config(const std::string& optimizer) {
    Config c = test::small_config();
    c.model.moe.num_experts = 8;
    c.training.optimizer = optimizer;
    c.training.learning_rate = 0.02;
    c.training.global_batch_size = 8;
    c.training.micro_batch_size = 1;
    return c;
}
Config over_ranks(Config c, int64_t ep, int64_t zero) {
    c.distributed.expert_parallel_size = ep;
    c.distributed.zero_stage = zero;
    return c;
}

struct Outcome {
    std::vector<double> losses, norms;
    std::map<std::string, Tensor> weights;
};
Outcome five_steps(Run& run) {
    Outcome o;
    run.train(5, [&](const StepMetrics& m) {
        o.losses.push_back(m.loss);
        o.norms.push_back(m.grad_norm);
        return true;
    });
    for (auto& name : run.model().store().names()) o.weights[name] = run.model().store().value(name).clone();
    return o;
}
std::unique_ptr<Run> open(const Config& c, const dist::Group& world) {
    RunOptions quiet;
    quiet.log_folder = quiet.console = false;
    return std::make_unique<Run>(c, quiet, world);
}
double apart(const std::vector<double>& a, const std::vector<double>& b) {
    double worst = 0;
    for (size_t i = 0; i < a.size(); ++i) worst = std::max(worst, std::abs(a[i] - b[i]));
    return std::isfinite(worst) && a.size() == b.size() ? worst : INFINITY;
}
}  // namespace

TEST_CASE("optimizers: replicated and ZeRO-1 ranks, with and without EP, give one process's weights", "[dist]") {
    const auto& world = dist::world();
    for (std::string optimizer : {"muon", "adam", "sgd"}) {
        Outcome want = five_steps(*open(config(optimizer), dist::Group()));
        for (int64_t ep : {1, 2})
            for (int64_t zero : {0, 1}) {
                INFO(optimizer << " ep " << ep << " zero " << zero);
                auto run = open(over_ranks(config(optimizer), ep, zero), world);
                Outcome got = five_steps(*run);
                double weight = 0;
                for (auto& [name, w] : got.weights) weight = std::max(weight, (w - want.weights.at(name)).abs().max().item<double>());
                weight = world.all_reduce(weight, dist::ReduceOp::max);
                if (world.rank() == 0) fmt::print("{:<6} EP{} ZeRO-{}: loss {:.1e} norm {:.1e} weight {:.1e}\n", optimizer, ep, zero, apart(got.losses, want.losses), apart(got.norms, want.norms), weight);
                CHECK(apart(got.losses, want.losses) <= 1e-9);
                CHECK(apart(got.norms, want.norms) <= 1e-9);
                CHECK(weight <= 1e-9);
            }
    }
}

TEST_CASE("muon: under ZeRO-1 every rank has whole tensors, and all together each once", "[dist]") {
    auto run = open(over_ranks(config("muon"), 1, 1), dist::world());
    ParamStore& store = run->model().store();
    std::map<std::string, int64_t> pieces;
    for (auto& r : store.rectangles()) {
        CHECK((r.offset == std::vector<int64_t>(r.offset.size(), 0)));
        CHECK(r.shape == store.spec(r.name).shape);
        ++pieces[r.name];
    }
    int64_t matrices = 0;
    for (auto& name : store.names()) {
        CHECK(dist::world().all_reduce(pieces[name]) == 1);
        matrices += pieces[name] && is_hidden_matrix(store, name);
    }
    CHECK(matrices > 0);                                          // every rank has some: the case tests something
}

TEST_CASE("fp16: ranks agree on the scale and follow one process", "[dist]") {
    Config c = config("adamw");
    c.training.use_fp64 = false;
    c.training.use_fp16 = true;
    Outcome want = five_steps(*open(c, dist::Group()));
    auto run = open(over_ranks(c, 2, 1), dist::world());
    Outcome got = five_steps(*run);
    CHECK(apart(got.losses, want.losses) < 0.02);
    double scale = run->loss_scale().value();
    CHECK(dist::world().all_reduce(scale) == scale * dist::world().size());
}

TEST_CASE("batch ramp: all ranks take the same number of sequences, a multiple of theirs", "[dist]") {
    Config c = config("adamw");
    c.training.micro_batch_size = 1;
    c.training.batch_size_ramp = BatchSizeRamp{4, 8 * c.training.seq_length};
    auto one = open(c, dist::Group()), ranks = open(c, dist::world());
    int64_t tokens = 0;
    for (int i = 0; i < 3; ++i) {
        StepMetrics m = ranks->step();
        if (dist::world().size() == 2) CHECK(std::abs(one->step().loss - m.loss) < 1e-9);       // four ranks round the ramp down further
        CHECK(dist::world().all_reduce(m.tokens) == m.tokens * dist::world().size());
        CHECK((m.tokens - tokens) / c.training.seq_length % dist::world().size() == 0);
        tokens = m.tokens;
    }
}
