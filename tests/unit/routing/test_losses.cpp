#include "core/routing/losses.h"
#include "core/routing/router.h"
#include "tests/catch.h"
#include "tests/differences.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>

using namespace moe;
using namespace moe::routing;

namespace {
/// Routed tokens as plain vectors: logits [T][E], chosen ids [T][K], which tokens count.
struct PlainWindow {
    int64_t B, S, E, K;
    bool softmax;
    std::vector<double> logits;
    std::vector<int64_t> ids;
    std::vector<char> counted;
    std::vector<double> load;                             // what the global-batch loss multiplies with

    /// p = scores / Σ scores of token t.
    std::vector<double> share_of(int64_t t) const {
        std::vector<double> p(E);
        double sum = 0;
        for (int64_t e = 0; e < E; ++e) sum += p[e] = softmax ? std::exp(logits[t * E + e]) : 1 / (1 + std::exp(-logits[t * E + e]));
        for (double& x : p) x /= sum;
        return p;
    }
    /// Tokens lo … hi − 1 as one window: how many count, their mean p, how many of them chose each expert.
    struct Means { double n = 0; std::vector<double> P, c; };
    Means means(int64_t lo, int64_t hi) const {
        Means m{0, std::vector<double>(E), std::vector<double>(E)};
        for (int64_t t = lo; t < hi; ++t) {
            if (!counted[t]) continue;
            m.n += 1;
            auto p = share_of(t);
            for (int64_t e = 0; e < E; ++e) m.P[e] += p[e];
            for (int64_t k = 0; k < K; ++k) m.c[ids[t * K + k]] += 1;
        }
        for (double& x : m.P) x /= std::max(m.n, 1.0);
        return m;
    }
    /// The papers' Σ f_i P_i with f_i = N / (K n) c_i, of one window.
    double balance(int64_t lo, int64_t hi) const {
        Means m = means(lo, hi);
        double sum = 0;
        for (int64_t e = 0; e < E && m.n > 0; ++e) sum += double(E) / (double(K) * m.n) * m.c[e] * m.P[e];
        return m.n * sum;
    }
    /// Each loss times its number of tokens, weighted and scaled; of all tokens as one micro-batch.
    double loss(const LossWeights& w, double share) const {
        int64_t T = B * S;
        Means m = means(0, T);
        double total = w.switch_aux * balance(0, T), entropy = 0, global = 0, mean = 1 / double(E), variance = 0;
        for (int64_t b = 0; b < B; ++b) total += w.sequence * balance(b * S, (b + 1) * S);
        for (int64_t e = 0; e < E; ++e) {
            if (m.P[e] > 0) entropy -= m.P[e] * std::log(m.P[e]);
            global += load[e] * m.P[e];
            variance += (m.P[e] - mean) * (m.P[e] - mean) / double(E);
        }
        if (m.n > 0) total += m.n * (w.global * global - w.entropy * entropy + w.load * variance / (mean * mean));
        for (int64_t t = 0; t < T; ++t) {
            double sum = 0;
            for (int64_t e = 0; e < E; ++e) sum += std::exp(logits[t * E + e]);
            if (counted[t]) total += w.z * std::log(sum) * std::log(sum);
        }
        return total * share;
    }
    /// Sequences [first, first + count).
    PlainWindow part(int64_t first, int64_t count) const {
        PlainWindow out{count, S, E, K, softmax, {}, {}, {}, load};
        int64_t lo = first * S, hi = (first + count) * S;
        out.logits.assign(logits.begin() + lo * E, logits.begin() + hi * E);
        out.ids.assign(ids.begin() + lo * K, ids.begin() + hi * K);
        out.counted.assign(counted.begin() + lo, counted.begin() + hi);
        return out;
    }
};

/// Three sequences of 7 tokens, 5 experts, 2 chosen; expert 3 is never chosen; padding ends the second sequence and is all of the third.
PlainWindow plain_window(bool softmax) {
    PlainWindow w{3, 7, 5, 2, softmax, {}, {}, {}, {0.4, 1.7, 1.1, 0.0, 1.8}};
    int64_t T = w.B * w.S;
    at::Tensor noise = at::randn({T, w.E}, at::make_generator<at::CPUGeneratorImpl>(3), at::kDouble);
    w.logits.assign(noise.data_ptr<double>(), noise.data_ptr<double>() + noise.numel());
    for (int64_t t = 0; t < T; ++t) {
        int64_t first = (t * t + 1) % 3, second = t % 2 ? 4 : (first + 1) % 3;      // of 0, 1, 2 and 4
        w.ids.insert(w.ids.end(), {first, second});
        w.counted.push_back(t < 12);
    }
    return w;
}

at::Tensor tensor_of(const std::vector<double>& x) { return at::tensor(at::ArrayRef<double>(x), at::kDouble); }

/// The same through core/routing: loss and the gradient of the logits.
struct Got { double value; std::vector<double> gradient; };
Got through_core(const PlainWindow& w, const LossWeights& weights, double share, at::ScalarType dtype = at::kDouble) {
    kernels::RouteOptions o;
    o.top_k = w.K; o.softmax = w.softmax;
    int64_t T = w.B * w.S;
    at::Tensor logits = tensor_of(w.logits).view({T, w.E}).to(dtype).requires_grad_(true), counted = at::empty({T}, at::kBool);
    for (int64_t t = 0; t < T; ++t) counted.data_ptr<bool>()[t] = w.counted[t];
    at::Tensor ids = at::tensor(at::ArrayRef<int64_t>(w.ids), at::kLong).view({T, w.K});
    at::Tensor total = window_loss({kernels::route(logits, {}, o).scores_TE, ids, counted, w.B, w.S}, weights, tensor_of(w.load), share) + z_loss(logits, counted, weights.z, share);
    REQUIRE(total.scalar_type() == at::kDouble);
    auto grads = torch::autograd::grad({total}, {logits}, {}, false, false, true);
    at::Tensor g = grads[0].defined() ? grads[0].to(at::kDouble).contiguous() : at::zeros({T, w.E}, at::kDouble);
    return {total.item<double>(), {g.data_ptr<double>(), g.data_ptr<double>() + g.numel()}};
}

struct Named { const char* name; LossWeights weights; };
std::vector<Named> each_loss() {
    std::vector<Named> out = {{"switch", {}}, {"sequence", {}}, {"global", {}}, {"z", {}}, {"entropy", {}}, {"load", {}}, {"all", {}}};
    out[0].weights.switch_aux = 0.7;
    out[1].weights.sequence = 0.3;
    out[2].weights.global = 0.9;
    out[3].weights.z = 0.2;
    out[4].weights.entropy = 1.3;
    out[5].weights.load = 0.6;
    out[6].weights = {0.7, 0.3, 0.9, 0.2, 1.3, 0.6};
    return out;
}
double largest(const std::vector<double>& x) {
    double m = 0;
    for (double v : x) m = std::max(m, std::abs(v));
    return m;
}
}  // namespace

