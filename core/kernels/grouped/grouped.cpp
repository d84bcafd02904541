// Builds without CUDA parts refuse what grouped_fits has said no to.
#ifndef MOE_WITH_CUDA
#include "core/kernels/grouped/grouped.h"

#include "core/tensor/check.h"

namespace moe::kernels {
namespace {
[[noreturn]] void refuse_grouped(std::string_view op) {
    MOE_THROW(device, std::string(op), "a build without CUDA parts", "a CUDA device of compute capability 9.0", "ask grouped_fits first");
}
}  // namespace

bool grouped_fits(const Tensor&, const Tensor&) { return false; }
void grouped_nt(const Tensor&, const Tensor&, const Tensor&, Tensor) { refuse_grouped("grouped_nt"); }
void grouped_nn(const Tensor&, const Tensor&, const Tensor&, Tensor) { refuse_grouped("grouped_nn"); }
void add_grouped_tn(const Tensor&, const Tensor&, const Tensor&, Tensor) { refuse_grouped("add_grouped_tn"); }
Tensor grouped_tn(const Tensor&, const Tensor&, const Tensor&, Tensor) { refuse_grouped("grouped_tn"); }
bool grouped_fp8_fits(int64_t, int64_t, at::Device) { return false; }
void grouped_nt_fp8(const QuantizedRows&, const Tensor&, const QuantizedWeight&, Tensor) { refuse_grouped("grouped_nt_fp8"); }
void grouped_nn_fp8(const QuantizedRows&, const Tensor&, const QuantizedWeight&, Tensor) { refuse_grouped("grouped_nn_fp8"); }
}  // namespace moe::kernels
#endif
