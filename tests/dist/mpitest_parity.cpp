// Two ranks against one process, float64, plain SGD: five steps of every layout, each ≤ 1e-9 apart.
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

/// Plain: bias balance, packing, accumulation of two micro-batches.
Config plain() {
    Config c = test::small_config();
    c.model.num_layers = 4;
    c.model.mla.num_heads = 4;
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
    c.distributed.pipeline_schedule = "1f1b";
    return c;
}

/// Everything that draws, drops or adds a loss, two MTP modules, grouped key heads, low-rank queries.
Config full() {
    Config c = plain();
    c.training.use_mtp = true;
    c.training.num_predict_tokens = 3;
    c.model.mla.num_kv_heads = 2;
    c.model.mla.q_lora_rank = 14;
    c.model.mla.attn_dropout = 0.2;
    c.model.mla.sliding_window = 9;
    auto& m = c.model.moe;
    m.dropout = 0.1;
    m.router_noise_std = 0.3;
    m.capacity_factor = 1.1;
    m.min_expert_capacity = 2;
    m.router_aux_loss_weight = 0.02;
    m.sequence_aux_loss_weight = 0.03;
    m.router_z_loss_weight = 0.01;
    m.balance_loss_type = "entropy";
    m.balance_loss_weight = 0.02;
    return c;
}

/// Layer norm, one matrix for embedding and head, one MTP module.
Config tied() {
    Config c = plain();
    c.model.norm_type = "layernorm";
    c.model.tie_word_embeddings = true;
    c.training.use_mtp = true;
    return c;
}

struct Outcome {
    std::vector<double> losses, norms;
    std::vector<Tensor> counts;
    std::map<std::string, Tensor> weights, gradients;      ///< gradients of the first step, from the SGD update
    std::map<int64_t, Tensor> bias;
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
    for (auto& name : store.names()) o.gradients[name] = store.master(name);
    for (int i = 0; i < kSteps; ++i) {
        StepMetrics m = run.step();
        o.losses.insert(o.losses.end(), {m.loss, m.mtp_loss, m.balance_loss, m.drop_rate});
        o.norms.push_back(m.grad_norm);
        o.counts.push_back(run.last_counts().clone());
        if (i > 0) continue;
        for (auto& name : store.names()) o.gradients[name] = (o.gradients[name] - store.master(name)) / kRate;
    }
    for (auto& name : store.names()) o.weights[name] = store.master(name);
    for (int64_t layer : run.model().routed_layers()) o.bias[layer] = run.model().bias(layer).clone();
    return o;
}

struct Difference { double loss = 0, norm = 0, gradient = 0, weight = 0; bool counts = true; };
/// Over the parameters that this rank has.
Difference compare(const Outcome& want, const Outcome& got) {
    Difference d;
    for (size_t i = 0; i < want.losses.size(); ++i) d.loss = std::max(d.loss, std::abs(want.losses[i] - got.losses[i]));
    for (size_t i = 0; i < kSteps; ++i) {
        d.norm = std::max(d.norm, std::abs(want.norms[i] - got.norms[i]));
        d.counts = d.counts && at::equal(want.counts[i], got.counts[i]);
    }
    for (auto& [name, w] : got.weights) {
        d.weight = std::max(d.weight, (w - want.weights.at(name)).abs().max().item<double>());
        d.gradient = std::max(d.gradient, (got.gradients.at(name) - want.gradients.at(name)).abs().max().item<double>());
    }
    for (auto& [layer, b] : got.bias) d.counts = d.counts && at::equal(b, want.bias.at(layer));
    return d;
}

struct Case {
    const char* name;
    int64_t ep = 1, zero = 0, tp = 1, pp = 1;
    Mode mode = Mode::scheduled;
    bool defer = false;
    const char* recompute = "none";
    bool alone = false;                                     ///< one process
    const char* schedule = "1f1b";
};

