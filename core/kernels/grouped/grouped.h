// Products by groups of rows whose sizes are known on the device only, on Hopper: what grouped_linear does with offsets on the host, without waiting for them.
// No autograd, no weights with sinks. Letters: R rows as allocated, E experts, I in, O out. Every tensor is contiguous, bf16 unless said, on one device.
// offsets is int32 [E + 1] on the device, offsets[0] = 0: rows offsets[e] … offsets[e+1] belong to w[e]. Each is a multiple of kGroupAlign, none is above R;
// the caller fills groups up with rows of zeros, and nothing checks the values. Rows from offsets[E] on are neither read nor written.
// All throw moe::Error: shape, dtype, device, and device where grouped_fits is false.
#pragma once
#include "core/kernels/quantize/quantize.h"

#include <ATen/core/Tensor.h>

namespace moe::kernels {
using at::Tensor;

/// What groups are a multiple of, in rows.
constexpr int64_t kGroupAlign = 128;

/// Whether the products take experts with this weight [E, O, I] and this main gradient (either may be undefined: is not looked at): bf16, and fp32 or bf16, on a device of compute capability 9.0,
/// O a multiple of 128, I of 8, both contiguous from a multiple of 16 bytes on. Cheap: to be asked before every step. False in builds without CUDA parts.
bool grouped_fits(const Tensor& w_EOI, const Tensor& dw_EOI = {});

/// y [R, O] = x [R, I] w[e] [O, I]ᵀ, summed in fp32 and rounded once. A row's result depends on that row and its expert only.
void grouped_nt(const Tensor& x_RI, const Tensor& offsets_E1, const Tensor& w_EOI, Tensor y_RO);
/// dx [R, I] = dy [R, O] w[e] [O, I], the same.
void grouped_nn(const Tensor& dy_RO, const Tensor& offsets_E1, const Tensor& w_EOI, Tensor dx_RI);
/// dw [E, O, I] fp32 or bf16 (summed in fp32, rounded once) += dy [R, O]ᵀ x [R, I] over the rows of each expert; an expert without rows keeps its dw. The same bits every time.
void add_grouped_tn(const Tensor& dy_RO, const Tensor& x_RI, const Tensor& offsets_E1, Tensor dw_EOI);
/// dw = dyᵀ x instead: what a step's first micro-batch needs, so that nothing clears dw before and nothing reads it. An expert without rows gets zeros.
/// Returns float64 numbers whose sum is that of dw's squares, each made in fp32 over a tile: a gradient norm need not read dw again. The same bits every time on one kind of device.
Tensor grouped_tn(const Tensor& dy_RO, const Tensor& x_RI, const Tensor& offsets_E1, Tensor dw_EOI);

/// Whether the products in E4M3 below take experts of [out, in] on this device: compute capability 9.0, both multiples of 16 and at most 65536. False in builds without CUDA parts.
bool grouped_fp8_fits(int64_t out, int64_t in, at::Device device);

/// y [R, O] bf16 = x [R, I] w[e] [O, I]ᵀ from what quantize_rows and quantize_weight wrote, every 128 products added up in fp32. offsets may be undefined with one expert:
/// all R rows, R being anything.
void grouped_nt_fp8(const QuantizedRows& x_RI, const Tensor& offsets_E1, const QuantizedWeight& w_EOI, Tensor y_RO);
/// dx [R, I] bf16 = dy [R, O] w[e] [O, I], the same.
void grouped_nn_fp8(const QuantizedRows& dy_RO, const Tensor& offsets_E1, const QuantizedWeight& w_EOI, Tensor dx_RI);

}  // namespace moe::kernels
