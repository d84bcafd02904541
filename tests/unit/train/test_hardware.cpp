#include "core/kernels/linear/linear.h"
#include "core/tensor/precision.h"
#include "core/train/hardware.h"
#include "tests/catch.h"

using namespace moe;
using namespace moe::train;

TEST_CASE("hardware: a CPU's peak is that of the products that a precision makes there, timed once", "[train]") {
    auto peak = [](const char* precision) { return peak_flops(at::kCPU, Precision::named(precision)); };
    double fp32 = peak("fp32"), fp64 = peak("fp64"), bf16 = peak("bf16");
    CHECK(fp64 > 0);
    CHECK(fp64 < fp32);
    CHECK(peak("fp16") == fp32);                         // fp16 operands are multiplied as fp32
    if (kernels::has_bf16_products()) CHECK(bf16 > fp32);
    else CHECK(bf16 == fp32);
    CHECK(peak("bf16") == bf16);
    CHECK(peak("fp32") == fp32);
}
