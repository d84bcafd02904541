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
/// Factors of one step, as doubles; the kernels work in master's dtype. pull: decay of Adam; keep: 1 − lr · decay of AdamW; rate: lr / (1 − β1^t); root: 1 / sqrt(1 − β2^t).
struct AdamWRule { double scale, pull, beta1, beta2, keep, rate, root, eps; };
struct AdamW {
    int64_t n;
    Weights weights;
    Range grad, m, v;
    AdamWRule rule;
};
cudaError_t adamw(const AdamW& p, cudaStream_t stream);

/// Matrices [E, O, I], split masters, with the E4M3 copies that quantize_weight makes: q [E, O, I], transposed [E, I, O], scales [E, ceil(O / 128), ceil(I / 128)]. O and I are multiples of 16,
/// everything starts at a multiple of 16 bytes. Gradients and moments are fp32 or bf16, all matrices' alike.
struct AdamWTiles {
    void *value, *rest, *m, *v, *q, *transposed;
    const void* grad;
    float* scales;
    int out, in;
    int64_t first;                                          ///< set by adamw_tiles: tiles of 128 x 128 before it
};
constexpr int kAdamWTiles = 44;                             ///< matrices of one launch: what fits into a kernel's parameters
struct AdamWTileList {
    int count = 0;
    int64_t tiles = 0;
    AdamWTiles at[kAdamWTiles];
    /// Experts of a matrix follow each other. Not more than kAdamWTiles.
    void add(AdamWTiles matrix, int64_t experts) {
        matrix.first = tiles;
        tiles += experts * ((matrix.out + 127) / 128) * ((matrix.in + 127) / 128);
        at[count++] = matrix;
    }
};
cudaError_t adamw_tiles(const AdamWTileList& list, const AdamWRule& rule, Dtype grad, Dtype moments, cudaStream_t stream);

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
