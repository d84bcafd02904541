#pragma once
#include "core/kernels/quantize/quantize.h"
#include "core/tensor/master.h"

#include <vector>

namespace moe::kernels {

struct AdamWOptions {
    double lr = 0, beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0;
    double grad_scale = 1;        ///< clipping and the loss scale in the same pass
    int64_t step = 1;             ///< 1 for the first update: bias correction
    bool decoupled = true;        ///< false: Adam, weight_decay · master is added to the scaled gradient instead
};

/// One pass over flat ranges of equal length n, contiguous, on one device: the master weights (fp32, fp64, or fp32 split into bf16
/// weights and the rest), m and v are updated in place; where master.value is defined (bf16, fp16) it becomes the master as rounded()
/// does (split: to bf16 by Master's rule, else to nearest even). grad is left as it is.
/// grad, m and v may be bf16: arithmetic is in the master's dtype, and what is stored is rounded to nearest, not stochastically.
/// Source: Loshchilov and Hutter, "Decoupled weight decay regularization", 2019; Kingma and Ba, "Adam", 2015.
void adamw(const Master& master, const Tensor& grad, Tensor m, Tensor v, const AdamWOptions& options);

/// A matrix [O, I], or one for each of E experts, whose products read E4M3: ranges as in adamw of E · O · I elements, and the copies to fill.
struct AdamWMatrix {
    Master master;
    Tensor grad, m, v;
    QuantizedWeight copy;
};
/// adamw of each, and into its copies what quantize_weight makes of its new compute weights, bit for bit. On CUDA, where masters are split, gradients all of one dtype (fp32 or bf16) and moments too,
/// it is one pass over all of them, which writes the copies' 2 bytes more a parameter; O and I are multiples of 16 there.
void adamw_quantized(const std::vector<AdamWMatrix>& matrices, const AdamWOptions& options);

struct SgdOptions {
    double lr = 0, momentum = 0, weight_decay = 0;
    double grad_scale = 1;        ///< as in AdamWOptions
};

/// d = grad_scale · grad + weight_decay · master; with a `buffer` (fp64, fp32 or bf16; zeros before the first step) d = buffer =
/// momentum · buffer + d; master −= lr · d; dtypes and rounding as above. An undefined buffer wants momentum 0.
/// Source: torch.optim.SGD without dampening, whose first buffer is the first d.
void sgd(const Master& master, const Tensor& grad, Tensor buffer, const SgdOptions& options);

/// Sum of squares of a flat range in float64 (0-d tensor, same device), deterministic for a given length.
Tensor sum_of_squares(const Tensor& x);

}  // namespace moe::kernels
