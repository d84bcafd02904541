// Checks and the CPU's implementation; CUDA tensors go to quantize_cuda.cpp.
#include "core/kernels/quantize/quantize.h"

#include "core/kernels/quantize/quantize_kernels.h"
#include "core/tensor/check.h"

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/record_function.h>
#include <c10/util/Float8_e4m3fn.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace moe::kernels {
namespace {
using Fp8 = c10::Float8_e4m3fn;
int64_t blocks_of(int64_t n) { return (n + kScaleBlock - 1) / kScaleBlock; }

struct Scale { float scale, inverse; };
/// The largest |value| with NaN above all.
float larger(float largest, float x) { return std::isnan(largest) || std::fabs(x) <= largest ? largest : std::fabs(x); }
Scale scale_of(float largest) {
    const float scale = largest < 0x1p-100f ? 1.f : largest / 448.f;
    return {scale, 1.f / scale};
}
Fp8 rounded(float x, float inverse) { return Fp8(std::clamp(x * inverse, -448.f, 448.f)); }

void check_input(std::string_view op, Named x) {
    check_dtype(op, x, {at::kBFloat16, at::kFloat});
    check_contiguous(op, x);
}
void check_output(std::string_view op, Named q, std::initializer_list<int64_t> sizes, at::ScalarType dtype, Named x) {
    check_shape(op, q, sizes);
    check_dtype(op, q, {dtype});
    check_contiguous(op, q);
    check_same_device(op, q, x);
}
}  // namespace

void check_quantized_weight(std::string_view op, Named w, int64_t E, int64_t O, int64_t I, const QuantizedWeight& into) {
    check_output(op, {"q", into.q_EOI}, {E, O, I}, at::kFloat8_e4m3fn, w);
    check_output(op, {"transposed q", into.q_EIO}, {E, I, O}, at::kFloat8_e4m3fn, w);
    check_output(op, {"scale", into.scale_EOI}, {E, blocks_of(O), blocks_of(I)}, at::kFloat, w);
}

QuantizedRows empty_quantized_rows(int64_t rows, int64_t columns, const Tensor& like) {
    auto options = at::TensorOptions().device(like.device());
    return {at::empty({rows, columns}, options.dtype(at::kFloat8_e4m3fn)), at::empty({blocks_of(columns), (rows + 3) / 4 * 4}, options.dtype(at::kFloat))};
}
QuantizedWeight empty_quantized_weight(int64_t experts, int64_t out, int64_t in, const Tensor& like) {
    auto options = at::TensorOptions().device(like.device());
    return {at::empty({experts, out, in}, options.dtype(at::kFloat8_e4m3fn)), at::empty({experts, in, out}, options.dtype(at::kFloat8_e4m3fn)),
            at::empty({experts, blocks_of(out), blocks_of(in)}, options.dtype(at::kFloat))};
}

void quantize_rows_cpu(const Tensor& x_RK, const QuantizedRows& into, const Tensor& used) {
    const int64_t R = used.defined() ? std::clamp<int64_t>(*used.const_data_ptr<int>(), 0, x_RK.size(0)) : x_RK.size(0), K = x_RK.size(1), pitch = into.scale_KR.size(1);
    Tensor wide = x_RK.to(at::kFloat);
    const float* x = wide.const_data_ptr<float>();
    Fp8* q = into.q_RK.mutable_data_ptr<Fp8>();
    float* scales = into.scale_KR.mutable_data_ptr<float>();
    at::parallel_for(0, R, 16, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r)
            for (int64_t first = 0; first < K; first += kScaleBlock) {
                const int64_t last = std::min(first + kScaleBlock, K);
                float largest = 0;
                for (int64_t k = first; k < last; ++k) largest = larger(largest, x[r * K + k]);
                const Scale s = scale_of(largest);
                scales[first / kScaleBlock * pitch + r] = s.scale;
                for (int64_t k = first; k < last; ++k) q[r * K + k] = rounded(x[r * K + k], s.inverse);
            }
    });
}

