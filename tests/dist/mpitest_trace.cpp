// Traces over several ranks: every rank gets what one process records, tokens in order.
#include "core/routing/trace_analysis.h"
#include "core/train/run.h"
#include "tests/catch.h"
#include "tests/dist/layouts.h"
#include "tests/small_config.h"

#include <ATen/ATen.h>

#include <cmath>

using namespace moe;
using namespace moe::train;
using test::Layout;
using test::SharedFolder;

namespace {
constexpr int64_t kSequences = 4;                         // of a batch, over all ranks

Config base() {
    Config c = test::small_config();
    c.model.num_layers = 4;
    c.model.mla.num_heads = 4;
    c.model.moe.num_experts = 8;
    c.model.moe.n_group = 2;
    c.model.moe.topk_group = 2;
    c.model.moe.bias_update_speed = 0.05;
    c.training.use_mtp = true;
    c.training.seq_length = 24;
    c.training.global_batch_size = 8;
    c.training.micro_batch_size = kSequences;
    c.validation.enabled = true;
    return c;
}

std::unique_ptr<Run> trained(Config c, const dist::Group& world) {
    RunOptions quiet;
    quiet.log_folder = quiet.console = false;
    auto run = std::make_unique<Run>(c, quiet, world);
    run->train(2);
    // Not from the start: two tokens with the same past have equal weights, and which of them capacity drops is a matter of rounding; training would spread that.
    run->intervene("set", {{"changes", {{"model.moe.capacity_factor", 1.1}, {"model.moe.min_expert_capacity", 2}}}});
    return run;
}

std::unique_ptr<routing::Trace> traced(Run& run, routing::TraceOptions options = {}) {
    const Config& c = run.config();
    auto trace = std::make_unique<routing::Trace>(routing::TraceFacts{c.model.moe.num_experts, c.model.moe.n_group, c.training.seq_length, {}, "bytes"}, options);
    run.evaluate(trace.get(), 3);
    trace->finish();
    return trace;
}

void must_equal(const routing::Trace& got, const routing::Trace& want) {
    REQUIRE(got.layers() == want.layers());
    REQUIRE(got.domains() == want.domains());
    CHECK(at::equal(got.ids(), want.ids()));
    CHECK(at::equal(got.domain(), want.domain()));
    CHECK(at::equal(got.position(), want.position()));
    for (int64_t layer : want.layers()) {
        CHECK(at::equal(got.experts(layer), want.experts(layer)));
        CHECK(at::equal(got.dropped(layer), want.dropped(layer)));
        CHECK(at::allclose(got.weights(layer), want.weights(layer), 1e-3, 1e-6));             // kept in fp16: the last bit may go either way
        CHECK(at::allclose(got.margin(layer), want.margin(layer), 1e-2, 1e-5, /*equal_nan=*/true));
        auto a = decision_statistics(got, layer), b = decision_statistics(want, layer);
        CHECK(a.num_tokens == b.num_tokens);
        CHECK(a.changed_by_bias == b.changed_by_bias);
        CHECK(a.drop_rate == b.drop_rate);
        CHECK(std::abs(a.token_information - b.token_information) < 1e-3);
    }
}
}  // namespace

TEST_CASE("trace: every layout records what one process does, on every rank", "[dist]") {
    auto one = trained(base(), dist::Group());
    auto want = traced(*one);
    REQUIRE(want->num_tokens() == 3 * kSequences * 24);
    REQUIRE(want->layers() == std::vector<int64_t>{1, 2, 3, 4});
    double dropped = 0;
    for (int64_t layer : want->layers()) dropped += decision_statistics(*want, layer).drop_rate;
    REQUIRE(dropped > 0);
    for (const Layout& layout : test::layouts()) {
        INFO(layout.name());
        Config c = layout.of(base());
        c.training.micro_batch_size = kSequences / layout.data_parallel();
        auto run = trained(c, dist::world());
        double worst = 0;
        for (auto& name : run->model().store().names()) worst = std::max(worst, (run->model().store().master(name) - one->model().store().master(name)).abs().max().item<double>());
        for (int64_t l : run->model().routed_layers()) worst = std::max(worst, (run->model().bias(l) - one->model().bias(l)).abs().max().item<double>());
        REQUIRE(dist::world().all_reduce(worst, dist::ReduceOp::max) <= 1e-9);             // the same model: else the trace says nothing
        must_equal(*traced(*run), *want);
    }
}

TEST_CASE("trace: more than memory goes to files, and the first rank's is read back", "[dist]") {
    SharedFolder folder;
    auto one = trained(base(), dist::Group());
    auto want = traced(*one);
    Layout layout{.ep = 2};
    Config c = layout.of(base());
    c.training.micro_batch_size = kSequences / layout.data_parallel();
    auto run = trained(c, dist::world());
    std::filesystem::create_directories(folder.path);
    std::string path = folder.path + "/trace";
    must_equal(*traced(*run, {.memory_bytes = 1, .file = dist::world().rank() == 0 ? path : ""}), *want);
    dist::world().barrier();
    must_equal(routing::Trace(path), *want);
}
