// Mistakes that other trainers shipped, each with everything random switched on: MTP, noise, both dropouts, capacity, router losses.
#include "core/train/optimizer.h"
#include "core/train/recompute.h"
#include "core/train/run.h"
#include "tests/catch.h"
#include "tests/folder.h"
#include "tests/small_config.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>

#include <cmath>

using namespace moe;
using namespace moe::train;

namespace {
constexpr int64_t kPadding = 3, kCut = 9;             // padding ends row 1; row 2 has a second document from here

/// A dense layer, one with experts, two MTP modules; nothing that ties a token's result to other rows or to draws.
Config plain_mtp() {
    Config c = test::small_config();
    c.model.num_layers = 2;
    c.training.use_mtp = true;
    c.training.num_predict_tokens = 3;
    return c;
}

Config everything() {
    Config c = plain_mtp();
    c.model.mla.attn_dropout = 0.1;
    auto& m = c.model.moe;
    m.dropout = 0.2; m.router_noise_std = 0.3; m.capacity_factor = 0.9; m.min_expert_capacity = 2;
    m.sequence_aux_loss_weight = 0.02; m.router_z_loss_weight = 0.01; m.bias_update_speed = 0.01;
    return c;
}

RunOptions silent() {
    RunOptions o;
    o.log_folder = o.console = false;
    return o;
}

/// 4 rows of 21 positions: targets are the next tokens of the document.
struct Rows {
    Config config;
    Model model;
    routing::Ledger ledger;
    Tensor ids, targets, domain, doc_start;

    explicit Rows(const Config& c) : config(c), model(c, {}, {Precision::named("fp64"), at::kCPU, true}), ledger(c.model.num_layers + c.training.mtp_depth(), c.model.moe.num_experts, 3, at::kCPU) {
        int64_t S = c.training.seq_length;
        auto gen = at::make_generator<at::CPUGeneratorImpl>(7);
        Tensor tokens = at::randint(c.model.vocab(), {4, S + 1}, gen, at::kLong);
        ids = tokens.narrow(1, 0, S).clone();
        targets = tokens.narrow(1, 1, S).clone();
        targets[1].narrow(0, S - kPadding - 1, kPadding + 1).fill_(-100);
        targets[2][kCut - 1] = -100;
        domain = at::randint(2, {4, S}, gen, at::TensorOptions(at::kInt));
        domain[2].narrow(0, kCut, S - kCut).fill_(2);
        domain[1].narrow(0, S - kPadding, kPadding).fill_(-1);
        doc_start = at::zeros({4, S}, at::kInt);
        doc_start[2].narrow(0, kCut, S - kCut).fill_(kCut);
        doc_start[1].narrow(0, S - kPadding, kPadding).fill_(S - kPadding);
        for (int64_t layer : model.routed_layers()) model.bias(layer).copy_(at::linspace(-0.1, 0.1, 5));
    }
    std::vector<MicroBatch> batches(int64_t count) {
        std::vector<MicroBatch> out;
        int64_t per = 4 / count, depth = config.training.mtp_depth();
        for (int64_t i = 0; i < count; ++i) {
            auto part = [&](const Tensor& t) { return t.narrow(0, i * per, per); };
            out.push_back(model.micro_batch(part(ids), part(targets), part(domain), part(doc_start)));
            MicroBatch& b = out.back();
            b.first_token += i * per * config.training.seq_length;
            b.step = 2;
            b.training = true;
            b.loss_scale = 1 / double((targets >= 0).sum().item<int64_t>());
            b.token_share = 1 / double((domain >= 0).sum().item<int64_t>());
            b.noise_std = config.model.moe.router_noise_std;
            for (int64_t k = 1; k <= depth; ++k) b.mtp[size_t(k - 1)].loss_scale = config.training.mtp_loss_weight / double(depth * Model::num_mtp_targets(targets, doc_start, k));
            b.ledger = &ledger;
        }
        return out;
    }
    struct Result { std::map<std::string, double> losses; std::map<std::string, Tensor> grads; Tensor counts, dropped; };
    /// A step's forward and backward by `run`, from nothing.
    template <class F> Result attempt(int64_t count, F run) {
        model.store().zero_grads();
        ledger.clear();
        auto parts = batches(count);
        run(parts);
        Result r;
        for (auto& b : parts)
            for (auto& [name, loss] : b.losses) r.losses[name] += loss.template item<double>();
        for (auto& name : model.store().names()) r.grads[name] = model.store().grad(name).clone();
        r.counts = ledger.counts_by_domain();
        r.dropped = ledger.dropped();
        return r;
    }
    Result attempt(int64_t count = 1, bool defer = false) {
        Executor ex(model);
        return attempt(count, [&](auto& parts) { ex.run(schedule("1f1b", {int(model.segments().size()), int(count), 0, 1, defer}), parts); });
    }
    /// Tokens that layer's router must count: all but padding, and for an MTP module those with a token k places on in their document.
    int64_t num_tokens(int64_t layer) const {
        int64_t k = std::max<int64_t>(0, layer - config.model.num_layers + 1), S = config.training.seq_length;
        if (k == 0) return 4 * S - kPadding;
        // Rows 0 and 3 and the second document of row 2 go on beyond the row by the one token that their last target is.
        return 2 * (S + 1 - k) + (S - kPadding - k) + (kCut - k) + (S - kCut + 1 - k);
    }
};

void require_same(const Rows::Result& want, const Rows::Result& got, double tolerance) {
    REQUIRE(want.losses.size() == got.losses.size());
    for (auto& [name, loss] : want.losses) {
        INFO(name << ": " << loss << " and " << got.losses.at(name));
        REQUIRE(std::abs(loss - got.losses.at(name)) <= tolerance);
    }
    double scale = 0;
    for (auto& [name, g] : want.grads) scale = std::max(scale, g.abs().max().item<double>());
    for (auto& [name, g] : want.grads) {
        INFO(name);
        REQUIRE(at::isfinite(got.grads.at(name)).all().item<bool>());
        REQUIRE((g - got.grads.at(name)).abs().max().item<double>() <= tolerance * scale);
    }
    REQUIRE(at::equal(want.counts, got.counts));
    REQUIRE(at::equal(want.dropped, got.dropped));
}
}  // namespace

