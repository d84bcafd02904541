// Muon: steps along the orthogonalised momentum of matrices. Letters: N matrices of one shape, R rows, C columns.
#pragma once
#include "core/tensor/master.h"

#include <functional>

namespace moe::kernels {

/// Each matrix of g [N, R, C] divided by its Frobenius norm (at least 1e-7), then five steps X ← aX + (bA + cA²)X with A = XXᵀ and
/// (a, b, c) = (3.4445, −4.7750, 2.0315): singular values end near 1 (0.68 … 1.13), directions stay. Matrices with more rows
/// than columns are transposed for it. Norms are taken in at least fp32, products in `dtype` (fp64, fp32 or bf16), which the
/// result has. A matrix of zeros stays one. Throws moe::Error: shape, dtype.
/// Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024.
Tensor newton_schulz(const Tensor& g_NRC, at::ScalarType dtype);

struct MuonOptions {
    double lr = 0, momentum = 0.95, weight_decay = 0;
    double grad_scale = 1;                    ///< clipping and the loss scale
    at::ScalarType products = at::kFloat;     ///< dtype of Newton–Schulz
    /// Where the views are parts of larger matrices (tensor parallel): the whole of what the ranks have of an [N, R, C], and this
    /// rank's part of a whole. Both or neither.
    std::function<Tensor(const Tensor&)> whole, part;
};

/// One step of N matrices, views [N, R, C], contiguous, on one device: buffer = momentum · buffer + grad_scale · grad;
/// u = newton_schulz(grad_scale · grad + momentum · buffer); master −= lr · (0.2 · sqrt(max(R, C)) · u + weight_decay · master),
/// with u, R and C of the whole matrices where the views are parts of them. The factor gives u the size of an AdamW step, so that
/// AdamW's learning rate and decay carry over.
/// Masters fp32, fp64 or split (then joined for the call), grad and buffer fp64, fp32 or bf16 (rounded to nearest); master.value follows.
/// Throws moe::Error: shape, dtype, device, internal (`whole` without `part`). Source: Liu et al., "Muon is scalable for LLM training", 2502.16982.
void muon(const Master& master_NRC, const Tensor& grad_NRC, Tensor buffer_NRC, const MuonOptions& options);

}  // namespace moe::kernels
