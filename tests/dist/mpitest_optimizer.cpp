// Optimizers, fp16 and validation over several ranks against one process: in float64 five steps, weights ≤ 1e-9 apart.
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
    c.model.mla.num_heads = 4;
    c.training.global_batch_size = 8;
    c.training.micro_batch_size = 2;
    return c;
}
Config over_ranks(Config c, int64_t ep, int64_t zero, int64_t tp = 1, int64_t pp = 1) {
    c.distributed.expert_parallel_size = ep;
    c.distributed.zero_stage = zero;
    c.distributed.tensor_parallel_size = tp;
    c.distributed.pipeline_parallel_size = pp;
    return c;
}
struct Layout { int64_t ep, zero, tp, pp; };
std::string name_of(const Layout& l) { return fmt::format("EP{} ZeRO-{} TP{} PP{}", l.ep, l.zero, l.tp, l.pp); }

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
    for (auto& name : run.model().store().names()) o.weights[name] = run.model().store().master(name);
    return o;
}
std::unique_ptr<Run> open(const Config& c, const dist::Group& world) {
    RunOptions quiet;
    quiet.log_folder = quiet.console = false;
    return std::make_unique<Run>(c, quiet, world);
}
/// The largest difference; NaN where one is, since max() keeps its first argument then.
double apart(const std::vector<double>& a, const std::vector<double>& b) {
    REQUIRE(a.size() == b.size());
    double worst = 0;
    for (size_t i = 0; i < a.size(); ++i) worst = std::max(std::abs(a[i] - b[i]), worst);
    return worst;
}
double apart(const std::map<std::string, Tensor>& a, const std::map<std::string, Tensor>& b) {
    double worst = 0;
    for (auto& [name, w] : a) worst = std::max((w - b.at(name)).abs().max().item<double>(), worst);
    return worst;
}
}  // namespace

TEST_CASE("optimizers: every layout gives one process's weights, also where a matrix is cut over ranks", "[dist]") {
    const auto& world = dist::world();
    for (std::string optimizer : {"muon", "adam", "sgd"}) {
        Outcome want = five_steps(*open(config(optimizer), dist::Group()));
        for (Layout l : {Layout{1, 0, 1, 1}, {1, 1, 1, 1}, {2, 0, 1, 1}, {2, 1, 1, 1}, {1, 0, 2, 1}, {2, 1, 2, 1}, {1, 0, 1, 2}}) {
            INFO(optimizer << " " << name_of(l));
            auto run = open(over_ranks(config(optimizer), l.ep, l.zero, l.tp, l.pp), world);
            Outcome got = five_steps(*run);
            double mine = apart(got.weights, want.weights);
            CHECK(mine <= 1e-9);
            double weight = world.all_reduce(mine, dist::ReduceOp::max);
            if (world.rank() == 0) fmt::print("{:<6} {}: loss {:.1e} norm {:.1e} weight {:.1e}\n", optimizer, name_of(l), apart(got.losses, want.losses), apart(got.norms, want.norms), weight);
            CHECK(apart(got.losses, want.losses) <= 1e-9);
            CHECK(apart(got.norms, want.norms) <= 1e-9);
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

TEST_CASE("fp16: in every layout ranks agree on the scale and on a step that overflows, and follow one process", "[dist]") {
    Config c = config("adamw");
    c.training.use_fp64 = false;
    c.training.use_fp16 = true;
    Outcome want = five_steps(*open(c, dist::Group()));
    for (Layout l : {Layout{2, 1, 1, 1}, {1, 0, 2, 1}, {2, 0, 2, 1}, {1, 0, 1, 2}, {1, 3, 1, 1}}) {
        INFO(name_of(l));
        auto run = open(over_ranks(c, l.ep, l.zero, l.tp, l.pp), dist::world());
        Outcome got = five_steps(*run);
        CHECK(apart(got.losses, want.losses) < 0.02);
        CHECK(apart(got.norms, want.norms) < 0.05 * want.norms[0]);
        double scale = run->loss_scale().value();
        CHECK(dist::world().all_reduce(scale) == scale * dist::world().size());
        if (dist::world().rank() == dist::world().size() - 1)                 // one rank alone overflows
            for (auto& b : run->model().store().buckets()) b.value.fill_(INFINITY);
        StepMetrics m = run->step();
        CHECK(m.skipped);
        CHECK(dist::world().all_reduce(run->loss_scale().value()) == run->loss_scale().value() * dist::world().size());
        CHECK(run->loss_scale().value() < scale);
    }
}

TEST_CASE("validation: every layout gives one process's loss by domain and acceptance, and moves nothing", "[dist]") {
    constexpr int64_t kSequences = 4;                         // of a batch, over all ranks
    Config c = config("sgd");
    c.training.use_mtp = true;
    c.training.micro_batch_size = kSequences;
    c.validation.enabled = true;
    c.validation.max_batches = 2;
    auto one = open(c, dist::Group());
    one->train(2);
    Evaluation want = one->evaluate();
    CHECK(want.acceptance[0] > 0);
    double next = one->step().loss;
    for (Layout l : {Layout{1, 0, 1, 1}, {2, 3, 1, 1}, {2, 0, 2, 1}, {1, 0, 1, 2}}) {
        INFO(name_of(l));
        Config ranks = over_ranks(c, l.ep, l.zero, l.tp, l.pp);
        ranks.training.micro_batch_size = kSequences / (dist::world().size() / (l.tp * l.pp));
        auto run = open(ranks, dist::world());
        run->train(2);
        Evaluation got = run->evaluate();
        CHECK(got.num_tokens == want.num_tokens);
        REQUIRE(got.by_domain.size() == want.by_domain.size());
        for (size_t d = 0; d < want.by_domain.size(); ++d) CHECK(std::abs(got.by_domain[d].second - want.by_domain[d].second) <= 1e-9);
        REQUIRE(got.acceptance.size() == 1);
        CHECK(got.acceptance[0] == want.acceptance[0]);
        CHECK(std::abs(run->evaluate().loss - want.loss) <= 1e-9);
        CHECK(std::abs(run->step().loss - next) <= 1e-9);
    }
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
