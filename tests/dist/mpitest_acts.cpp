// Acts on weights, moments and biases over several ranks: every tensor of the checkpoint, bit for bit, is that of one process. An optimizer's step by a script.
#include "core/base/error.h"
#include "core/tensor/master.h"
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
Config base(const SharedFolder& folder, const std::string& precision) {
    Config c = test::small_config();
    c.output_dir = folder.path;
    c.model.num_layers = 4;
    c.model.mla.num_heads = 4;
    c.model.moe.num_experts = 8;
    c.model.moe.expert_intermediate_size = 144;            // rows that ZeRO cuts: more than 128
    c.model.moe.bias_update_speed = 0.05;
    c.training.use_fp64 = precision == "fp64";
    c.training.use_bf16 = precision == "bf16";
    c.training.use_fp8 = precision == "fp8";
    c.training.use_mtp = true;
    c.training.global_batch_size = 8;
    c.training.micro_batch_size = 2;
    c.training.seq_length = 24;
    return c;
}

RunOptions quiet(const std::string& resume = "") {
    RunOptions o;
    o.console = o.log_folder = false;
    o.resume = resume;
    return o;
}

/// What this rank has of a run's state, whole: parameters with moments, biases.
using State = std::map<std::string, std::vector<Tensor>>;
State state_of(Run& run) {
    State out;
    ParamStore& store = run.model().store();
    for (const auto& name : store.names()) {
        out[name] = {store.master(name)};
        for (Tensor& moment : store.whole_state(name)) out[name].push_back(moment);
    }
    for (int64_t layer : run.model().routed_layers()) out[Model::bias_name(layer)] = {run.model().bias(layer).clone()};
    return out;
}

/// Names of `some` whose bits are others in `all`.
std::vector<std::string> differing(const State& some, const State& all) {
    std::vector<std::string> names;
    for (const auto& [name, tensors] : some) {
        const auto& others = all.at(name);
        bool same = tensors.size() == others.size();
        for (size_t i = 0; same && i < tensors.size(); ++i) same = at::equal(tensors[i], others[i]);
        if (!same) names.push_back(name);
    }
    return names;
}

struct States {
    State acted, undone;
};

/// Acts of every kind in layers of both stages, and undos out of order.
States story(Run& run) {
    int64_t swap = run.intervene("swap", {{"layers", {1, 3, 4}}, {"experts", {0, 7}}, {"gate", true}}).id;       // of two ranks where experts are cut; 4 is the MTP module
    int64_t drawn = run.intervene("reinit", {{"layer", 2}, {"experts", {1, 6}}, {"gate", true}}).id;
    run.intervene("duplicate", {{"layers", {2, 3}}, {"from", 6}, {"to", 0}, {"gate", true}});
    int64_t bias = run.intervene("bias", {{"layers", {1, 3}}, {"values", {1, 2, 3, 4, 5, 6, 7, 8}}}).id;
    run.intervene("swap", {{"layer", 3}, {"experts", {3, 7}}, {"gate", true}});
    run.set_parameter("model.layers.3.mlp.experts.5.up_proj.weight", at::arange(144 * 48, at::kDouble).view({144, 48}) * 1e-4);
    run.set_parameter("model.embed_tokens.weight", at::sin(at::arange(37 * 48, at::kDouble)).view({37, 48}));
    States out;
    out.acted = state_of(run);
    for (int64_t id : {drawn, swap, bias}) run.undo(id);
    out.undone = state_of(run);
    return out;
}
}  // namespace

TEST_CASE("acts: swap, duplicate, reinit, bias and parameters give one process's tensors bit for bit in every layout, and so do undos out of order", "[dist]") {
    SharedFolder folder;
    for (const char* precision : {"bf16", "fp64"}) {
        Config c = base(folder, precision);
        std::string start = fmt::format("{}/{}", folder.path, precision);
        on_rank_0(dist::world(), [&] {
            Run run(c, quiet(), dist::Group());
            run.train(2);
            run.save(start);
        });
        Run one(c, quiet(start), dist::Group());
        State before = state_of(one);
        States want = story(one);
        REQUIRE(differing(before, want.acted).size() > 20);
        REQUIRE(differing(want.acted, want.undone).size() > 20);
        std::vector<Layout> layouts = test::layouts();
        if (precision == std::string("fp64")) layouts = {layouts[0]};
        for (const Layout& layout : layouts) {
            INFO(precision << " " << layout.name());
            Run run(layout.of(c), quiet(start));
            States got = story(run);
            CHECK(differing(got.acted, want.acted) == std::vector<std::string>());
            CHECK(differing(got.undone, want.undone) == std::vector<std::string>());
            // The compute weights followed.
            ParamStore& store = run.model().store();
            for (const auto& name : store.names()) {
                Tensor master = got.undone.at(name)[0];
                const TensorSpec& spec = store.spec(name);
                if (spec.cut_dim >= 0) master = master.narrow(spec.cut_dim, spec.cut_begin, spec.cut_size);
                if (layout.zero < 3) CHECK(at::equal(store.value(name), rounded(master, store.value(name).scalar_type())));
            }
        }
    }
}