TEST_CASE("router losses: values and gradients of the logits are those of plain loops, padding and an empty expert included", "[routing]") {
    auto softmax = GENERATE(false, true);
    PlainWindow w = plain_window(softmax);
    REQUIRE(w.means(0, 21).c[3] == 0);
    for (auto& [name, weights] : each_loss()) {
        INFO(name << (softmax ? ", softmax" : ", sigmoid"));
        double share = 1.0 / 12, want = w.loss(weights, share);
        Got got = through_core(w, weights, share);
        REQUIRE(std::abs(want) > 1e-3);
        REQUIRE(std::abs(got.value - want) <= 1e-10 * std::abs(want));
        auto gradient = test::gradient(w.logits, [&] { return w.loss(weights, share); });
        REQUIRE(largest(gradient) > 1e-4);
        for (size_t i = 0; i < gradient.size(); ++i) {
            INFO("token " << i / 5 << " expert " << i % 5 << ": difference " << gradient[i] << ", gradient " << got.gradient[i]);
            REQUIRE(std::abs(got.gradient[i] - gradient[i]) <= 1e-8 * largest(gradient));
            if (!w.counted[i / 5]) REQUIRE(got.gradient[i] == 0);
        }
    }
}

TEST_CASE("router losses: fp32 logits give the same to fp32's accuracy, summed in float64", "[routing]") {
    PlainWindow w = plain_window(false);
    LossWeights all = each_loss().back().weights;
    REQUIRE(through_core(w, all, 0.5, at::kFloat).value == Approx(w.loss(all, 0.5)).epsilon(1e-6));
}

