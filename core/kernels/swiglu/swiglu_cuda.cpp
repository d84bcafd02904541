#ifdef MOE_WITH_CUDA
#include "core/kernels/swiglu/swiglu_kernels.h"

#include "core/kernels/common/cuda_check.h"
#include "core/kernels/quantize/fused_copy.h"
#include "core/kernels/swiglu/swiglu_sm90.h"

namespace moe::kernels {
namespace {
sm90::SwiGlu params(const Tensor& gate_up_R2F, const Tensor& row_weight_R) {
    sm90::SwiGlu p{};
    p.dtype = sm90_dtype("swiglu", gate_up_R2F), p.R = gate_up_R2F.size(0), p.F = gate_up_R2F.size(1) / 2;
    p.gate_up = in_pointer(gate_up_R2F), p.row_weight = in_pointer(row_weight_R);
    p.row_weight_fp64 = row_weight_R.defined() && row_weight_R.scalar_type() == at::kDouble;
    return p;
}
}  // namespace

void swiglu_forward_cuda(const Tensor& gate_up_R2F, const Tensor& row_weight_R, Tensor y_RF, const QuantizedRows& copy) {
    OnDevice on(gate_up_R2F);
    auto p = params(gate_up_R2F, row_weight_R);
    p.y = out_pointer(y_RF);
    p.copy = fused_copy(copy, {gate_up_R2F, y_RF});
    MOE_CUDA_CHECK(sm90::swiglu_forward(p, on.stream));
    if (!p.copy.q) fill_copy_cuda(y_RF, copy);
}

void swiglu_backward_cuda(const Tensor& dy_RF, const Tensor& gate_up_R2F, const Tensor& row_weight_R, Tensor dgate_up_R2F, Tensor drow_weight_R, const QuantizedRows& copy) {
    OnDevice on(gate_up_R2F);
    auto p = params(gate_up_R2F, row_weight_R);
    p.dy = in_pointer(dy_RF), p.dgate_up = out_pointer(dgate_up_R2F), p.drow_weight = out_pointer(drow_weight_R);
    if (p.F % 8 == 0) p.copy = fused_copy(copy, {gate_up_R2F, dy_RF, dgate_up_R2F});
    MOE_CUDA_CHECK(sm90::swiglu_backward(p, on.stream));
    if (!p.copy.q) fill_copy_cuda(dgate_up_R2F, copy);
}
}  // namespace moe::kernels
#endif
