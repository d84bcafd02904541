#include "core/kernels/permute/permute.h"
#include <torch/csrc/autograd/autograd.h>

#include "tests/unit/kernels/cuda_compare.h"       // after LibTorch, which has a CHECK of its own

using namespace moe;
using namespace moe::test;

namespace {
/// ids [T, K] in −1 … E − 1, each about as often.
Tensor random_ids(int64_t T, int64_t K, int64_t E, int64_t lowest = -1) {
    return at::randint(lowest, E, {T, K}, at::make_generator<at::CPUGeneratorImpl>(uint64_t(7)), at::TensorOptions().dtype(at::kLong));
}
void check_same_plan(const Tensor& ids, int64_t E, int64_t align = 1) {
    auto want = kernels::sort_by_expert(ids, E, align), got = kernels::sort_by_expert(ids.to(at::kCUDA), E, align);
    REQUIRE(got.R >= want.R);                                              // the most that there may be
    CHECK(got.R % align == 0);
    CHECK(got.T == want.T);
    CHECK(got.K == want.K);
    CHECK(got.groups.align == align);
    CHECK(got.groups.offsets_E1.is_cuda());
    CHECK(at::equal(got.groups.offsets_E1.to(at::kCPU, at::kLong), want.groups.offsets_E1));
    CHECK(at::equal(got.position_TK.cpu(), want.position_TK));
    Tensor token = got.token_R.cpu(), real = want.token_R.ge(0);
    CHECK(at::equal(token.narrow(0, 0, want.R), want.token_R));
    CHECK((token.narrow(0, want.R, got.R - want.R) == -1).all().item<bool>());
    CHECK(at::equal(got.choice_R.cpu().narrow(0, 0, want.R).masked_select(real), want.choice_R.masked_select(real)));
}
Op permute_op(Tensor ids, int64_t E, int64_t D, bool base, int64_t align = 1) {
    return [=](const Place& p) -> std::vector<Result> {
        const int64_t T = ids.size(0), K = ids.size(1);
        auto plan = kernels::sort_by_expert(on(p, ids), E, align);
        const int64_t R = kernels::sort_by_expert(ids, E, align).R;      // a CUDA plan may have more rows
        Tensor x = p.leaf({T, D}, 1), weights = p.wide_leaf({T, K}, 2);
        auto [rows, row_weights] = kernels::permute(x, weights, plan);
        Tensor b = base ? p.leaf({T, D}, 3) : Tensor(), out = kernels::unpermute(b, rows, plan);
        if (rows.size(0) > R) CHECK(rows.detach().narrow(0, R, rows.size(0) - R).abs().max().item<double>() == 0);
        Tensor seen = rows.detach().narrow(0, 0, R).clone(), sum = out.detach().clone();
        out.backward(p.random({T, D}, 4), /*retain_graph=*/true);
        Tensor seen_weights = row_weights.narrow(0, 0, R);
        if (R > 0) seen_weights.backward(p.wide({R}, 5));
        return {{"rows", seen}, {"row weights", seen_weights}, {"out", sum}, {"dx", x.grad()}, {"dbase", base ? b.grad() : Tensor()}, {"dweights", weights.grad()}};
    };
}
/// x on two ways, rows and itself, which meet again.
Op around_op(Tensor ids, int64_t E, int64_t D) {
    return [=](const Place& p) -> std::vector<Result> {
        const int64_t T = ids.size(0), K = ids.size(1);
        auto plan = kernels::sort_by_expert(on(p, ids), E);
        Tensor x = p.leaf({T, D}, 1), base = p.leaf({T, D}, 3), weights = p.wide({T, K}, 2);
        auto [rows, row_weights, same] = kernels::permute_and_input(x, weights, plan);
        Tensor out = kernels::unpermute(base, rows, plan, same);
        out.backward(p.random({T, D}, 4));
        return {{"out", out.detach()}, {"dx", x.grad()}, {"dbase", base.grad()}};
    };
}
}  // namespace

TEST_CASE("cuda permute_and_input, unpermute with two bases: values and gradients", "[gpu][kernels]") {
    if (!has_gpu()) return;
    compare("permute and unpermute around 700x40", around_op(random_ids(700, 3, 5), 5, 40));
    compare("permute and unpermute around 33x7", around_op(random_ids(33, 2, 4), 4, 7));
}

TEST_CASE("cuda sort_by_expert: the plan is that of the CPU", "[gpu][kernels]") {
    if (!has_gpu()) return;
    check_same_plan(random_ids(700, 3, 5), 5);
    check_same_plan(random_ids(1, 1, 1, 0), 4);
    check_same_plan(random_ids(4096, 8, 256, 0), 256);
    check_same_plan(at::full({100, 2}, -1, at::kLong), 3);                 // all dropped
    check_same_plan(at::full({2000, 2}, 2, at::kLong), 4);                 // one expert has all
    check_same_plan(at::empty({0, 2}, at::kLong), 4);
    check_same_plan(random_ids(333, 2, 1500, 0), 1500);                    // more experts than threads
}

TEST_CASE("cuda sort_by_expert: groups start at multiples of align", "[gpu][kernels]") {
    if (!has_gpu()) return;
    check_same_plan(random_ids(700, 3, 5), 5, 128);
    check_same_plan(random_ids(4096, 8, 256, 0), 256, 64);
    check_same_plan(at::full({100, 2}, -1, at::kLong), 3, 128);
    check_same_plan(at::full({2000, 2}, 2, at::kLong), 4, 128);
    check_same_plan(random_ids(1, 2, 64, 0), 64, 128);                     // fewer pairs than experts
    check_same_plan(at::empty({0, 2}, at::kLong), 4, 128);
}

TEST_CASE("cuda sort_by_expert: an id outside is taken as dropped, nothing waits for the device", "[gpu][kernels]") {
    if (!has_gpu()) return;
    auto got = kernels::sort_by_expert(longs({0, 4, -2, 2}).view({2, 2}).to(at::kCUDA), 4), want = kernels::sort_by_expert(longs({0, -1, -1, 2}).view({2, 2}), 4);
    CHECK(at::equal(got.position_TK.cpu(), want.position_TK));
    CHECK(at::equal(got.groups.offsets_E1.to(at::kCPU, at::kLong), want.groups.offsets_E1));
}

TEST_CASE("cuda permute and unpermute: rows, sums and gradients", "[gpu][kernels]") {
    if (!has_gpu()) return;
    for (bool base : {false, true}) {
        compare("permute 90x3 D40", permute_op(random_ids(90, 3, 6), 6, 40, base));
        compare("permute 90x3 D7", permute_op(random_ids(90, 3, 6), 6, 7, base));
        compare("permute 33x8 D2056", permute_op(random_ids(33, 8, 20), 20, 2056, base));
        compare("permute all dropped", permute_op(at::full({4, 2}, -1, at::kLong), 3, 8, base));
        compare("permute padded groups", permute_op(random_ids(90, 3, 6), 6, 40, base, 16));
    }
}
