// Raw entry points of the quantisers: checked tensors of one device.
#pragma once
#include "core/kernels/quantize/quantize.h"
#include "core/tensor/check.h"

namespace moe::kernels {
void quantize_rows_cpu(const Tensor& x_RK, const QuantizedRows& into, const Tensor& used);
void quantize_rows_cuda(const Tensor& x_RK, const QuantizedRows& into, const Tensor& used);
/// quantize_rows of all rows into a copy that may be undefined: then nothing.
void fill_copy_cpu(const Tensor& x_RK, const QuantizedRows& copy);
void fill_copy_cuda(const Tensor& x_RK, const QuantizedRows& copy);
/// Throws moe::Error (shape, dtype, device) unless `into` is fit for w's [E, O, I].
void check_quantized_weight(std::string_view op, Named w, int64_t E, int64_t O, int64_t I, const QuantizedWeight& into);
void quantize_weight_cpu(const Tensor& w_EOI, const QuantizedWeight& into);
void quantize_weight_cuda(const Tensor& w_EOI, const QuantizedWeight& into);
}  // namespace moe::kernels
