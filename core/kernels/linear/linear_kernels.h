// The raw products behind the linear door, one set a device: no autograd, no weights, no sinks.
// Every tensor is on one device and contiguous (on a GPU the rows of dy may lie apart); outputs are made by the caller. Operands may differ in dtype (the router's
// fp32 weight with bf16 activations, the head's fp32 logits): the product is of the values as stored, accumulated in at least
// fp32, in fp64 where an operand is fp64, and rounded once to the output's dtype. Row counts may be 0, the outputs are then
// zero or unchanged. Letters as in linear.h.
#pragma once
#include "core/kernels/common/row_groups.h"
#include "core/kernels/quantize/quantize.h"

namespace moe::kernels {
using at::Tensor;

/// y [T, O] = x [T, I] w [O, I]ᵀ.
void product_nt_cpu(const Tensor& x_TI, const Tensor& w_OI, Tensor y_TO);
void product_nt_cuda(const Tensor& x_TI, const Tensor& w_OI, Tensor y_TO);

/// dx [T, I] = dy [T, O] w [O, I].
void product_nn_cpu(const Tensor& dy_TO, const Tensor& w_OI, Tensor dx_TI);
void product_nn_cuda(const Tensor& dy_TO, const Tensor& w_OI, Tensor dx_TI);

/// The same, added to dx.
void add_product_nn_cpu(const Tensor& dy_TO, const Tensor& w_OI, Tensor dx_TI);
void add_product_nn_cuda(const Tensor& dy_TO, const Tensor& w_OI, Tensor dx_TI);

/// dw [O, I] += dy [T, O]ᵀ x [T, I]; dw is fp64, fp32 or bf16; the sum is made in at least fp32. With `overwrite` dw is the product itself, whatever it held.
void add_product_tn_cpu(const Tensor& dy_TO, const Tensor& x_TI, Tensor dw_OI, bool overwrite);
void add_product_tn_cuda(const Tensor& dy_TO, const Tensor& x_TI, Tensor dw_OI, bool overwrite);

/// The same three by groups of rows. Rows outside of all groups are neither read nor written.
void grouped_product_nt_cpu(const Tensor& x_RI, const RowGroups& groups, const Tensor& w_EOI, Tensor y_RO);
void grouped_product_nt_cuda(const Tensor& x_RI, const RowGroups& groups, const Tensor& w_EOI, Tensor y_RO);
void grouped_product_nn_cpu(const Tensor& dy_RO, const RowGroups& groups, const Tensor& w_EOI, Tensor dx_RI);
void grouped_product_nn_cuda(const Tensor& dy_RO, const RowGroups& groups, const Tensor& w_EOI, Tensor dx_RI);
/// With `overwrite` dw is the sum itself, zeros for a group without rows, whatever it held. Returns float64 numbers whose sum is that of dw's squares where they
/// cost nothing, else an undefined tensor.
Tensor add_grouped_product_tn_cpu(const Tensor& dy_RO, const Tensor& x_RI, const RowGroups& groups, Tensor dw_EOI, bool overwrite);
Tensor add_grouped_product_tn_cuda(const Tensor& dy_RO, const Tensor& x_RI, const RowGroups& groups, Tensor dw_EOI, bool overwrite);

/// The two products of a forward and its dx in E4M3, rows and weights as core/kernels/quantize makes them; y and dx are bf16. Without
/// offsets all rows meet the one weight. Groups on CUDA start at multiples of kGroupAlign. The CPU multiplies the numbers that the E4M3 ones
/// stand for, in fp32.
void fp8_product_nt_cpu(const QuantizedRows& x_RI, const RowGroups& groups, const QuantizedWeight& w_EOI, Tensor y_RO);
void fp8_product_nt_cuda(const QuantizedRows& x_RI, const RowGroups& groups, const QuantizedWeight& w_EOI, Tensor y_RO);
void fp8_product_nn_cpu(const QuantizedRows& dy_RO, const RowGroups& groups, const QuantizedWeight& w_EOI, Tensor dx_RI);
void fp8_product_nn_cuda(const QuantizedRows& dy_RO, const RowGroups& groups, const QuantizedWeight& w_EOI, Tensor dx_RI);

/// Dispatch by the first operand's device (linear.cpp). Throws moe::Error (device) where this build has no CUDA parts.
void product_nt(const Tensor& x_TI, const Tensor& w_OI, Tensor y_TO);
void product_nn(const Tensor& dy_TO, const Tensor& w_OI, Tensor dx_TI);
void add_product_tn(const Tensor& dy_TO, const Tensor& x_TI, Tensor dw_OI, bool overwrite = false);

/// out [M, N] = or += a [M, K] b [K, N] on the CPU: bf16 operands of any strides, fp32 sums and result. Fast where has_bf16_products().
void bf16_product(const Tensor& a_MK, const Tensor& b_KN, Tensor out_MN, bool add);
/// True: the processor check of MKL is answered by this program (mkl_switch.cpp).
bool mkl_switch_active();
}  // namespace moe::kernels
