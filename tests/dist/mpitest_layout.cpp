// Mesh and expert parallelism on two or four ranks.
#include "core/base/error.h"
#include "core/dist/layout.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include "tests/catch.h"      // last: a LibTorch header defines a CHECK of its own

using namespace moe;
using at::Tensor;
using namespace moe::dist;

namespace {
Mesh mesh_of(int64_t ep) {
    DistributedConfig config;
    config.expert_parallel_size = ep;
    return make_mesh(config, world());
}

/// Rows by global expert on rank r; pattern 1: one expert takes all; 2: rank 0 has no rows; 3: nobody has any.
std::vector<int64_t> counts_of(int pattern, int r, int64_t experts) {
    std::vector<int64_t> n(experts, 0);
    for (int64_t e = 0; e < experts; ++e) {
        if (pattern == 0) n[e] = (r * 5 + e * 3) % 4;
        if (pattern == 1 && e == experts - 1) n[e] = 6 + r;
        if (pattern == 2 && r != 0) n[e] = 1 + e % 2;
    }
    return n;
}
Tensor offsets_of(const std::vector<int64_t>& counts) { return at::cat({at::zeros({1}, at::kLong), at::tensor(counts).cumsum(0)}); }

/// Row i of expert e on rank r, the same on every rank that asks.
Tensor rows_of(int r, const std::vector<int64_t>& counts, int64_t width) {
    std::vector<Tensor> rows{at::zeros({0, width}, at::kDouble)};
    for (size_t e = 0; e < counts.size(); ++e)
        for (int64_t i = 0; i < counts[e]; ++i) rows.push_back(at::sin(at::arange(width, at::kDouble) + 0.37 * (r * 100 + double(e) * 10 + double(i))).unsqueeze(0));
    return at::cat(rows);
}
}  // namespace

TEST_CASE("mesh: ep neighbours first, experts replicated over the ranks of the same place", "[dist]") {
    const Group& w = world();
    for (int64_t ep = 1; ep <= w.size(); ep *= 2) {
        Mesh mesh = mesh_of(ep);
        CHECK(mesh.dp.size() == w.size());
        CHECK(mesh.ep.size() == ep);
        CHECK(mesh.expert_dp.size() == w.size() / ep);
        CHECK(mesh.ep.rank() == w.rank() % ep);
        CHECK(mesh.expert_dp.rank() == w.rank() / ep);
        // The first of the group's neighbours by world rank.
        CHECK(mesh.ep.all_reduce(int64_t(w.rank()), ReduceOp::min) == w.rank() / ep * ep);
        CHECK(mesh.expert_dp.all_reduce(int64_t(w.rank()), ReduceOp::min) == w.rank() % ep);
        CHECK(mesh.expert_dp.all_reduce(int64_t(w.rank() % ep), ReduceOp::max) == w.rank() % ep);
    }
}

