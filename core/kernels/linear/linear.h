// The linear door: the only trainable matrix products. Precision (fp64, fp32, bf16, fp16 compute; fp64, fp32 or bf16 main gradients),
// accumulation into main gradients and deferred weight gradients live here, once.
// Letters: T tokens, R rows sorted by expert, I in, O out, E experts of this rank.
#pragma once
#include "core/kernels/common/row_groups.h"
#include "core/tensor/weight.h"

namespace moe::kernels {

/// y = x wᵀ. x [T, I] and w.value [O, I] of one dtype (fp64, fp32, bf16, fp16; CPU or CUDA) → y [T, O] of that dtype, accumulated
/// in at least fp32. Where w.is_fp8 and x is bf16, y and dx are products of E4M3 numbers (kernels/quantize: x and dy by 1 x 128, w by
/// 128 x 128), the weight's gradient is bf16's. Backward: dx in x's dtype; w.grad += dyᵀ x through w.sink, added in w.grad's dtype, for bf16 in fp32 and then rounded.
/// Throws moe::Error: shape, dtype, device.
Tensor linear(const Tensor& x_TI, const WeightPtr& w_OI);

/// {x w₀ᵀ, x w₁ᵀ, …}: as linear with each weight. dx is added up by the products themselves, rounded after each.
std::vector<Tensor> linears(const Tensor& x_TI, const std::vector<WeightPtr>& weights);

/// As linear, for the router: w.value is kept in fp32 or fp64 and the result has w's dtype, whatever x's is. With x in bf16
/// or fp16 the product reads x as rounded and w in fp32. T may be 0.
Tensor linear_wide(const Tensor& x_TI, const WeightPtr& w_OI);

/// As linear_wide, computed in fp64 whatever the types are: y [T, O] fp64, and the weight's gradient is rounded once, to w.grad's dtype.
Tensor linear_fp64(const Tensor& x_TI, const WeightPtr& w_OI);

/// Rows of group e of x go through w[e]. x [R, I], w.value [E, O, I]; any expert may have no rows, R may be 0. → y [R, O].
/// Gradients as in linear, by expert. Offsets on the host end with R and are checked. Offsets on the device (CUDA only) are not read by
/// the host: they must ascend and end at R or below; rows after the last group are left unwritten, and in gradients unread. On CUDA in
/// bf16 all groups are one launch; in other dtypes experts go one by one, which copies the offsets to the host.
/// Throws moe::Error: shape, dtype, device.
Tensor grouped_linear(const Tensor& x_RI, const RowGroups& groups, const WeightPtr& w_EOI);

/// Makes the E4M3 copies that products with w read anew where w's values have changed since. What no such product has read yet has none and gets none.
void refresh_fp8(const WeightPtr& w);

/// The alignment that grouped_linear is quickest with on this device and dtype: what sort_by_expert is given. 1 on a CPU.
int64_t grouped_alignment(at::Device device, at::ScalarType dtype);

/// Whether this processor multiplies bf16 (AVX-512 bf16, AMX); else bf16 operands are cast up and multiplied in fp32.
bool has_bf16_products();
}  // namespace moe::kernels
