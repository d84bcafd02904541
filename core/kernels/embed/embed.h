#pragma once
#include "core/tensor/weight.h"

namespace moe::kernels {

/// Rows of the table: ids int64 [T], w.value [V, D] → [T, D]. `anchor` is any float tensor that requires grad where a
/// gradient is wanted: ids have none, and a Function without such an input has no node. Backward adds to w.grad, in token
/// order within a row on the CPU. Throws moe::Error (data) for an id outside [0, V).
Tensor embed(const Tensor& anchor, const Tensor& ids_T, const WeightPtr& w_VD);

}  // namespace moe::kernels
