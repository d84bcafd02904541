#include "core/tensor/precision.h"

#include "core/base/error.h"

namespace moe {
Precision Precision::named(const std::string& name) {
    if (name == "fp64") return {at::kDouble, at::kDouble, at::kDouble, at::kDouble};
    if (name == "fp32") return {};
    if (name == "bf16") return {at::kBFloat16, at::kFloat, at::kFloat, at::kFloat};
    if (name == "fp16") return {at::kHalf, at::kFloat, at::kFloat, at::kFloat};
    if (name == "fp8") return {at::kBFloat16, at::kFloat, at::kFloat, at::kFloat, /*fp8=*/true};
    MOE_THROW(config, "precision", name, "fp64, fp32, bf16, fp16 or fp8", "");
}
}  // namespace moe