void quantize_weight_cpu(const Tensor& w_EOI, const QuantizedWeight& into) {
    const int64_t E = into.q_EOI.size(0), O = into.q_EOI.size(1), I = into.q_EOI.size(2), o_blocks = blocks_of(O), i_blocks = blocks_of(I);
    Tensor wide = w_EOI.to(at::kFloat);
    const float* w = wide.const_data_ptr<float>();
    Fp8 *q = into.q_EOI.mutable_data_ptr<Fp8>(), *transposed = into.q_EIO.mutable_data_ptr<Fp8>();
    float* scales = into.scale_EOI.mutable_data_ptr<float>();
    at::parallel_for(0, E * o_blocks * i_blocks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t tile = begin; tile < end; ++tile) {
            const int64_t expert = tile / (o_blocks * i_blocks) * O * I, o0 = tile / i_blocks % o_blocks * kScaleBlock, i0 = tile % i_blocks * kScaleBlock;
            const int64_t o1 = std::min(o0 + kScaleBlock, O), i1 = std::min(i0 + kScaleBlock, I);
            float largest = 0;
            for (int64_t o = o0; o < o1; ++o)
                for (int64_t i = i0; i < i1; ++i) largest = larger(largest, w[expert + o * I + i]);
            const Scale s = scale_of(largest);
            scales[tile] = s.scale;
            for (int64_t o = o0; o < o1; ++o)
                for (int64_t i = i0; i < i1; ++i) q[expert + o * I + i] = transposed[expert + i * O + o] = rounded(w[expert + o * I + i], s.inverse);
        }
    });
}

void fill_copy_cpu(const Tensor& x_RK, const QuantizedRows& copy) {
    if (copy.q_RK.defined()) quantize_rows_cpu(x_RK, copy, {});
}

void quantize_rows(const Tensor& x_RK, QuantizedRows into, const Tensor& used) {
    RECORD_FUNCTION("moe::quantize_rows", std::vector<c10::IValue>());              // in a profile: rows that are read once more
    check_dims("quantize_rows", {"x", x_RK}, 2);
    check_input("quantize_rows", {"x", x_RK});
    const int64_t R = x_RK.size(0), K = x_RK.size(1);
    check_output("quantize_rows", {"q", into.q_RK}, {R, K}, at::kFloat8_e4m3fn, {"x", x_RK});
    check_output("quantize_rows", {"scale", into.scale_KR}, {blocks_of(K), (R + 3) / 4 * 4}, at::kFloat, {"x", x_RK});
    if (used.defined()) {
        check_dtype("quantize_rows", {"used", used}, {at::kInt});
        check_same_device("quantize_rows", {"used", used}, {"x", x_RK});
        MOE_CHECK(used.numel() == 1, shape, "quantize_rows: used", shape_text(used.sizes()), "one element", "");
    }
    if (x_RK.is_cuda()) quantize_rows_cuda(x_RK, into, used);
    else quantize_rows_cpu(x_RK, into, used);
}

void quantize_weight(const Tensor& w_EOI, QuantizedWeight into) {
    MOE_CHECK(w_EOI.defined() && (w_EOI.dim() == 2 || w_EOI.dim() == 3), shape, "quantize_weight: w", w_EOI.defined() ? shape_text(w_EOI.sizes()) : "undefined", "[E, O, I] or [O, I]", "");
    check_input("quantize_weight", {"w", w_EOI});
    const int64_t E = w_EOI.dim() == 3 ? w_EOI.size(0) : 1, O = w_EOI.size(-2), I = w_EOI.size(-1);
    check_quantized_weight("quantize_weight", {"w", w_EOI}, E, O, I, into);
    if (w_EOI.is_cuda()) quantize_weight_cuda(w_EOI, into);
    else quantize_weight_cpu(w_EOI, into);
}

Tensor dequantize_rows(const QuantizedRows& x) {
    const int64_t R = x.q_RK.size(0), K = x.q_RK.size(1);
    Tensor scales = x.scale_KR.narrow(1, 0, R).t().repeat_interleave(kScaleBlock, 1).narrow(1, 0, K);
    return x.q_RK.to(at::kFloat).mul_(scales);
}
Tensor dequantize_weight(const QuantizedWeight& w) {
    const int64_t O = w.q_EOI.size(1), I = w.q_EOI.size(2);
    Tensor scales = w.scale_EOI.repeat_interleave(kScaleBlock, 1).narrow(1, 0, O).repeat_interleave(kScaleBlock, 2).narrow(2, 0, I);
    return w.q_EOI.to(at::kFloat).mul_(scales);
}

#ifndef MOE_WITH_CUDA
void quantize_rows_cuda(const Tensor& x, const QuantizedRows&, const Tensor&) { MOE_THROW(device, "quantize_rows", x.device().str(), "a CPU tensor: this build has no CUDA parts", ""); }
void fill_copy_cuda(const Tensor& x, const QuantizedRows&) { quantize_rows_cuda(x, {}, {}); }
void quantize_weight_cuda(const Tensor& w, const QuantizedWeight&) { MOE_THROW(device, "quantize_weight", w.device().str(), "a CPU tensor: this build has no CUDA parts", ""); }
#endif
}  // namespace moe::kernels
