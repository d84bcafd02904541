#include "core/model/model.h"
#include "tests/catch.h"
#include "tests/small_config.h"

#include <ATen/ATen.h>

using namespace moe;

TEST_CASE("mtp: a piece that was cut, whose last position has a target, does not look into the next piece", "[model][mtp]") {
    // Positions 0–4 are a document's middle (position 4's target is its sixth token), 5–9 the start of another.
    Tensor ids = at::arange(10, at::kLong).view({1, 10}), targets = (ids + 1).clone(), starts = at::zeros({1, 10}, at::kInt);
    targets[0][4] = 30;
    targets[0][9] = -100;
    starts.narrow(1, 5, 5).fill_(5);
    Config c = test::small_config();
    c.training.use_mtp = true;
    c.training.num_predict_tokens = 3;
    dist::Mesh mesh;
    Model model(c, mesh, {Precision::named("fp64"), at::kCPU, false});
    for (bool masked : {true, false}) {
        MicroBatch b = model.micro_batch(ids, targets, {}, starts, masked);
        CHECK(b.doc_start_BS.defined() == masked);
        // Module 1 at 4 reads token 30 and has no target; at 3 it predicts 30.
        CHECK(at::equal(b.mtp[0].ids_T, at::tensor({1, 2, 3, 4, 30, 6, 7, 8, 9, 0}, at::kLong)));
        CHECK(at::equal(b.mtp[0].targets_T, at::tensor({2, 3, 4, 30, -100, 7, 8, 9, -100, -100}, at::kLong)));
        CHECK(at::equal(b.mtp[1].ids_T, at::tensor({2, 3, 4, 30, 0, 7, 8, 9, 0, 0}, at::kLong)));
        CHECK(at::equal(b.mtp[1].targets_T, at::tensor({3, 4, 30, -100, -100, 8, 9, -100, -100, -100}, at::kLong)));
        CHECK(b.mtp[1].domain_T.lt(0).sum().item<int64_t>() == 3);
    }
    CHECK(Model::num_mtp_targets(targets, starts, 1) == 7);
    CHECK(Model::num_mtp_targets(targets, starts, 2) == 5);
}
