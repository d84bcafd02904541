// Launchers of the optimizer passes, see adamw.h: flat ranges of n elements.
#pragma once
#include "core/kernels/common/sm90.h"

namespace moe::kernels::sm90 {

/// A flat range of n elements; data is null where there is none.
struct Range {
    void* data;
    Dtype dtype;
};
/// Master weights and the compute weights that follow them. Split: master holds the 16-bit rests of fp32 masters whose bf16 part is in value.
struct Weights {
    Range master, value;
    bool split;
};
/// Factors of one step, as doubles; the kernel works in master's dtype.
struct AdamW {
    int64_t n;
    Weights weights;
    Range grad, m, v;
    double scale, pull, beta1, beta2, keep, rate, root, eps;   ///< pull: decay of Adam; keep: 1 − lr · decay of AdamW; rate: lr / (1 − β1^t); root: 1 / sqrt(1 − β2^t)
};
cudaError_t adamw(const AdamW& p, cudaStream_t stream);

struct Sgd {
    int64_t n;
    Weights weights;
    Range grad, buffer;                                     ///< without a buffer momentum has no meaning
    double lr, momentum, weight_decay, scale;
};
cudaError_t sgd(const Sgd& p, cudaStream_t stream);

/// Blocks, each with its part of the sum: a function of n alone.
int sum_parts(int64_t n);
/// out (one double) = Σ x²; partial [sum_parts(n)] is scratch.
cudaError_t sum_of_squares(Range x, int64_t n, double* partial, double* out, cudaStream_t stream);

}  // namespace moe::kernels::sm90