TEST_CASE("traps: with everything on, micro-batches, deferral, recomputation and one graph give one step's losses, gradients and counts", "[train][traps]") {
    Rows r(everything());
    auto want = r.attempt(1, [&](auto& parts) { Executor(r.model).run_attached(parts); });
    for (auto name : {"loss", "mtp", "balance", "z"}) REQUIRE(want.losses.at(name) > 1e-3);
    REQUIRE(want.dropped.sum().item<int64_t>() > 5);
    REQUIRE(want.counts[0].sum().item<int64_t>() == 0);                  // a dense layer
    for (int64_t layer : r.model.routed_layers()) REQUIRE(want.counts[layer].sum().item<int64_t>() == 2 * r.num_tokens(layer));
    for (auto [count, defer] : {std::pair<int64_t, bool>{1, true}, {4, false}}) {
        INFO(count << " micro-batches, deferred " << defer);
        require_same(want, r.attempt(count, defer), 1e-12);
    }
    for (auto [mode, kinds] : {std::pair<const char*, std::vector<std::string>>{"full", {}}, {"selective", {"route", "attention", "combine", "head", "join"}}}) {
        INFO("recompute " << mode << ", " << kinds.size() << " kinds");
        Executor ex(r.model);
        ex.set_recompute(recompute_spans(r.model, mode, kinds));
        require_same(want, r.attempt(4, [&](auto& parts) { ex.run(schedule("gpipe", {int(r.model.segments().size()), 4}), parts); }), 1e-12);
    }
}

TEST_CASE("traps: the randomness of a step is there, and it is another in the next", "[train][traps]") {
    Rows r(everything());
    auto one = r.attempt();
    auto at_step = [&](uint32_t step) {
        return r.attempt(1, [&](auto& parts) {
            parts[0].step = step;
            Executor(r.model).run_attached(parts);
        });
    };
    REQUIRE(at_step(2).losses.at("mtp") == Approx(one.losses.at("mtp")).epsilon(1e-12));
    auto next = at_step(3);
    for (auto name : {"mtp", "loss"}) REQUIRE(std::abs(next.losses.at(name) - one.losses.at(name)) > 1e-6);
}

