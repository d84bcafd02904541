#include "core/kernels/permute/permute.h"
#include "tests/unit/kernels/cuda_compare.h"

using namespace moe;
using namespace moe::test;

namespace {
/// ids [T, K] in −1 … E − 1, each about as often.
Tensor random_ids(int64_t T, int64_t K, int64_t E, int64_t lowest = -1) {
    return at::randint(lowest, E, {T, K}, at::make_generator<at::CPUGeneratorImpl>(uint64_t(7)), at::TensorOptions().dtype(at::kLong));
}
void check_same_plan(const Tensor& ids, int64_t E) {
    auto want = kernels::sort_by_expert(ids, E), got = kernels::sort_by_expert(ids.to(at::kCUDA), E);
    REQUIRE(got.R == want.R);
    CHECK(got.T == want.T);
    CHECK(got.K == want.K);
    CHECK(got.offsets_E1.is_cpu());
    CHECK(at::equal(got.offsets_E1, want.offsets_E1));
    CHECK(at::equal(got.position_TK.cpu(), want.position_TK));
    CHECK(at::equal(got.token_R.cpu(), want.token_R));
    CHECK(at::equal(got.choice_R.cpu(), want.choice_R));
}
Op permute_op(Tensor ids, int64_t E, int64_t D, bool base) {
    return [=](const Place& p) -> std::vector<Result> {
        const int64_t T = ids.size(0), K = ids.size(1);
        auto plan = kernels::sort_by_expert(on(p, ids), E);
        Tensor x = p.leaf({T, D}, 1), weights = p.wide_leaf({T, K}, 2);
        auto [rows, row_weights] = kernels::permute(x, weights, plan);
        Tensor b = base ? p.leaf({T, D}, 3) : Tensor(), out = kernels::unpermute(b, rows, plan);
        Tensor seen = rows.detach().clone(), sum = out.detach().clone();
        out.backward(p.random({T, D}, 4), /*retain_graph=*/true);
        if (plan.R > 0) row_weights.backward(p.wide({plan.R}, 5));
        return {{"rows", seen}, {"row weights", row_weights}, {"out", sum}, {"dx", x.grad()}, {"dbase", base ? b.grad() : Tensor()}, {"dweights", weights.grad()}};
    };
}
}  // namespace

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

TEST_CASE("cuda sort_by_expert: an id outside is an error", "[gpu][kernels]") {
    if (!has_gpu()) return;
    CHECK_THROWS_AS(kernels::sort_by_expert(longs({0, 4, 1, 2}).view({2, 2}).to(at::kCUDA), 4), Error);
    CHECK_THROWS_AS(kernels::sort_by_expert(longs({0, -2, 1, 2}).view({2, 2}).to(at::kCUDA), 4), Error);
}

TEST_CASE("cuda permute and unpermute: rows, sums and gradients", "[gpu][kernels]") {
    if (!has_gpu()) return;
    for (bool base : {false, true}) {
        compare("permute 90x3 D40", permute_op(random_ids(90, 3, 6), 6, 40, base));
        compare("permute 90x3 D7", permute_op(random_ids(90, 3, 6), 6, 7, base));
        compare("permute 33x8 D2056", permute_op(random_ids(33, 8, 20), 20, 2056, base));
        compare("permute all dropped", permute_op(at::full({4, 2}, -1, at::kLong), 3, 8, base));
    }
}
