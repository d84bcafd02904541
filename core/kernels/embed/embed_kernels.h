// Raw entry points of embed: contiguous tensors of one device, outputs made by the caller.
#pragma once
#include <ATen/core/Tensor.h>

namespace moe::kernels {
using at::Tensor;

/// y [T, D] = rows ids[t] of w [V, D]; ids int64. On the CPU throws moe::Error (data) for an id outside [0, V).
void embed_forward_cpu(const Tensor& ids_T, const Tensor& w_VD, Tensor y_TD);
void embed_forward_cuda(const Tensor& ids_T, const Tensor& w_VD, Tensor y_TD);

/// dw [V, D] (fp64, fp32 or bf16) rows ids[t] += dy [T, D], deterministic: in token order within a row on the CPU.
/// `from_zero` says that dw is all zeros: on CUDA float64 numbers are returned then whose sum is that of dw's squares, so that a norm need not read it; else undefined.
Tensor embed_add_grad_cpu(const Tensor& dy_TD, const Tensor& ids_T, Tensor dw_VD, bool from_zero);
Tensor embed_add_grad_cuda(const Tensor& dy_TD, const Tensor& ids_T, Tensor dw_VD, bool from_zero);
}  // namespace moe::kernels
