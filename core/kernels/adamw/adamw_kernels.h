// Raw entry points of the optimizer passes: checked, contiguous tensors of one device. Contracts as in adamw.h.
#pragma once
#include "core/kernels/adamw/adamw.h"

namespace moe::kernels {

void adamw_cpu(const Master& master, const Tensor& grad, Tensor m, Tensor v, const AdamWOptions& options);
void adamw_cuda(const Master& master, const Tensor& grad, Tensor m, Tensor v, const AdamWOptions& options);

void adamw_quantized_cpu(const std::vector<AdamWMatrix>& matrices, const AdamWOptions& options);
void adamw_quantized_cuda(const std::vector<AdamWMatrix>& matrices, const AdamWOptions& options);
/// The same as two passes: for what the one pass does not take.
void adamw_quantized_apart(const AdamWMatrix& matrix, const AdamWOptions& options);

void sgd_cpu(const Master& master, const Tensor& grad, Tensor buffer, const SgdOptions& options);
void sgd_cuda(const Master& master, const Tensor& grad, Tensor buffer, const SgdOptions& options);

/// out: 0-d float64 on x's device.
void sum_of_squares_cpu(const Tensor& x, Tensor out);
void sum_of_squares_cuda(const Tensor& x, Tensor out);
}  // namespace moe::kernels
