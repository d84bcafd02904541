#include "core/model/model.h"
#include "tests/catch.h"
#include "tests/differences.h"
#include "tests/unit/model/plain_model.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <torch/csrc/autograd/autograd.h>

#include <set>

using namespace moe;
using test::PlainModel;

namespace {
/// One dense layer, one with 4 experts, two MTP modules; 2 rows of 9 positions. Weights are large, so that nothing is nearly linear.
Config tiny() {
    Config c;
    c.seed = 5;
    c.device = "cpu";
    c.model.num_layers = 2;
    c.model.first_k_dense_replace = 1;
    c.model.vocab_size = 11;
    c.model.init_method_std = 0.3;
    c.model.dense_intermediate_size = 9;
    auto& a = c.model.mla;
    a.d_model = 10; a.d_latent = 6; a.num_heads = 2; a.qk_nope_head_dim = 3; a.qk_rope_head_dim = 4; a.v_head_dim = 3; a.rope_theta = 50; a.max_context_length = 16;
    auto& m = c.model.moe;
    m.num_experts = 4; m.num_experts_per_token = 2; m.expert_intermediate_size = 5; m.num_shared_experts = 2; m.routed_scaling_factor = 2.5;
    auto& t = c.training;
    t.use_fp64 = true;
    t.use_mtp = true;
    t.num_predict_tokens = 3;
    t.mtp_loss_weight = 0.3;
    t.seq_length = 9;
    t.global_batch_size = t.micro_batch_size = 2;
    t.train_steps = 1;
    return c;
}

struct Case {
    const char* name;
    std::function<void(Config&)> change;
};
std::vector<Case> cases() {
    return {{"as DeepSeek-V3", [](Config& c) { c.model.mla.q_lora_rank = 5; }},
            {"tied head, layernorm, plain queries, grouped heads, a window", [](Config& c) {
                c.model.tie_word_embeddings = true; c.model.norm_type = "layernorm"; c.model.norm_eps = 1e-3;
                c.model.mla.num_heads = 4; c.model.mla.num_kv_heads = 2; c.model.mla.sliding_window = 3;
            }},
            {"capacity, balance losses and z-loss", [](Config& c) {
                auto& m = c.model.moe;
                m.capacity_factor = 0.7; m.min_expert_capacity = 2; m.router_aux_loss_weight = 0.05; m.sequence_aux_loss_weight = 0.03; m.router_z_loss_weight = 0.02; m.router_temperature = 1.4;
            }},
            {"softmax, groups, halves, no selection bias, weights not normalised", [](Config& c) {
                auto& m = c.model.moe;
                m.scoring_func = "softmax"; m.n_group = 2; m.topk_group = 1; m.norm_topk_prob = false; m.use_aux_loss_free = false; m.num_shared_experts = 0; m.router_dtype = "fp64";
                c.model.mla.rope_interleave = false; c.training.num_predict_tokens = 2;
            }}};
}

/// The model and its plain twin on the same rows: two documents, the second cut by the row's end; a document of one token, another, padding.
struct Twins {
    Config config;
    Model model;
    PlainModel plain;
    Tensor ids, targets, domain, doc_start;
    routing::Ledger ledger;

    explicit Twins(const Config& c) : config(c), model(c, {}, {Precision::named("fp64"), at::kCPU, true}), ledger(c.model.num_layers + c.training.mtp_depth(), 4, 1, at::kCPU) {
        auto gen = at::make_generator<at::CPUGeneratorImpl>(8);
        auto& store = model.store();
        plain.config = c;
        plain.S = c.training.seq_length;
        plain.rows = {{{{3, 7, 7, 1, 10}, 5}, {{2, 9, 4, 0, 6}, 4}}, {{{5}, 1}, {{8, 3, 1, 1, 7, 2}, 6}}};
        for (auto& name : store.names()) {                               // norms start as ones and zeros: make them say something
            if (store.spec(name).init_std == 0) store.value(name).add_(at::randn(store.value(name).sizes(), gen, at::kDouble) * 0.3);
            Tensor v = store.value(name).contiguous();
            plain.weights[name] = {v.data_ptr<double>(), v.data_ptr<double>() + v.numel()};
        }
        for (int64_t layer : model.routed_layers()) {
            if (!c.model.moe.use_aux_loss_free) continue;
            Tensor b = model.bias(layer).normal_(0, 0.2, gen);
            plain.bias[layer] = {b.data_ptr<double>(), b.data_ptr<double>() + b.numel()};
        }
        int64_t B = 2, S = plain.S;
        ids = at::zeros({B, S}, at::kLong);
        targets = at::full({B, S}, -100, at::kLong);
        domain = at::full({B, S}, -1, at::kInt);
        doc_start = at::full({B, S}, 7, at::kInt);                       // padding: after the second row's 7 tokens
        for (int64_t b = 0; b < B; ++b)
            for (int64_t s = 0; s < S; ++s) {
                auto [d, at] = plain.place(size_t(b), s);
                if (d < 0) continue;
                auto& tokens = plain.rows[size_t(b)][size_t(d)].tokens;
                ids[b][s] = tokens[size_t(at)];
                if (size_t(at) + 1 < tokens.size()) targets[b][s] = tokens[size_t(at) + 1];
                domain[b][s] = 0;
                doc_start[b][s] = s - at;
            }
    }