TEST_CASE("traps: what follows a document's end changes nothing before it, in the MTP modules neither", "[train][traps]") {
    Rows r(plain_mtp());
    Executor ex(r.model);
    // Row 2 alone, with targets in its first document only.
    auto first_document = [&](const Tensor& ids) {
        Tensor targets = r.targets.narrow(0, 2, 1).clone();
        std::vector<Tensor> predicted;
        targets.narrow(1, kCut, 21 - kCut).fill_(-100);
        r.model.store().zero_grads();
        r.ledger.clear();
        std::vector<MicroBatch> parts = {r.model.micro_batch(ids, targets, r.domain.narrow(0, 2, 1), r.doc_start.narrow(0, 2, 1))};
        parts[0].ledger = &r.ledger;
        parts[0].predicted = &predicted;
        for (auto& m : parts[0].mtp) m.loss_scale = 1;
        ex.run_attached(parts);
        Rows::Result out;
        for (auto& [name, loss] : parts[0].losses) out.losses[name] = loss.item<double>();
        for (auto& name : r.model.store().names()) out.grads[name] = r.model.store().grad(name).clone();
        out.counts = r.ledger.counts_by_domain().narrow(1, 0, 2).clone();            // domains 0 and 1: the first document
        out.dropped = at::cat({predicted[0].narrow(0, 0, kCut), predicted[1].narrow(0, 0, kCut - 1), predicted[2].narrow(0, 0, kCut - 2)});
        return out;
    };
    Tensor ids = r.ids.narrow(0, 2, 1).clone(), other = ids.clone();
    other.narrow(1, kCut, 21 - kCut).copy_((other.narrow(1, kCut, 21 - kCut) + 5) % 37);
    auto before = first_document(ids), after = first_document(other);
    REQUIRE(before.losses.at("mtp") > 1);
    require_same(before, after, 1e-13);
    for (int64_t layer : r.model.routed_layers()) {
        int64_t k = std::max<int64_t>(0, layer - 1);
        REQUIRE(before.counts[layer].sum().item<int64_t>() == 2 * (kCut - k));       // the last k tokens have nothing to read k places on
    }
    // And the other way: a second document does not see the first.
    other = ids.clone();
    other.narrow(1, 0, kCut).copy_((other.narrow(1, 0, kCut) + 5) % 37);
    auto losses_after = [&](const Tensor& given) {
        Tensor targets = r.targets.narrow(0, 2, 1).clone();
        targets.narrow(1, 0, kCut).fill_(-100);
        MicroBatch b = r.model.micro_batch(given, targets, {}, r.doc_start.narrow(0, 2, 1));
        for (auto& m : b.mtp) m.loss_scale = 1;
        ex.run_forward(b);
        return std::pair(b.losses.at("loss").item<double>(), b.losses.at("mtp").item<double>());
    };
    auto [loss, mtp] = losses_after(ids);
    auto [other_loss, other_mtp] = losses_after(other);
    REQUIRE(mtp > 1);
    REQUIRE((std::abs(loss - other_loss) <= 1e-13 * loss && std::abs(mtp - other_mtp) <= 1e-13 * mtp));
}

TEST_CASE("traps: tokens of padding change no loss, gradient, count or drop", "[train][traps]") {
    Rows r(everything());
    auto before = r.attempt();
    r.ids[1].narrow(0, 21 - kPadding, kPadding).copy_((r.ids[1].narrow(0, 21 - kPadding, kPadding) + 11) % 37);
    require_same(before, r.attempt(), 1e-13);                            // experts get other rows of padding: sums may round differently
    r.ids[1][20 - kPadding] = (r.ids[1][20 - kPadding].item<int64_t>() + 11) % 37;   // the last token that counts does
    REQUIRE(r.attempt().losses.at("balance") != before.losses.at("balance"));
}

