#pragma once
#include "core/tensor/weight.h"

namespace moe::kernels {

struct AdamWOptions {
    double lr = 0, beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0;
    double grad_scale = 1;        ///< clipping (and, later, a loss scale) in the same pass
    int64_t step = 1;             ///< 1 for the first update: bias correction
};

/// One pass over flat ranges of equal length n, contiguous, on one device: master (fp32 or fp64), grad, m and v are updated in
/// place; where `value` is defined (a lower-precision copy, e.g. bf16) it becomes master rounded to its dtype. grad is left as
/// it is. Source: Loshchilov and Hutter, "Decoupled weight decay regularization", 2019.
void adamw(Tensor master, const Tensor& grad, Tensor m, Tensor v, Tensor value, const AdamWOptions& options);

/// master −= lr · (grad_scale · grad + weight_decay · master); then as above. Plain SGD, used by the parity tests and optimizer = sgd.
void sgd(Tensor master, const Tensor& grad, Tensor value, double lr, double weight_decay, double grad_scale);

/// Sum of squares of a flat range in float64 (0-d tensor, same device), deterministic for a given length.
Tensor sum_of_squares(const Tensor& x);

}  // namespace moe::kernels
