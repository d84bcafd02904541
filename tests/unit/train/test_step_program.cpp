#include "core/base/error.h"
#include "core/train/step_program.h"
#include "tests/catch.h"
#include "tests/quantizations.h"
#include "tests/small_config.h"

#include <ATen/ATen.h>

#include <cmath>

using namespace moe;
using namespace moe::train;

namespace {
struct Fixture {
    Config config = test::small_config();
    dist::Mesh mesh;
    Model model;
    Tensor ids = at::empty({0}), targets, domain, doc_start;
    routing::Ledger ledger;

    explicit Fixture(Precision precision = Precision::named("fp64"))
        : model(config, mesh, {precision, at::kCPU, true}), ledger(config.model.num_layers, config.model.moe.num_experts, 3, at::kCPU) {
        auto gen = at::make_generator<at::CPUGeneratorImpl>(7);
        int64_t S = config.training.seq_length;
        ids = at::randint(config.model.vocab(), {4, S}, gen, at::kLong);
        targets = at::randint(config.model.vocab(), {4, S}, gen, at::kLong);
        targets[1].narrow(0, S - 3, 3).fill_(-100);              // padding at the end of a sequence
        domain = at::randint(3, {4, S}, gen, at::TensorOptions(at::kInt));
        domain[1].narrow(0, S - 3, 3).fill_(-1);
        doc_start = at::zeros({4, S}, at::kInt);
        doc_start[2].narrow(0, 9, S - 9).fill_(9);
        for (int64_t layer : model.routed_layers()) model.bias(layer).copy_(at::linspace(-0.1, 0.1, 5));
        model.bias(2)[4] = -10;                                  // an expert without a token
    }
    std::vector<MicroBatch> batches(int64_t count) {
        std::vector<MicroBatch> out;
        int64_t per = 4 / count;
        double valid = double((targets >= 0).sum().item<int64_t>());
        for (int64_t i = 0; i < count; ++i) {
            auto part = [&](const Tensor& t) { return t.narrow(0, i * per, per); };
            out.push_back(model.micro_batch(part(ids), part(targets), part(domain), part(doc_start)));
            out.back().loss_scale = 1 / valid;
            out.back().ledger = &ledger;
        }
        return out;
    }
    struct Result { double loss; std::map<std::string, Tensor> grads; Tensor counts; };
    template <class F> Result attempt(F run) {
        model.store().zero_grads();
        ledger.clear();
        Result r;
        r.loss = run().template item<double>();
        for (auto& name : model.store().names()) r.grads[name] = model.store().grad(name).clone();
        r.counts = ledger.counts();
        return r;
    }
    int segments() const { return int(model.segments().size()); }
};

double worst_difference(const Fixture::Result& a, const Fixture::Result& b) {
    double worst = 0, scale = 0;
    for (auto& [name, g] : a.grads) {
        REQUIRE(at::isfinite(g).all().item<bool>());
        worst = std::max(worst, (g - b.grads.at(name)).abs().max().item<double>());
        scale = std::max(scale, g.abs().max().item<double>());
    }
    return worst / scale;
}
}  // namespace

TEST_CASE("step program: scheduled, deferred and recomputed runs give the attached run's loss, gradients and counts", "[train]") {
    Fixture f;
    Executor ex(f.model);
    auto whole = f.batches(1);
    auto want = f.attempt([&] { return ex.run_attached(whole); });
    REQUIRE(want.counts[0].sum().item<int64_t>() == 0);                               // dense layer
    REQUIRE(want.counts[1].sum().item<int64_t>() == (4 * 21 - 3) * 2);                // padding is not counted
    REQUIRE(want.counts[2][4].item<int64_t>() == 0);                                  // the empty expert
    for (auto& [name, g] : want.grads) {
        bool empty_expert = name.find("layers.2.mlp.experts.4.") != std::string::npos;
        INFO(name);
        REQUIRE((g.abs().max().item<double>() > 0) == !empty_expert);
    }
    for (int64_t count : {1, 4})
        for (bool defer : {false, true})
            for (int recompute : {0, 1, 2, 3}) {
                INFO("micro-batches " << count << ", deferred " << defer << ", recompute " << recompute);
                const char* modes[] = {"none", "full", "selective", "selective"};
                std::vector<std::string> named[] = {{}, {}, {"experts", "route"}, {"layers.2.experts", "layers.1.attention"}};
                ex.set_recompute(recompute_spans(f.model, modes[recompute], named[recompute]));
                auto batches = f.batches(count);
                auto got = f.attempt([&] { return ex.run(schedule("1f1b", {f.segments(), int(count), 0, 1, defer}), batches); });
                REQUIRE(std::abs(got.loss - want.loss) < 1e-12);
                REQUIRE(worst_difference(want, got) < 1e-12);
                REQUIRE(at::equal(got.counts, want.counts));
                REQUIRE(f.model.store().sink().num_queued() == 0);
            }
    ex.set_recompute(recompute_spans(f.model, "none", {}));
    auto four = f.batches(4);
    at::NoGradGuard no_grad;                                                          // the caller's grad mode does not matter
    auto got = f.attempt([&] { return ex.run(schedule("1f1b", {f.segments(), 4}), four); });
    REQUIRE(worst_difference(want, got) < 1e-12);
}

