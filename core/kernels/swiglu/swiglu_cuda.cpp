#ifdef MOE_WITH_CUDA
#include "core/kernels/swiglu/swiglu_kernels.h"

#include "core/kernels/common/cuda_check.h"
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

void swiglu_forward_cuda(const Tensor& gate_up_R2F, const Tensor& row_weight_R, Tensor y_RF) {
    OnDevice on(gate_up_R2F);
    auto p = params(gate_up_R2F, row_weight_R);
    p.y = out_pointer(y_RF);
    MOE_CUDA_CHECK(sm90::swiglu_forward(p, on.stream));
}

void swiglu_backward_cuda(const Tensor& dy_RF, const Tensor& gate_up_R2F, const Tensor& row_weight_R, Tensor dgate_up_R2F, Tensor drow_weight_R) {
    OnDevice on(gate_up_R2F);
    auto p = params(gate_up_R2F, row_weight_R);
    p.dy = in_pointer(dy_RF), p.dgate_up = out_pointer(dgate_up_R2F), p.drow_weight = out_pointer(drow_weight_R);
    MOE_CUDA_CHECK(sm90::swiglu_backward(p, on.stream));
}
}  // namespace moe::kernels
#endif
