#include "core/base/error.h"
#include "core/routing/balance.h"
#include "core/routing/ledger.h"
#include "core/routing/router.h"
#include "tests/catch.h"
#include "tests/differences.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <cmath>

using namespace moe;
using namespace moe::routing;

namespace {
RouterSettings with_capacity(int64_t E, int64_t K, double factor, int64_t least) {
    RouterSettings s;
    s.num_experts = E; s.route.top_k = K; s.capacity_factor = factor; s.min_capacity = least;
    return s;
}

struct Pairs {
    int64_t B, S, K;
    std::vector<int64_t> ids;                             // [B · S · K]
    std::vector<double> weights;
    std::vector<char> counted;                            // [B · S]
};
at::Tensor ids_of(const Pairs& p) { return at::tensor(at::ArrayRef<int64_t>(p.ids), at::kLong).view({p.B * p.S, p.K}); }
at::Tensor weights_of(const Pairs& p) { return at::tensor(at::ArrayRef<double>(p.weights), at::kDouble).view({p.B * p.S, p.K}); }
at::Tensor counted_of(const Pairs& p) {
    at::Tensor t = at::empty({p.B * p.S}, at::kBool);
    std::copy(p.counted.begin(), p.counted.end(), t.data_ptr<bool>());
    return t;
}

/// By the text: for each sequence and expert, the pairs of tokens that count in the order of falling weight, of equal ones the
/// earlier; those beyond the room are dropped.
std::vector<int64_t> plain_drop(const Pairs& p, int64_t room, int64_t E) {
    std::vector<int64_t> out(p.ids.size(), -1);
    for (int64_t b = 0; b < p.B; ++b)
        for (int64_t e = 0; e < E; ++e) {
            std::vector<int64_t> mine;
            for (int64_t i = b * p.S * p.K; i < (b + 1) * p.S * p.K; ++i)
                if (p.counted[i / p.K] && p.ids[i] == e) mine.push_back(i);
            for (int64_t taken = 0; taken < room && !mine.empty(); ++taken) {
                auto best = mine.begin();
                for (auto it = mine.begin(); it != mine.end(); ++it)
                    if (p.weights[*it] > p.weights[*best]) best = it;
                out[*best] = e;
                mine.erase(best);
            }
        }
    return out;
}

/// Random pairs, each token's ids distinct; weights of only `levels` values, so that ties are common.
Pairs random_pairs(int64_t B, int64_t S, int64_t K, int64_t E, int64_t levels, int64_t seed) {
    auto gen = at::make_generator<at::CPUGeneratorImpl>(uint64_t(seed));
    at::Tensor ids = std::get<1>((at::rand({B * S, E}, gen, at::kDouble) * at::linspace(2, 0.6, E, at::kDouble)).topk(K, -1)).contiguous();
    at::Tensor weights = at::randint(1, levels + 1, {B * S, K}, gen, at::kLong).to(at::kDouble) / double(levels), pad = at::rand({B * S}, gen, at::kDouble);
    Pairs p{B, S, K, {ids.data_ptr<int64_t>(), ids.data_ptr<int64_t>() + ids.numel()}, {weights.data_ptr<double>(), weights.data_ptr<double>() + weights.numel()}, {}};
    for (int64_t t = 0; t < B * S; ++t) p.counted.push_back(pad.data_ptr<double>()[t] > 0.2);
    return p;
}
}  // namespace

TEST_CASE("capacity: factor times the even share, rounded up, at least the least", "[routing]") {
    REQUIRE(capacity(21, with_capacity(5, 2, 1.0, 4)) == 9);             // 8.4
    REQUIRE(capacity(20, with_capacity(5, 2, 1.0, 4)) == 8);             // exactly 8
    REQUIRE(capacity(21, with_capacity(5, 2, 1.25, 4)) == 11);           // 10.5
    REQUIRE(capacity(21, with_capacity(5, 2, 0.1, 4)) == 4);             // 0.84
    REQUIRE(capacity(1, with_capacity(64, 8, 1.0, 1)) == 1);
    REQUIRE(capacity(4096, with_capacity(256, 8, 1.0, 4)) == 128);
}