TEST_CASE("router losses: micro-batches add up to the mean over the tokens of all", "[routing]") {
    PlainWindow w = plain_window(false);
    for (auto& [name, weights] : each_loss()) {
        INFO(name);
        double share = 1.0 / 12, sum = 0, want = 0;
        std::vector<double> gradient;
        for (int64_t b = 0; b < 3; ++b) {                                // the third has no token that counts
            Got got = through_core(w.part(b, 1), weights, share);
            sum += got.value;
            want += w.part(b, 1).loss(weights, share);
            gradient.insert(gradient.end(), got.gradient.begin(), got.gradient.end());
        }
        REQUIRE(std::abs(sum - want) <= 1e-12 * std::abs(want));
        // What looks at a sequence or a token at a time, or takes its load from outside, does not depend on the micro-batch at all.
        if (std::string(name) != "sequence" && std::string(name) != "z" && std::string(name) != "global") continue;
        Got whole = through_core(w, weights, share);
        REQUIRE(std::abs(sum - whole.value) <= 1e-12 * std::abs(whole.value));
        for (size_t i = 0; i < gradient.size(); ++i) REQUIRE(std::abs(gradient[i] - whole.gradient[i]) <= 1e-13);
    }
}

TEST_CASE("router losses: perfect balance gives each loss its least value", "[routing]") {
    // Equal scores, choices that go round: f = 1 and P = 1/N, so Switch, sequence-wise and global are 1, the entropy log N, the load 0.
    PlainWindow w{2, 5, 5, 2, false, std::vector<double>(50, 0.3), {}, std::vector<char>(10, 1), std::vector<double>(5, 1.0)};
    for (int64_t i = 0; i < 20; ++i) w.ids.push_back(i % 5);
    const double want[] = {0.7, 0.3, 0.9, 0.2 * std::pow(0.3 + std::log(5), 2), -1.3 * std::log(5), 0};
    auto losses = each_loss();
    for (size_t i = 0; i < 6; ++i) {
        INFO(losses[i].name);
        REQUIRE(through_core(w, losses[i].weights, 0.1).value == Approx(want[i]).margin(1e-14));
    }
}

TEST_CASE("router losses: nothing but padding gives zero and no gradient that is not a number", "[routing]") {
    PlainWindow w = plain_window(false);
    std::fill(w.counted.begin(), w.counted.end(), 0);
    for (auto& [name, weights] : each_loss()) {
        INFO(name);
        Got got = through_core(w, weights, 0.5);
        REQUIRE(got.value == 0);
        for (double g : got.gradient) REQUIRE(g == 0);
    }
}

TEST_CASE("router losses: a weight of zero has no effect, and the weights come from their keys", "[routing]") {
    PlainWindow w = plain_window(false);
    Got none = through_core(w, {}, 1);
    REQUIRE(none.value == 0);
    REQUIRE(largest(none.gradient) == 0);
    REQUIRE_FALSE(LossWeights::from({}).any());
    MoeConfig c;
    c.router_aux_loss_weight = 1; c.sequence_aux_loss_weight = 2; c.global_aux_loss_weight = 3; c.router_z_loss_weight = 4; c.balance_loss_weight = 5; c.balance_loss_type = "entropy";
    LossWeights l = LossWeights::from(c);
    REQUIRE((l.switch_aux == 1 && l.sequence == 2 && l.global == 3 && l.z == 4 && l.entropy == 5 && l.load == 0));
    c.balance_loss_type = "load";
    l = LossWeights::from(c);
    REQUIRE((l.entropy == 0 && l.load == 5));
    LossWeights z;
    z.z = 1;
    REQUIRE((z.any() && !z.need_window()));
}