TEST_CASE("ep: dispatch brings each expert its rows, combine brings them back, gradients are exact", "[dist]") {
    const Group& w = world();
    const int64_t width = 5;
    for (int64_t ep = 2; ep <= w.size(); ep *= 2) {
        Mesh mesh = mesh_of(ep);
        ExpertParallel layout{mesh.ep};
        int64_t local = 3, experts = local * ep, me = mesh.ep.rank(), first = w.rank() / ep * ep;
        for (int pattern = 0; pattern < 4; ++pattern) {
            auto counts = counts_of(pattern, w.rank(), experts);
            auto plan = layout.plan(offsets_of(counts));
            // What arrives, from every rank's counts.
            std::vector<int64_t> expert, recv;
            std::vector<Tensor> arriving{at::zeros({0, width}, at::kDouble)};
            for (int64_t r = 0; r < ep; ++r) {
                auto theirs = counts_of(pattern, int(first + r), experts);
                Tensor rows = rows_of(int(first + r), theirs, width), at = offsets_of(theirs);
                int64_t begin = at[me * local].item<int64_t>(), end = at[(me + 1) * local].item<int64_t>();
                arriving.push_back(rows.narrow(0, begin, end - begin));
                recv.push_back(end - begin);
                for (int64_t e = 0; e < local; ++e) expert.insert(expert.end(), theirs[me * local + e], e);
            }
            CHECK(plan.recv == recv);
            REQUIRE(plan.expert_Q.sizes() == at::IntArrayRef({int64_t(expert.size()), 1}));
            CHECK(at::equal(plan.expert_Q.view(-1), at::tensor(expert, at::kLong)));

            Tensor x = rows_of(w.rank(), counts, width).requires_grad_();
            Tensor weight = at::arange(x.size(0), at::kDouble).requires_grad_();
            Tensor q = layout.dispatch(x, plan), wq = layout.dispatch(weight, plan);
            CHECK(at::equal(q, at::cat(arriving)));
            CHECK(wq.sizes() == at::IntArrayRef({q.size(0)}));
            Tensor back = layout.combine(q, plan);
            CHECK(at::equal(back, x));
            CHECK(at::equal(layout.combine(wq, plan), weight));

            // y = combine(scale of expert · w · x): dx = scale · w · dy, once (not once a rank), dw = scale · x · dy.
            Tensor scale = (plan.expert_Q + 1 + me * local).to(at::kDouble);
            Tensor y = layout.combine(q * scale * wq.unsqueeze(1), plan);
            Tensor dy = at::cos(x.detach() * 3) + 0.1;
            auto grads = torch::autograd::grad({y}, {x, weight}, {dy});
            std::vector<double> factor;
            for (int64_t e = 0; e < experts; ++e) factor.insert(factor.end(), counts[e], double(e + 1));
            Tensor s = at::tensor(factor, at::kDouble);
            CHECK(at::allclose(y, x * (s * weight).unsqueeze(1)));
            CHECK(at::allclose(grads[0], dy * (s * weight.detach()).unsqueeze(1), 1e-14, 1e-14));
            CHECK(at::allclose(grads[1], (dy * x.detach()).sum(1) * s, 1e-14, 1e-14));
        }
    }
}

TEST_CASE("ep: rows of a transposed gradient come back right", "[dist]") {
    ExpertParallel layout{mesh_of(2).ep};
    std::vector<int64_t> counts{2, 1, 0, 3};
    auto plan = layout.plan(offsets_of(counts));
    Tensor x = rows_of(world().rank(), counts, 6).requires_grad_();
    Tensor y = layout.combine(layout.dispatch(x, plan), plan);
    Tensor dy = at::randn({6, 6}, at::kDouble).t();
    CHECK(at::equal(torch::autograd::grad({y}, {x}, {dy})[0], dy));
}

TEST_CASE("tensor parallel: enter gathers the ranks' tokens, exit sums and cuts them, and the gradients take the same ways back", "[dist]") {
    int n = world().size(), rank = world().rank();
    TensorParallel tp{world()};
    auto part = [](int r) { return at::sin(at::arange(6, at::kDouble) + r).view({2, 3}); };
    auto whole = [&](int r) { return at::cos(at::arange(2 * n * 3, at::kDouble) * 0.7 + r).view({2 * n, 3}); };
    std::vector<Tensor> parts;
    Tensor sum = at::zeros({2 * n, 3}, at::kDouble);
    for (int r = 0; r < n; ++r) {
        parts.push_back(part(r));
        sum += whole(r);
    }
    Tensor x = part(rank).requires_grad_(), all = tp.enter(x), y = whole(rank).requires_grad_(), mine = tp.exit(y);
    CHECK(at::equal(all, at::cat(parts)));
    CHECK(at::allclose(mine, sum.narrow(0, 2 * rank, 2), 1e-14, 1e-14));
    CHECK(at::equal(tp.part(at::cat(parts)), part(rank)));
    CHECK(at::allclose(torch::autograd::grad({all}, {x}, {whole(rank)})[0], sum.narrow(0, 2 * rank, 2), 1e-14, 1e-14));
    CHECK(at::equal(torch::autograd::grad({mine}, {y}, {part(rank)})[0], at::cat(parts)));
}

TEST_CASE("messages: every rank sends to the next and gets from the one before, in order", "[dist]") {
    int n = world().size(), rank = world().rank();
    Tensor first = at::full({5}, double(rank)), second = at::full({100000}, rank + 0.5), got = at::empty({5}), more = at::empty({100000});
    world().send(first, (rank + 1) % n);
    world().send(second, (rank + 1) % n);
    world().receive(got, (rank + n - 1) % n);
    world().receive(more, (rank + n - 1) % n);
    world().flush();
    CHECK(at::equal(got, at::full({5}, double((rank + n - 1) % n))));
    CHECK(at::equal(more, at::full({100000}, (rank + n - 1) % n + 0.5)));
}