TEST_CASE("traps: with capacity an expert without tokens and one that all want work, in the MTP modules too", "[train][traps]") {
    Rows r(everything());
    for (int64_t layer : r.model.routed_layers()) {
        r.model.bias(layer)[4] = -10;
        r.model.bias(layer)[0] = 10;
    }
    auto got = r.attempt(2);
    int64_t room = 8;                                                    // ceil(0.9 · 21 · 2 / 5)
    for (int64_t layer : r.model.routed_layers()) {
        INFO("layer " << layer);
        Tensor counts = got.counts[layer].sum(0);
        REQUIRE(counts[4].item<int64_t>() == 0);
        REQUIRE(counts[0].item<int64_t>() == r.num_tokens(layer));
        REQUIRE(got.dropped[layer][0].item<int64_t>() == r.num_tokens(layer) - 4 * room);
        for (auto& name : r.model.store().names()) {
            REQUIRE(at::isfinite(got.grads.at(name)).all().item<bool>());
            if (name.find("layers." + std::to_string(layer) + ".mlp.experts.4.") != std::string::npos) REQUIRE(got.grads.at(name).abs().max().item<double>() == 0);
        }
    }
    require_same(got, r.attempt(4, true), 1e-12);
}

TEST_CASE("traps: every router's bias moves once a step by the step's counts, MTP modules' included, however many micro-batches", "[train][traps]") {
    for (int64_t micro : {1, 4}) {
        INFO("micro-batches of " << micro);
        Config c = everything();
        c.training.micro_batch_size = micro;
        Run run(c, silent());
        auto loader = data::open_loader(c, /*validation=*/false);
        REQUIRE(run.model().routed_layers() == std::vector<int64_t>{1, 2, 3});
        for (int step = 0; step < 2; ++step) {
            data::Batch batch = loader->next(4, 0, 4);
            std::map<int64_t, Tensor> before;
            for (int64_t layer : run.model().routed_layers()) before[layer] = run.model().bias(layer).clone();
            run.step();
            for (int64_t layer : run.model().routed_layers()) {
                // Tokens with another one k places on in their document, by walking along the targets.
                int64_t tokens = 0, k = std::max<int64_t>(0, layer - 1);
                for (int64_t b = 0; b < 4; ++b)
                    for (int64_t s = 0; s < 21; ++s) {
                        bool there = batch.domain[b][s].item<int32_t>() >= 0;
                        for (int64_t j = 0; j < k; ++j) there = there && s + j < 21 && batch.targets[b][s + j].item<int64_t>() >= 0;
                        tokens += there;
                    }
                Tensor counts = run.last_counts()[layer];
                INFO("step " << step << " layer " << layer);
                REQUIRE(counts.sum().item<int64_t>() == 2 * tokens);
                for (int64_t e = 0; e < 5; ++e) {
                    double mean = 2 * double(tokens) / 5, count = double(counts[e].item<int64_t>()), sign = mean > count ? 1 : mean < count ? -1 : 0;
                    REQUIRE(std::abs(run.model().bias(layer)[e].item<double>() - before[layer][e].item<double>() - 0.01 * sign) < 1e-15);
                }
            }
        }
    }
}

TEST_CASE("traps: 4 micro-batches of 1 and 1 of 4 train the same with everything on: losses to 1e-12, counts and drops equal", "[train][traps]") {
    Config one = everything(), four = one;
    four.training.micro_batch_size = 4;
    Run a(one, silent()), b(four, silent());
    for (int i = 0; i < 2; ++i) {
        StepMetrics x = a.step(), y = b.step();
        REQUIRE(std::abs(x.loss - y.loss) < 1e-12);
        REQUIRE(std::abs(x.mtp_loss - y.mtp_loss) < 1e-12);
        REQUIRE(std::abs(x.balance_loss - y.balance_loss) < 1e-12);
        REQUIRE(std::abs(x.grad_norm - y.grad_norm) < 1e-11);
        REQUIRE(x.drop_rate == y.drop_rate);
        REQUIRE(x.drop_rate > 0);
        REQUIRE(at::equal(a.last_counts(), b.last_counts()));
        REQUIRE(at::equal(a.last_dropped(), b.last_dropped()));
        if (i == 0) REQUIRE(x.mtp_loss == Approx(0.3 * std::log(37)).epsilon(0.1));  // λ times the mean over modules, not their sum
    }
}