TEST_CASE("router losses: a window whose sequences do not cover its tokens is refused", "[routing]") {
    at::Tensor s = at::rand({6, 5}, at::kDouble), ids = at::zeros({6, 2}, at::kLong), counted = at::ones({6}, at::kBool);
    LossWeights w;
    w.sequence = 1;
    REQUIRE_THROWS_WITH(window_loss({s, ids, counted, 2, 4}, w, {}, 1), Catch::Contains("6 tokens") && Catch::Contains("2 sequences of 4"));
}

TEST_CASE("attach_loss: values and gradients of x stay, the loss's gradient starts at the scale whatever follows", "[routing]") {
    at::Tensor a = at::randn({4, 3}, at::kDouble).requires_grad_(true), u = at::randn({5}, at::kDouble).requires_grad_(true);
    at::Tensor x = a * 2, loss = u.square().sum(), y = attach_loss(x, loss, 3);
    REQUIRE(at::equal(x, y));
    auto g = torch::autograd::grad({(y * 7).sum()}, {a, u}, {}, /*retain_graph=*/true);
    REQUIRE(at::equal(g[0], at::full({4, 3}, 14.0, at::kDouble)));
    REQUIRE((g[1] - 6 * u).abs().max().item<double>() < 1e-14);
    at::Tensor narrow = attach_loss((a * 2).to(at::kFloat), loss, 3);              // x may be narrower than the loss
    REQUIRE((torch::autograd::grad({narrow.sum()}, {u}, {}, true)[0] - 6 * u).abs().max().item<double>() < 1e-14);
    REQUIRE(attach_loss(x, loss.detach(), 3).is_same(x));                          // a loss without a graph adds nothing
    REQUIRE(attach_loss(x.detach(), loss, 3).requires_grad() == false);
}

TEST_CASE("global load: a running mean of the step's counts by layer, cleared between steps", "[routing]") {
    GlobalLoad load(2, 4, {}, at::kCPU);
    auto check = [&](int64_t layer, std::vector<double> counts, std::vector<double> want) {
        at::Tensor given = tensor_of(counts), got = load.add(layer, given);
        REQUIRE(at::equal(given, tensor_of(counts)));                              // the caller's counts stay
        for (int64_t e = 0; e < 4; ++e) REQUIRE(got[e].item<double>() == Approx(want[size_t(e)]).margin(1e-15));
    };
    check(0, {0, 0, 0, 0}, {0, 0, 0, 0});                                          // padding only: no division by zero
    check(0, {4, 0, 2, 2}, {2, 0, 1, 1});
    check(0, {0, 4, 2, 2}, {1, 1, 1, 1});                                          // of both micro-batches
    check(1, {8, 0, 0, 0}, {4, 0, 0, 0});                                          // another layer has its own
    load.clear();
    check(0, {0, 0, 0, 3}, {0, 0, 0, 4});
    load.clear();
    check(1, {16777217, 16777216, 16777216, 16777215}, {16777217 / 16777216.0, 1, 1, 16777215 / 16777216.0});      // 2^24 + 1 is none of fp32's
}

TEST_CASE("routed counts: each choice of a token that counts, once", "[routing]") {
    at::Tensor ids = at::tensor({0, 1, 1, 3, 3, 0}, at::kLong).view({3, 2}), counted = at::tensor({1, 0, 1}, at::kInt).to(at::kBool);
    REQUIRE(at::equal(routed_counts(ids, counted, 5), at::tensor({2.0, 1.0, 0.0, 1.0, 0.0}, at::kDouble)));
}