TEST_CASE("capacity: what is dropped equals plain loops: largest weights stay, ties by position, padding takes no room", "[routing]") {
    struct Case { int64_t B, S, K, E, levels; double factor; int64_t least; };
    for (auto& c : {Case{3, 13, 2, 5, 1000, 1.0, 1}, Case{2, 21, 3, 7, 3, 0.7, 1}, Case{1, 40, 2, 4, 2, 1.0, 4}, Case{4, 5, 1, 3, 1, 0.5, 2}, Case{2, 9, 4, 4, 2, 0.6, 1}, Case{1, 1, 2, 6, 5, 1.0, 1}}) {
        INFO(c.B << " sequences of " << c.S << ", " << c.K << " of " << c.E << " experts, " << c.levels << " weights, factor " << c.factor);
        for (int64_t seed = 0; seed < 5; ++seed) {
            Pairs p = random_pairs(c.B, c.S, c.K, c.E, c.levels, seed);
            RouterSettings s = with_capacity(c.E, c.K, c.factor, c.least);
            int64_t room = capacity(c.S, s);
            auto want = plain_drop(p, room, c.E);
            for (auto dtype : {at::kDouble, at::kFloat}) {
                at::Tensor got = drop_over_capacity(ids_of(p), weights_of(p).to(dtype), counted_of(p), c.S, s);
                REQUIRE((std::vector<int64_t>(got.data_ptr<int64_t>(), got.data_ptr<int64_t>() + got.numel()) == want));
            }
            // The rule depends on the sequence alone: one at a time gives the same.
            for (int64_t b = 0; b < c.B; ++b) {
                auto part = [&](const at::Tensor& t) { return t.narrow(0, b * c.S, c.S); };
                at::Tensor alone = drop_over_capacity(part(ids_of(p)), part(weights_of(p)), part(counted_of(p)), c.S, s);
                REQUIRE((std::vector<int64_t>(alone.data_ptr<int64_t>(), alone.data_ptr<int64_t>() + alone.numel()) == std::vector<int64_t>(want.begin() + b * c.S * c.K, want.begin() + (b + 1) * c.S * c.K)));
            }
        }
    }
}

TEST_CASE("capacity: all to one expert keeps exactly the room, the least room is kept where the factor is small", "[routing]") {
    Pairs p{1, 11, 1, std::vector<int64_t>(11, 2), std::vector<double>(11, 0.5), std::vector<char>(11, 1)};
    p.counted[0] = p.counted[3] = 0;
    at::Tensor kept = drop_over_capacity(ids_of(p), weights_of(p), counted_of(p), 11, with_capacity(4, 1, 0.01, 4));
    REQUIRE(at::equal(kept.view({-1}), at::tensor({-1, 2, 2, -1, 2, 2, -1, -1, -1, -1, -1}, at::kLong)));      // equal weights: the earliest four that count
    p.weights[9] = 0.6;
    p.weights[0] = 0.9;                                                  // padding, whatever its weight
    kept = drop_over_capacity(ids_of(p), weights_of(p), counted_of(p), 11, with_capacity(4, 1, 0.01, 4));
    REQUIRE(at::equal(kept.view({-1}), at::tensor({-1, 2, 2, -1, 2, -1, -1, -1, -1, 2, -1}, at::kLong)));
}

TEST_CASE("capacity: tokens that are not whole sequences are refused", "[routing]") {
    REQUIRE_THROWS_WITH(drop_over_capacity(at::zeros({7, 2}, at::kLong), at::ones({7, 2}), at::ones({7}, at::kBool), 3, with_capacity(4, 2, 1, 1)), Catch::Contains("7 tokens") && Catch::Contains("sequences of 3"));
}

TEST_CASE("capacity: weights stay what the chosen had, and gradients flow through kept pairs only, to 1e-8 of plain loops", "[routing]") {
    constexpr int64_t S = 9, E = 4, K = 2, F = 3;
    RouterSettings s = with_capacity(E, K, 0.7, 1);
    s.route.scale = 2.5;
    auto gen = at::make_generator<at::CPUGeneratorImpl>(11);
    at::Tensor logits = at::randn({S, E}, gen, at::kDouble).requires_grad_(true), value = at::randn({E, F}, gen, at::kDouble), upstream = at::randn({S, F}, gen, at::kDouble), bias = at::tensor({0.2, 0.0, -0.3, 0.1}, at::kDouble);
    auto [sc, w, chosen] = kernels::route(logits, bias, s.route);
    at::Tensor counted = at::ones({S}, at::kBool);
    counted[4] = false;
    at::Tensor kept = drop_over_capacity(chosen, w, counted, S, s);
    REQUIRE(kept.lt(0).sum().item<int64_t>() > 2);                       // more than the padding's two
    REQUIRE((w.sum(-1) - 2.5).abs().max().item<double>() < 1e-12);       // also of tokens that lost a pair
    at::Tensor out = (w.unsqueeze(-1) * value.index_select(0, chosen.view({-1})).view({S, K, F}) * kept.ge(0).unsqueeze(-1)).sum(1);
    auto got = torch::autograd::grad({(out * upstream).sum()}, {logits})[0].contiguous();

    // Token by token: a pair's weight is its score over the sum of both chosen scores, dropped or not.
    std::vector<double> x(logits.data_ptr<double>(), logits.data_ptr<double>() + S * E);
    auto plain = [&] {
        double sum = 0;
        for (int64_t t = 0; t < S; ++t) {
            double chosen_sum = 0, p[K];
            for (int64_t k = 0; k < K; ++k) chosen_sum += p[k] = 1 / (1 + std::exp(-x[t * E + chosen[t][k].item<int64_t>()]));
            for (int64_t k = 0; k < K; ++k)
                for (int64_t f = 0; f < F && kept[t][k].item<int64_t>() >= 0; ++f)
                    sum += 2.5 * p[k] / chosen_sum * value[chosen[t][k].item<int64_t>()][f].item<double>() * upstream[t][f].item<double>();
        }
        return sum;
    };
    REQUIRE(std::abs(plain() - (out * upstream).sum().item<double>()) < 1e-12);
    auto want = test::gradient(x, plain);
    double largest = got.abs().max().item<double>();
    for (size_t i = 0; i < want.size(); ++i) REQUIRE(std::abs(got.data_ptr<double>()[i] - want[i]) <= 1e-8 * largest);
}