TEST_CASE("acts: a run goes on from them as one that loads the result, E4M3 copies included", "[dist]") {
    SharedFolder folder;
    Config c = base(folder, "fp8");
    for (const Layout& layout : {Layout{.ep = 2, .zero = 1}, Layout{.ep = 2, .tp = 2}}) {
        INFO(layout.name());
        Run run(layout.of(c), quiet());
        run.train(1);
        story(run);
        run.save(folder.path + "/fp8");
        Run loaded(layout.of(c), quiet(folder.path + "/fp8"));
        for (int i = 0; i < 2; ++i) {
            StepMetrics a = run.step(), b = loaded.step();
            CHECK(a.loss == b.loss);
            CHECK(a.grad_norm == b.grad_norm);
        }
    }
}

TEST_CASE("acts: what one rank alone can know to be wrong is an error on all, and changes nothing", "[dist]") {
    SharedFolder folder;
    Config c = Layout{.ep = 2}.of(base(folder, "bf16"));
    Run run(c, quiet());
    auto kind = [&](auto&& f) {
        try {
            f();
        } catch (const Error& e) {
            return int64_t(e.kind());
        }
        return int64_t(-1);
    };
    auto on_all = [&](ErrorKind want, auto&& f) {
        int64_t got = kind(f);
        CHECK(got == int64_t(want));
    };
    on_all(ErrorKind::shape, [&] { run.set_parameter("model.layers.1.mlp.experts.7.up_proj.weight", at::zeros({3, 3})); });
    on_all(ErrorKind::config, [&] { run.set_parameter("model.layers.1.mlp.experts.8.up_proj.weight", at::zeros({144, 48})); });
    on_all(ErrorKind::config, [&] { run.intervene("swap", {{"layer", 0}, {"experts", {0, 1}}}); });
    on_all(ErrorKind::state, [&] { run.undo(); });
    run.train(1);
}

namespace {
/// Momentum over the parameter's norm: only whole tensors give the right one.
ScriptCompiler compiler(const std::string& fails_at, int on_rank) {
    ScriptCompiler s;
    s.is_stored = [](const Values&) { return true; };
    s.pre_topk = [](const Values&) { return routing::PreTopK(); };
    s.optimizer = [=](const Values&, uint64_t) -> OptimizerRule {
        return [=](const std::string& name, const Tensor& value, const Tensor& grad, const std::vector<Tensor>& state, int64_t step, double lr) {
            if (step == 2 && name == fails_at && dist::world().rank() == on_rank) MOE_THROW(lua, "rule", "no such luck", "", "");
            state[0].mul_(0.5).add_(grad);
            return value - lr * state[0] / (1e-3 + state[0].norm());
        };
    };
    return s;
}

std::map<std::string, Tensor> scripted_steps(const Config& c, const dist::Group& world) {
    RunOptions o = quiet();
    o.compiler = compiler("", 0);
    Run run(c, o, world);
    run.intervene("optimizer", {{"function", {{"source", "…"}}}});
    run.train(2);
    std::map<std::string, Tensor> out;
    for (auto& name : run.model().store().names()) out[name] = run.model().store().master(name);
    return out;
}
}  // namespace

TEST_CASE("run.optimizer: a script sees whole parameters and gives one process's weights in every layout", "[dist]") {
    SharedFolder folder;
    Config c = base(folder, "fp64");
    c.model.num_layers = 2;
    auto want = scripted_steps(c, dist::Group());
    std::vector<Layout> layouts = {{.ep = 2, .zero = 3}, {.zero = 1, .pp = 2}, {.ep = 2, .tp = 2}};
    if (dist::world().size() == 2) layouts.push_back({.zero = 2});
    for (const Layout& layout : layouts) {
        INFO(layout.name());
        double worst = 0;
        for (auto& [name, value] : scripted_steps(layout.of(c), dist::world())) worst = std::max(worst, (value - want.at(name)).abs().max().item<double>());
        CHECK(worst <= 1e-9);
    }
}

TEST_CASE("run.optimizer: a script that fails on the last rank for one of its experts undoes the step on all", "[dist]") {
    SharedFolder folder;
    int last = dist::world().size() - 1;
    RunOptions o = quiet();
    o.compiler = compiler("model.layers.2.mlp.experts.7.down_proj.weight", last);
    Run run(Layout{.ep = 2}.of(base(folder, "fp64")), o);
    run.intervene("optimizer", {{"function", {{"source", "…"}}}});
    run.train(1);
    std::map<std::string, Tensor> before;
    for (auto& name : run.model().store().names()) before[name] = run.model().store().master(name);
    try {
        run.step();
        FAIL("no error was thrown");
    } catch (const Error& e) {
        CHECK(e.kind() == ErrorKind::lua);
        CHECK(e.parts().rank == last);
    }
    CHECK(run.current_step() == 1);
    for (auto& [name, value] : before) CHECK(at::equal(value, run.model().store().master(name)));
    run.undo();
    run.train(1);
    CHECK(run.current_step() == 2);
}