    /// One backward over all of it as a micro-batch of a step.
    MicroBatch train() {
        auto& t = config.training;
        MicroBatch b = model.micro_batch(ids, targets, domain, doc_start);
        b.training = true;
        b.loss_scale = 1 / double(plain.num_tokens(1));
        b.token_share = 1 / double(plain.num_tokens(0));
        for (int64_t k = 1; k <= t.mtp_depth(); ++k) {
            REQUIRE(Model::num_mtp_targets(targets, doc_start, k) == plain.num_tokens(k + 1));
            b.mtp[size_t(k - 1)].loss_scale = t.mtp_loss_weight / double(t.mtp_depth() * plain.num_tokens(k + 1));
        }
        b.ledger = &ledger;
        ledger.clear();
        model.store().zero_grads();
        torch::autograd::backward({model.run_attached(b)});
        return b;
    }
};

double named_loss(const MicroBatch& b, const char* name) {
    auto it = b.losses.find(name);
    return it == b.losses.end() ? 0 : it->second.item<double>();
}
}  // namespace

TEST_CASE("model and MTP: losses, decisions and counts equal a plain-loop reference of the whole to 1e-10", "[model][reference]") {
    for (auto& c : cases()) {
        INFO(c.name);
        Config config = tiny();
        c.change(config);
        Twins t(config);
        MicroBatch b = t.train();
        auto want = t.plain.run();
        REQUIRE(std::abs(named_loss(b, "loss") - want.loss) <= 1e-10);
        REQUIRE(std::abs(named_loss(b, "mtp") - want.mtp) <= 1e-10);
        REQUIRE(std::abs(named_loss(b, "balance") - want.balance) <= 1e-10);
        REQUIRE(std::abs(named_loss(b, "z") - want.z) <= 1e-10);
        REQUIRE(want.mtp > 0.1);
        REQUIRE((want.balance > 0.01) == (config.model.moe.sequence_aux_loss_weight > 0));

        Tensor counts = at::zeros_like(t.ledger.counts()), dropped = at::zeros_like(counts);
        for (int64_t layer : t.model.routed_layers()) {
            int64_t k = std::max<int64_t>(0, layer - config.model.num_layers + 1);
            for (int64_t i = 0; i < 18; ++i) {
                auto& decision = t.plain.decisions.at(layer)[size_t(i / 9)][size_t(i % 9)];
                std::set<int64_t> chosen, kept, got, got_kept;
                for (size_t j = 0; j < decision.chosen.size(); ++j) {
                    chosen.insert(decision.chosen[j]);
                    if (decision.kept[j]) kept.insert(decision.chosen[j]);
                    counts[layer][decision.chosen[j]] += 1;
                    dropped[layer][decision.chosen[j]] += !decision.kept[j];
                }
                if (decision.chosen.empty()) continue;
                auto& routed = b.routed.at(layer);
                for (int64_t j = 0; j < 2; ++j) {
                    got.insert(routed.chosen_TK[i][j].item<int64_t>());
                    if (routed.ids_TK[i][j].item<int64_t>() >= 0) got_kept.insert(routed.ids_TK[i][j].item<int64_t>());
                }
                INFO("layer " << layer << " token " << i);
                REQUIRE((got == chosen));
                REQUIRE((got_kept == kept));
            }
            REQUIRE(counts[layer].sum().item<int64_t>() == 2 * t.plain.num_tokens(k));
        }
        REQUIRE(at::equal(t.ledger.counts(), counts));
        REQUIRE(at::equal(t.ledger.dropped(), dropped));
        REQUIRE((dropped.sum().item<int64_t>() > 3) == config.model.moe.capacity_factor.has_value());
    }
}

TEST_CASE("model and MTP: gradients of every parameter equal differences of the plain-loop reference to 1e-8", "[model][reference]") {
    auto c = cases()[GENERATE(size_t(0), size_t(1), size_t(2), size_t(3))];
    INFO(c.name);
    Config config = tiny();
    c.change(config);
    Twins t(config);
    t.train();
    t.plain.run();
    t.plain.frozen = true;
    auto gen = at::make_generator<at::CPUGeneratorImpl>(4);
    int64_t with_gradient = 0;
    for (auto& name : t.model.store().names()) {
        Tensor g = t.model.store().grad(name).contiguous().view({-1});
        double largest = g.abs().max().item<double>();
        // A direction of unit length through all elements, half of it along that of the largest gradient.
        Tensor direction = at::randn(g.sizes(), gen, at::kDouble);
        direction /= direction.norm();
        direction[g.abs().argmax().item<int64_t>()] += 1;
        direction /= direction.norm();
        test::Vec& w = t.plain.weights.at(name);
        test::Vec before = w;
        double want = test::derivative([&](double step) {
            for (size_t i = 0; i < w.size(); ++i) w[i] = before[i] + step * direction.const_data_ptr<double>()[i];
            return t.plain.run().total();
        }, 5e-4);
        w = before;
        double got = g.dot(direction).item<double>();
        INFO(name << ": reference " << want << ", gradient " << got << ", largest " << largest);
        REQUIRE(std::isfinite(got));
        REQUIRE(std::abs(got - want) <= 1e-8 * largest + 1e-11);
        with_gradient += largest > 1e-6;
    }
    REQUIRE(with_gradient > int64_t(t.model.store().names().size()) * 4 / 5);      // the rest: experts without a token
}