TEST_CASE("ledger: dropped pairs count as routed and as dropped, padding as neither", "[routing]") {
    Ledger ledger(2, 3, 2, at::kCPU);
    at::Tensor ids = at::tensor({0, 1, 0, 2, 0, 1, 2, 0}, at::kLong).view({4, 2}), kept = at::tensor({0, 1, -1, 2, -1, -1, -1, -1}, at::kLong).view({4, 2}), domain = at::tensor({0, 1, 1, -1}, at::kInt);
    ledger.count(1, ids, domain, kept);
    REQUIRE(at::equal(ledger.counts()[1], at::tensor({3, 2, 1}, at::kLong)));
    REQUIRE(at::equal(ledger.dropped()[1], at::tensor({2, 1, 0}, at::kLong)));
    REQUIRE(ledger.dropped()[0].sum().item<int64_t>() == 0);
    ledger.count(1, ids, domain);                                        // a layer without capacity drops nothing
    REQUIRE(at::equal(ledger.counts()[1], at::tensor({6, 4, 2}, at::kLong)));
    REQUIRE(at::equal(ledger.dropped()[1], at::tensor({2, 1, 0}, at::kLong)));
    ledger.clear();
    REQUIRE(ledger.dropped().sum().item<int64_t>() == 0);
}

TEST_CASE("ledger: counts are exact beyond 40 thousand, and a difference of one moves the bias", "[routing]") {
    Ledger ledger(1, 4, 1, at::kCPU);
    at::Tensor some = at::cat({at::zeros({40001}, at::kLong), at::ones({40000}, at::kLong), at::full({40000}, 2, at::kLong), at::full({39999}, 3, at::kLong)}).view({-1, 1});
    ledger.count(0, some, at::zeros({160000}, at::kInt));
    REQUIRE(at::equal(ledger.counts()[0], at::tensor({40001, 40000, 40000, 39999}, at::kLong)));
    for (auto dtype : {at::kFloat, at::kDouble}) {
        at::Tensor b = at::zeros({4}, dtype);
        update_bias(b, ledger.counts()[0], 0.5, "sign");
        REQUIRE(at::equal(b, at::tensor({-0.5, 0.0, 0.0, 0.5}, dtype)));
    }
    REQUIRE((ledger.counts().scalar_type() == at::kLong && ledger.counts_by_domain().scalar_type() == at::kLong && ledger.dropped().scalar_type() == at::kLong));
}

TEST_CASE("forced balance: every expert gets the same number, each token's experts differ, micro-batches join", "[routing]") {
    for (auto [E, K] : {std::pair<int64_t, int64_t>{5, 2}, {8, 3}, {6, 6}, {7, 1}}) {
        INFO(K << " of " << E);
        RouterSettings s = with_capacity(E, K, 1, 1);
        at::Tensor ids = forced(3 * E, 0, s, at::kCPU), counts = at::bincount(ids.view({-1}), {}, E);
        REQUIRE(at::equal(counts, at::full({E}, 3 * K, at::kLong)));
        for (int64_t t = 0; t < 3 * E; ++t)
            for (int64_t k = 1; k < K; ++k) REQUIRE(ids[t][k].item<int64_t>() == (ids[t][0].item<int64_t>() + k) % E);
        REQUIRE(at::equal(at::cat({forced(4, 0, s, at::kCPU), forced(3 * E - 4, 4, s, at::kCPU)}), ids));
        at::Tensor odd = at::bincount(forced(2 * E + 1, 1'000'003, s, at::kCPU).view({-1}), {}, E);       // not a multiple: no two differ by more than one
        REQUIRE(odd.max().item<int64_t>() - odd.min().item<int64_t>() <= 1);
    }
}