TEST_CASE("model: gradients agree with central differences, a parameter of each kind", "[train][model]") {
    Fixture f;
    Executor ex(f.model);
    auto batches = f.batches(1);
    auto got = f.attempt([&] { return ex.run(schedule("1f1b", {f.segments(), 1}), batches); });
    auto loss = [&] { auto b = f.batches(1); return ex.run_forward(b[0]).item<double>(); };
    for (auto& [name, g] : got.grads) {
        if (g.abs().max().item<double>() == 0) continue;
        Tensor v = f.model.store().value(name).view({-1});
        int64_t i = g.abs().argmax().item<int64_t>();
        double h = 1e-5, x = v[i].item<double>();
        v[i] = x + h;
        double up = loss();
        v[i] = x - h;
        double down = loss();
        v[i] = x;
        double want = (up - down) / (2 * h), have = g.view({-1})[i].item<double>();
        INFO(name << " element " << i << ": difference " << want << ", gradient " << have);
        REQUIRE(std::abs(want - have) <= 1e-6 * std::abs(want) + 1e-10);
    }
}

TEST_CASE("model: a packed document does not see its neighbour", "[train][model]") {
    Fixture f;
    Executor ex(f.model);
    auto losses = [&](const Tensor& ids) {
        MicroBatch b = f.model.micro_batch(ids.narrow(0, 2, 1), f.targets.narrow(0, 2, 1), {}, f.doc_start.narrow(0, 2, 1));
        Tensor out;
        b.token_loss = &out;
        ex.run_forward(b);
        return out;
    };
    Tensor before = losses(f.ids), other = f.ids.clone();
    other[2].narrow(0, 0, 9).copy_((other[2].narrow(0, 0, 9) + 1) % 37);
    Tensor after = losses(other);
    REQUIRE(at::equal(before.narrow(0, 9, 12), after.narrow(0, 9, 12)));
    REQUIRE_FALSE(at::equal(before.narrow(0, 0, 9), after.narrow(0, 0, 9)));
}

TEST_CASE("model: logits are causal and agree with the loss", "[train][model]") {
    Fixture f;
    Tensor ids = f.ids.narrow(0, 0, 2), logits = f.model.logits(ids), changed = ids.clone();
    REQUIRE(logits.sizes() == at::IntArrayRef({2, 21, 37}));
    changed.select(1, 12).copy_((changed.select(1, 12) + 1) % 37);
    Tensor again = f.model.logits(changed);
    REQUIRE(at::equal(logits.narrow(1, 0, 12), again.narrow(1, 0, 12)));
    REQUIRE_FALSE(at::equal(logits.narrow(1, 12, 9), again.narrow(1, 12, 9)));
    MicroBatch b = f.model.micro_batch(ids, f.targets.narrow(0, 2, 2), {}, {});
    b.loss_scale = 1.0 / 42;
    double want = -logits.log_softmax(-1).gather(-1, f.targets.narrow(0, 2, 2).unsqueeze(-1)).mean().item<double>();
    REQUIRE(Executor(f.model).run_forward(b).item<double>() == Approx(want).epsilon(1e-12));
}

