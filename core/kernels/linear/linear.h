// The linear door: the only trainable matrix products. Precision (fp64, fp32, bf16, fp16 compute; fp64, fp32 or bf16 main gradients),
// accumulation into main gradients and deferred weight gradients live here, once.
// Letters: T tokens, R rows sorted by expert, I in, O out, E experts of this rank.
#pragma once
#include "core/tensor/weight.h"

namespace moe::kernels {

/// y = x wᵀ. x [T, I] and w.value [O, I] of one dtype (fp64, fp32, bf16, fp16; CPU or CUDA) → y [T, O] of that dtype, accumulated
/// in at least fp32. Backward: dx in x's dtype; w.grad += dyᵀ x through w.sink, added in w.grad's dtype, for bf16 in fp32 and then rounded.
/// Throws moe::Error: shape, dtype, device.
Tensor linear(const Tensor& x_TI, const WeightPtr& w_OI);

/// As linear, for the router: w.value is kept in fp32 or fp64 and the result has w's dtype, whatever x's is. With x in bf16
/// or fp16 the product reads x as rounded and w in fp32. T may be 0.
Tensor linear_wide(const Tensor& x_TI, const WeightPtr& w_OI);

/// As linear_wide, computed in fp64 whatever the types are: y [T, O] fp64, and the weight's gradient is rounded once, to w.grad's dtype.
Tensor linear_fp64(const Tensor& x_TI, const WeightPtr& w_OI);

/// Rows offsets[e] … offsets[e+1] of x go through w[e]. x [R, I], w.value [E, O, I], offsets int64 [E + 1] on the host,
/// offsets[0] = 0 and offsets[E] = R; any expert may have no rows, R may be 0. → y [R, O]. Gradients as in linear, by expert.
/// On CUDA in bf16 the whole group is one launch; in other dtypes experts go one by one. Throws moe::Error: shape, dtype, device.
Tensor grouped_linear(const Tensor& x_RI, const Tensor& offsets_E1, const WeightPtr& w_EOI);

}  // namespace moe::kernels
