// E4M3 with scales, as DeepSeek-V3 trains: rows of activations and of their gradients by 1 x 128, weights by 128 x 128. Value = q x scale, scale = largest |value| of
// the block / 448. A block whose largest value is below 2^-100 becomes zeros with a scale of 1. A block with a NaN or an infinity has a scale of NaN or infinity, and
// every product with it is NaN.
// Letters: R rows, K columns, E experts, O out, I in. Everything is contiguous, q of dtype Float8_e4m3fn, scales fp32. CPU and CUDA give the same bits.
// All throw moe::Error: shape, dtype, device. Source: DeepSeek-V3 technical report 3.3.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>

namespace moe::kernels {
using at::Tensor;

/// Columns of a row that share a scale; a weight's rows and columns that do.
constexpr int64_t kScaleBlock = 128;

/// Rows [R, K] by 1 x 128. The scales of one block of columns lie together, as the products read them: [ceil(K / 128), R rounded up to 4], the last few not set.
struct QuantizedRows { Tensor q_RK, scale_KR; };
/// Weights [E, O, I] by 128 x 128, [E, ceil(O / 128), ceil(I / 128)] scales, and the same numbers transposed for the product with the output's gradient. A weight without
/// experts has E = 1.
struct QuantizedWeight { Tensor q_EOI, q_EIO, scale_EOI; };

/// Not yet set, on `like`'s device.
QuantizedRows empty_quantized_rows(int64_t rows, int64_t columns, const Tensor& like);
QuantizedWeight empty_quantized_weight(int64_t experts, int64_t out, int64_t in, const Tensor& like);

/// x [R, K] bf16 or fp32. `used`: int32 on x's device, of one element, how many rows count: the rest may stay as they are; undefined: all. On CUDA K is a multiple of 8.
void quantize_rows(const Tensor& x_RK, QuantizedRows into, const Tensor& used = {});
/// w [E, O, I] or [O, I], bf16 or fp32, read once. On CUDA O and I are multiples of 16.
void quantize_weight(const Tensor& w_EOI, QuantizedWeight into);

/// An E4M3 copy [R, K] to fill for rows like `like`, or an undefined one: where it is not wanted and for rows that are not bf16, whose products are not in E4M3.
QuantizedRows copy_to_fill(int64_t rows, int64_t columns, const Tensor& like, bool wanted);
/// Gives x its E4M3 copy, for the first `readers` products that take x. An undefined copy does nothing. What makes the rows calls this, so that products need not read them again. The
/// copy goes with x where autograd passes it on and with x.detach(), whose products count as x's; not with views.
void attach_rows(const Tensor& x_RK, QuantizedRows copy, int readers = 1);
/// `to`, a view of all of x such as autograd makes of an input that is also an output, carries the copy of x, too: one copy, whose readers are counted together.
void pass_rows(const Tensor& x_RK, const Tensor& to_RK);
/// The copy that x carries, unless x was changed in place since; the last reader takes it away, so that it does not live as long as an x that is kept for backward. A kernel that
/// changes rows in place behind autograd's back must not be given any that carry a copy.
std::optional<QuantizedRows> take_rows(const Tensor& x_RK);

/// The values in fp32.
Tensor dequantize_rows(const QuantizedRows& x);
Tensor dequantize_weight(const QuantizedWeight& w);
}  // namespace moe::kernels
