#include "core/kernels/muon/muon.h"
#include "tests/unit/kernels/cuda_compare.h"

using namespace moe;
using namespace moe::test;

namespace {
Op muon_op(int64_t N, int64_t R, int64_t C) {
    return [=](const Place& p) -> std::vector<Result> {
        Tensor master = p.wide({N, R, C}, 1).mul(0.01), start = master.clone(), buffer = at::zeros_like(master);
        auto products = p.device.is_cuda() && p.dtype == at::kBFloat16 ? at::kBFloat16 : master.scalar_type();
        for (uint64_t step = 1; step <= 3; ++step) kernels::muon({master, Tensor()}, p.wide({N, R, C}, 1 + step), buffer, {.lr = 0.02, .weight_decay = 0.1, .products = products});
        return {{"change", master - start}, {"buffer", buffer}};
    };
}
}  // namespace

TEST_CASE("cuda muon: three steps of wide, tall and many matrices are those of the CPU", "[gpu][kernels]") {
    if (!has_gpu()) return;
    compare("muon 1x24x40", muon_op(1, 24, 40), 0.1);
    compare("muon 8x96x32", muon_op(8, 96, 32), 0.1);
    compare("muon 3x7x5", muon_op(3, 7, 5), 0.1);
}
