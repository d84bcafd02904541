#include "core/kernels/head/head_loss.h"
#include "tests/unit/kernels/cuda_compare.h"

using namespace moe;
using namespace moe::test;

namespace {
Op head_op(int64_t T, int64_t D, int64_t V, int64_t chunk, int64_t keep_bytes) {
    return [=](const Place& p) -> std::vector<Result> {
        Tensor targets = at::randint(0, V, {T}, at::make_generator<at::CPUGeneratorImpl>(uint64_t(8)), at::TensorOptions().dtype(at::kLong)), token_loss;
        targets.slice(0, 0, T, 5).fill_(kernels::kIgnore);
        Tensor x = p.leaf({T, D}, 1);
        auto w = p.weight({V, D}, 2, 0.3);
        Tensor loss = kernels::head_loss(x, w, on(p, targets), {.scale = 1.0 / 16, .chunk = chunk, .keep_bytes = keep_bytes}, &token_loss);
        CHECK(loss.scalar_type() == at::kDouble);
        loss.backward(at::full({}, 2.0, loss.options()));
        return {{"loss", loss}, {"token loss", token_loss}, {"dx", x.grad()}, {"dw", w->grad}};
    };
}
}  // namespace

TEST_CASE("cuda head_loss: loss and gradients, kept and computed again, ignored targets", "[gpu][kernels]") {
    if (!has_gpu()) return;
    for (int64_t keep : {int64_t(0), int64_t(1) << 30}) {
        compare("head 37x24x50", head_op(37, 24, 50, 16, keep));
        compare("head 9x16x1001", head_op(9, 16, 1001, 4, keep));
        compare("head 40x64x9000", head_op(40, 64, 9000, 1024, keep));
        compare("head 5x16x102400", head_op(5, 16, 102400, 1024, keep));        // in shared memory of four blocks, in fp64 of eight
        compare("head 3x16x129283", head_op(3, 16, 129283, 1024, keep));        // an odd size; in fp64 read twice
    }
}

TEST_CASE("cuda head_loss: a target outside the vocabulary gives NaN", "[gpu][kernels]") {
    if (!has_gpu()) return;
    Place p{at::Device(at::kCUDA, 0), at::kFloat, at::kFloat};
    Tensor token_loss, loss = kernels::head_loss(p.random({2, 8}, 1), p.weight({5, 8}, 2), longs({1, 5}).to(at::kCUDA), {}, &token_loss);
    CHECK(loss.isnan().item<bool>());
    CHECK(token_loss[0].isfinite().item<bool>());
    CHECK(token_loss[1].isnan().item<bool>());
}