TEST_CASE("model: bf16 compute stays near the float64 loss", "[train][model]") {
    Fixture exact, rounded(Precision::named("bf16"));
    auto a = exact.batches(2), b = rounded.batches(2);
    double want = Executor(exact.model).run(schedule("1f1b", {exact.segments(), 2}), a).item<double>();
    double got = Executor(rounded.model).run(schedule("1f1b", {rounded.segments(), 2}), b).item<double>();
    REQUIRE(std::abs(got - want) < 0.01 * want);
    REQUIRE(got != want);
}

TEST_CASE("model: parameters carry the names of Hugging Face's checkpoints", "[model]") {
    Config c = test::small_config();
    c.model.mla.q_lora_rank = 10;
    Model m(c, {}, {Precision::named("fp64"), at::kCPU, false});
    for (auto name : {"model.embed_tokens.weight", "model.layers.0.input_layernorm.weight", "model.layers.0.self_attn.q_a_proj.weight", "model.layers.0.self_attn.q_a_layernorm.weight",
                      "model.layers.0.self_attn.q_b_proj.weight", "model.layers.0.self_attn.kv_a_proj_with_mqa.weight", "model.layers.0.self_attn.kv_a_layernorm.weight",
                      "model.layers.0.self_attn.kv_b_proj.weight", "model.layers.0.self_attn.o_proj.weight", "model.layers.0.post_attention_layernorm.weight", "model.layers.0.mlp.gate_proj.weight",
                      "model.layers.0.mlp.down_proj.weight", "model.layers.1.mlp.gate.weight", "model.layers.1.mlp.experts.4.up_proj.weight", "model.layers.1.mlp.shared_experts.gate_proj.weight",
                      "model.norm.weight", "lm_head.weight"}) {
        INFO(name);
        REQUIRE(m.store().has(name));
    }
    REQUIRE(Model::bias_name(1) == "model.layers.1.mlp.gate.e_score_correction_bias");
    REQUIRE(m.bias(0).defined() == false);
}

TEST_CASE("model: impossible input is refused with what was got and wanted", "[model]") {
    Fixture f;
    REQUIRE_THROWS_WITH(f.model.micro_batch(at::full({1, 4}, 37, at::kLong), {}, {}, {}), Catch::Contains("37") && Catch::Contains("0 to 36"));
    REQUIRE_THROWS_AS(f.model.micro_batch(at::zeros({4}, at::kLong), {}, {}, {}), Error);
    REQUIRE_THROWS_WITH(f.model.micro_batch(at::zeros({1, 500}, at::kLong), {}, {}, {}), Catch::Contains("500") && Catch::Contains("128"));
}

TEST_CASE("step program: in fp8 only rows that no kernel of ours makes are read again to be quantised", "[train]") {
    Fixture f(Precision::named("fp8"));
    Executor ex(f.model);
    auto count = [&](const std::string& recompute) {
        std::vector<std::string> kinds;
        if (recompute == "selective") kinds = {"feed_forward", "experts", "shared_experts"};
        ex.set_recompute(recompute_spans(f.model, recompute, kinds));
        auto batches = f.batches(1);
        test::Quantizations rows;
        f.attempt([&] { return ex.run(schedule("1f1b", {f.segments(), 1}), batches); });
        return rows.count();
    };
    // Each attention: its output and the gradient of kv_a's output.
    const int expected = 3 * 2;
    CHECK(count("none") == expected);
    // A forward that runs again finds the copies of what it reads taken: the routed rows, and the tokens that shared experts read.
    CHECK(count("selective") == expected + 2 * 2);
}

TEST_CASE("step program: a segment that throws leaves no queue and no deferred mode behind", "[train]") {
    Fixture f;
    Executor ex(f.model);
    auto good = f.batches(1);
    auto want = f.attempt([&] { return ex.run(schedule("1f1b", {f.segments(), 1}), good); });
    auto bad = f.batches(1);
    bad[0].targets_T = bad[0].targets_T.clone().fill_(99);                            // outside the vocabulary: the head throws
    REQUIRE_THROWS_AS(ex.run(schedule("1f1b", {f.segments(), 1, 0, 1, true}), bad), Error);
    REQUIRE(f.model.store().sink().num_queued() == 0);
    auto again = f.batches(1);
    auto got = f.attempt([&] { return ex.run(schedule("1f1b", {f.segments(), 1}), again); });
    REQUIRE(worst_difference(want, got) == 0);
}