TEST_CASE("traps: rows that end in padding are counted as far as their documents go", "[train][traps]") {
    test::Folder folder;
    folder.write("a.txt", "abcde");
    folder.write("b.txt", "0123456789ab");
    folder.write("c.txt", std::string(50, 'x'));
    Config c = everything();
    c.model.vocab_size.reset();
    c.data.dataset_type = "text";
    c.data.path = folder.path();
    c.data.packing = c.data.preprocessing.shuffle = false;
    Run run(c, silent());
    run.step();
    // Each document and its end: rows of 6 and 13 tokens, then two of 21 that go on.
    auto counted = [&](int64_t layer) { return run.last_counts()[layer].sum().item<int64_t>(); };
    REQUIRE(counted(1) == 2 * (6 + 13 + 21 + 21));
    REQUIRE(counted(2) == 2 * (5 + 12 + 21 + 21));                       // module 1 reads the token after; the last of a row is the next row's first
    REQUIRE(counted(3) == 2 * (4 + 11 + 20 + 20));
}

TEST_CASE("traps: weight decay shrinks matrices only, not norms, their shifts or the routers' biases", "[train][traps]") {
    Config c = everything();
    c.model.norm_type = "layernorm";
    c.model.mla.q_lora_rank = 7;
    Model model(c, {}, {Precision::named("fp64"), at::kCPU, true});
    auto& store = model.store();
    std::map<std::string, Tensor> before;
    for (auto& name : store.names()) {
        if (store.spec(name).init_std == 0) store.value(name).add_(0.5);  // shifts start at 0
        before[name] = store.value(name).clone();
    }
    for (int64_t layer : model.routed_layers()) model.bias(layer).fill_(0.25);
    c.training.weight_decay = 0.5;
    store.zero_grads();
    update(store, c.training, 0.1, 0, 1);                                // gradients of zero: what moves is the decay
    int64_t vectors = 0;
    for (auto& [name, old] : before) {
        INFO(name);
        if (old.dim() == 1) {
            ++vectors;
            REQUIRE(at::equal(store.value(name), old));
        } else {
            REQUIRE((store.value(name) - old * 0.95).abs().max().item<double>() < 1e-15);
        }
    }
    REQUIRE(vectors == 4 * 6 + 2 + 2 * 6);                       // input, post, their shifts, two latents a layer; the last; enorm, hnorm, shared_head.norm
    for (int64_t layer : model.routed_layers()) REQUIRE(at::equal(model.bias(layer), at::full({5}, 0.25, at::kDouble)));
}

TEST_CASE("traps: validation moves nothing and draws nothing: twice the same, and training goes on as if it had not been", "[train][traps]") {
    Config c = everything();
    c.validation.enabled = true;
    c.validation.max_batches = 1;
    c.training.eval_interval = 1000;
    Run a(c, silent()), b(c, silent());
    a.train(1);
    b.train(1);
    Tensor counts = a.last_counts().clone(), dropped = a.last_dropped().clone();
    Evaluation first = a.evaluate(), second = a.evaluate();
    REQUIRE(std::isfinite(first.loss));
    REQUIRE(first.loss == second.loss);
    REQUIRE((first.acceptance == second.acceptance));
    REQUIRE(first.acceptance.size() == 2);
    REQUIRE(at::equal(a.last_counts(), counts));
    REQUIRE(at::equal(a.last_dropped(), dropped));
    auto require_equal = [&] {
        for (int64_t layer : a.model().routed_layers()) REQUIRE(at::equal(a.model().bias(layer), b.model().bias(layer)));
        for (auto& name : a.model().store().names()) {
            INFO(name);
            REQUIRE(at::equal(a.model().store().value(name), b.model().store().value(name)));
            REQUIRE(at::equal(a.model().store().grad(name), b.model().store().grad(name)));
        }
    };
    require_equal();
    StepMetrics x = a.step(), y = b.step();
    REQUIRE((x.loss == y.loss && x.mtp_loss == y.mtp_loss && x.grad_norm == y.grad_norm));
    REQUIRE(at::equal(a.last_counts(), b.last_counts()));
    require_equal();

    Config calm = c;                                                     // the same weights without noise and dropout validate the same
    calm.model.moe.dropout = calm.model.moe.router_noise_std = calm.model.mla.attn_dropout = 0;
    Run noisy(c, silent()), quiet(calm, silent());
    REQUIRE(noisy.evaluate().loss == quiet.evaluate().loss);
    REQUIRE(noisy.step().loss != quiet.step().loss);
}
