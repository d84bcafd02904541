#include "core/base/error.h"
#include "core/routing/intervention.h"
#include "tests/catch.h"

#include <ATen/ATen.h>

#include <limits>

using namespace moe;
using namespace moe::routing;

namespace {
RouterSettings settings(int64_t E, int64_t K, int64_t groups = 1, int64_t chosen_groups = 1) {
    RouterSettings s;
    s.num_experts = E;
    s.route.top_k = K;
    s.route.n_group = groups;
    s.route.topk_group = chosen_groups;
    return s;
}
}  // namespace

TEST_CASE("intervention: choice and weights from scores are those of the kernel", "[routing]") {
    at::manual_seed(1);
    for (bool softmax : {false, true})
        for (int64_t groups : {1, 4})
            for (bool best_two : {false, true}) {
                auto s = settings(16, 3, groups, groups == 1 ? 1 : 2);
                s.route.softmax = softmax;
                s.route.best_two = best_two;
                s.route.scale = 2.5;
                at::Tensor logits = at::randn({37, 16}, at::kDouble), bias = 0.3 * at::randn({16}, at::kDouble);
                auto r = kernels::route(logits, bias, s.route);
                CHECK(choose(r.scores_TE, bias, s.route).equal(r.ids_TK));
                CHECK((weigh(r.scores_TE, r.ids_TK, s.route) - r.weights_TK).abs().max().item<double>() < 1e-12);
            }
}

TEST_CASE("intervention: masked experts are never chosen, ablated ones weigh nothing", "[routing]") {
    at::manual_seed(2);
    Intervention x;
    x.settings = settings(8, 3);
    x.bias_E = at::zeros({8}, at::kDouble);
    x.bias_E[2] = x.bias_E[5] = -std::numeric_limits<double>::infinity();
    x.kept_E = at::ones({8}, at::kDouble);
    x.kept_E[1] = 0;
    at::Tensor logits = at::randn({50, 8}, at::kDouble);
    logits.select(1, 2).fill_(9);                          // the best by far
    HookResults hooked;
    auto r = route(x, logits, {}, {}, {}, false, hooked);
    CHECK(!r.ids_TK.eq(2).any().item<bool>());
    CHECK(!r.ids_TK.eq(5).any().item<bool>());
    auto plain = kernels::route(logits, x.bias_E, x.settings.route);
    CHECK(r.weights_TK.equal(plain.weights_TK.masked_fill(plain.ids_TK.eq(1), 0)));
}

TEST_CASE("intervention: a recomputation takes what the hooks gave and calls none", "[routing]") {
    at::manual_seed(3);
    int calls = 0;
    Intervention x;
    x.settings = settings(6, 2);
    x.pre_topk.push_back([&](const at::Tensor&, const at::Tensor& scores, const at::Tensor&, const RouteCall&) { return ++calls, scores + at::rand_like(scores); });
    x.post_topk.push_back([&](const at::Tensor& ids, const at::Tensor& weights, const at::Tensor&, const RouteCall&) { return ++calls, std::pair(ids.flip(1), weights * at::rand_like(weights)); });
    at::Tensor logits = at::randn({20, 6}, at::kDouble).set_requires_grad(true);
    HookResults hooked;
    auto first = route(x, logits, {}, {}, {}, false, hooked);
    CHECK(calls == 2);
    auto again = route(x, logits, {}, {}, first.ids_TK, true, hooked);
    CHECK(calls == 2);
    CHECK(again.ids_TK.equal(first.ids_TK));
    CHECK(again.weights_TK.equal(first.weights_TK));
    auto grads = [&](const at::Tensor& w) {
        logits.mutable_grad() = {};
        (w * at::arange(w.numel(), at::kDouble).view_as(w)).sum().backward();
        return logits.grad().clone();
    };
    at::Tensor a = grads(first.weights_TK), b = grads(again.weights_TK);
    CHECK(a.equal(b));
    CHECK(a.abs().sum().item<double>() > 0);
}

TEST_CASE("intervention: every token goes where it is forced to, by list and by token id", "[routing]") {
    Intervention x;
    x.settings = settings(6, 2);
    at::Tensor logits = at::randn({5, 6}, at::kDouble);
    HookResults hooked;
    x.forced = at::tensor({4, 1, 0}, at::kLong);
    CHECK(route(x, logits, {}, {}, {}, false, hooked).ids_TK.equal(x.forced.unsqueeze(0).expand({5, 3})));
    x.forced = at::tensor({0, 1, 2, 3, 4, 5}, at::kLong).view({3, 2});
    RouteCall call;
    call.token_ids_T = at::tensor({2, 0, 0, 1, 2}, at::kLong);
    auto r = route(x, logits, {}, call, {}, false, hooked);
    CHECK(r.ids_TK.equal(x.forced.index_select(0, call.token_ids_T)));
    CHECK((r.weights_TK.sum(-1) - 1).abs().max().item<double>() < 1e-9);
}

TEST_CASE("intervention: what a hook may not give is an error", "[routing]") {
    Intervention x;
    x.settings = settings(4, 2);
    at::Tensor logits = at::randn({3, 4}, at::kDouble);
    HookResults hooked;
    auto run = [&] { route(x, logits, {}, {}, {}, false, hooked); };
    x.pre_topk = {[](auto&, auto& scores, auto&, auto&) { return scores.narrow(1, 0, 3); }};
    CHECK_THROWS_AS(run(), Error);
    x.pre_topk = {[](auto&, auto& scores, auto&, auto&) { return scores.to(at::kLong); }};
    CHECK_THROWS_AS(run(), Error);
    x.pre_topk.clear();
    x.post_topk = {[](auto& ids, auto&, auto&, auto&) { return std::pair(at::zeros_like(ids), at::Tensor()); }};
    CHECK_THROWS_AS(run(), Error);
    x.post_topk = {[](auto& ids, auto&, auto&, auto&) { return std::pair(ids + 3, at::Tensor()); }};
    CHECK_THROWS_AS(run(), Error);
}

TEST_CASE("intervention: masks must leave enough experts, in groups too", "[routing]") {
    std::vector<bool> masked(8);
    auto plain = settings(8, 3);
    masked[0] = masked[1] = masked[2] = masked[3] = masked[4] = true;
    CHECK_NOTHROW(check_enough_experts(masked, plain, 0));
    masked[5] = true;
    CHECK_THROWS_AS(check_enough_experts(masked, plain, 0), Error);
    // Two groups of four, one chosen: a group with two left would do for two experts, and one with three for three.
    auto grouped = settings(8, 3, 2, 1);
    std::vector<bool> one(8);
    one[0] = true;
    CHECK_NOTHROW(check_enough_experts(one, grouped, 0));
    one[1] = true;
    CHECK_THROWS_AS(check_enough_experts(one, grouped, 0), Error);       // that group may win
    one[2] = one[3] = true;
    CHECK_NOTHROW(check_enough_experts(one, grouped, 0));                // it cannot
}