void check_layouts(const char* what, const Config& base, const std::vector<Case>& cases) {
    REQUIRE(dist::world().size() == 2);
    Outcome one = five_steps(base, dist::Group(), Mode::scheduled, false);
    REQUIRE(one.counts[0][2][5].item<int64_t>() == 0);
    bool first = dist::world().rank() == 0;
    if (first) fmt::print("{:<34} {:>9} {:>9} {:>9} {:>9}  counts and biases\n", fmt::format("2 ranks against 1: {}", what), "losses", "norm", "gradient", "weight");
    for (auto& k : cases) {
        INFO(what << ": " << k.name);
        Config c = base;
        c.distributed.expert_parallel_size = k.ep;
        c.distributed.zero_stage = k.zero;
        c.distributed.tensor_parallel_size = k.tp;
        c.distributed.pipeline_parallel_size = k.pp;
        c.distributed.pipeline_schedule = k.schedule;
        c.training.gradient_checkpointing = k.recompute;
        if (c.training.gradient_checkpointing == "selective") c.training.recompute = {"feed_forward", "experts", "shared_experts"};
        Difference d = compare(one, five_steps(c, k.alone ? dist::Group() : dist::world(), k.mode, k.defer));
        for (double* x : {&d.loss, &d.norm, &d.gradient, &d.weight}) *x = dist::world().all_reduce(*x, dist::ReduceOp::max);
        d.counts = dist::world().all_reduce(int64_t(d.counts), dist::ReduceOp::min) == 1;
        if (first) fmt::print("{:<34} {:>9.1e} {:>9.1e} {:>9.1e} {:>9.1e}  {}\n", k.name, d.loss, d.norm, d.gradient, d.weight, d.counts ? "equal" : "DIFFER");
        CHECK(d.loss <= 1e-9);
        CHECK(d.norm <= 1e-9);
        CHECK(d.gradient <= 1e-9);
        CHECK(d.weight <= 1e-9);
        CHECK(d.counts);
    }
}
}  // namespace

TEST_CASE("two ranks: every layout and mode gives one process's losses, gradients, counts and weights", "[dist]") {
    check_layouts("plain", plain(),
                  {{.name = "one process, attached", .mode = Mode::attached, .alone = true},
                   {.name = "one process, deferred", .defer = true, .alone = true},
                   {.name = "DP2"},
                   {.name = "DP2, attached", .mode = Mode::attached},
                   {.name = "DP2, deferred", .defer = true},
                   {.name = "DP2, ZeRO-1", .zero = 1},
                   {.name = "DP2, ZeRO-2", .zero = 2},
                   {.name = "DP2, ZeRO-3", .zero = 3},
                   {.name = "DP2, ZeRO-3, attached", .zero = 3, .mode = Mode::attached},
                   {.name = "EP2", .ep = 2},
                   {.name = "EP2, attached", .ep = 2, .mode = Mode::attached},
                   {.name = "EP2, ZeRO-1, deferred", .ep = 2, .zero = 1, .defer = true},
                   {.name = "EP2, ZeRO-3", .ep = 2, .zero = 3},
                   {.name = "TP2", .tp = 2},
                   {.name = "TP2, EP2", .ep = 2, .tp = 2},
                   {.name = "TP2, attached", .tp = 2, .mode = Mode::attached},
                   {.name = "PP2 (1F1B)", .pp = 2},
                   {.name = "PP2 (1F1B), deferred", .pp = 2, .defer = true},
                   {.name = "PP2 (GPipe)", .pp = 2, .schedule = "gpipe"}});
}

TEST_CASE("two ranks: with MTP, dropout, noise, capacity and router losses every layout still agrees", "[dist]") {
    check_layouts("full", full(),
                  {{.name = "one process, recompute selective", .recompute = "selective", .alone = true},
                   {.name = "one process, recompute full", .recompute = "full", .alone = true},
                   {.name = "DP2"},
                   {.name = "DP2, ZeRO-1", .zero = 1},
                   {.name = "DP2, ZeRO-3, recompute full", .zero = 3, .recompute = "full"},
                   {.name = "EP2, recompute selective", .ep = 2, .recompute = "selective"},
                   {.name = "TP2", .tp = 2},
                   {.name = "TP2, EP2, ZeRO-3", .ep = 2, .zero = 3, .tp = 2},
                   {.name = "PP2 (1F1B), recompute full", .pp = 2, .recompute = "full"},
                   {.name = "PP2 (GPipe), ZeRO-1", .zero = 1, .pp = 2, .schedule = "gpipe"}});
}

TEST_CASE("two ranks: tied embeddings are summed across stages, layer norms across tensor-parallel ranks", "[dist]") {
    check_layouts("tied, layernorm", tied(), {{.name = "DP2", .zero = 1}, {.name = "EP2", .ep = 2}, {.name = "TP2", .tp = 2}, {.name = "PP2", .pp = 2}, {.name = "PP2, ZeRO-1", .zero = 1, .pp = 2}, {.name = "PP2, ZeRO-3", .zero = 3, .pp = 2}, {.name = "DP2, ZeRO-3", .zero = 3}});
}
