// Checks, and the way to the launchers.
#ifdef MOE_WITH_CUDA
#include "core/kernels/common/cuda_check.h"
#include "core/kernels/grouped/grouped.h"
#include "core/kernels/grouped/grouped_sm90.h"

#include <ATen/ops/zeros.h>

#include <algorithm>

namespace moe::kernels {
namespace {
constexpr int64_t kBelow = int64_t(1) << 31;
static_assert(kGroupAlign == sm90::kGroupRows);

void check_on_cuda(std::string_view op, const Tensor& t) {
    MOE_CHECK(t.defined() && t.is_cuda(), device, std::string(op), t.defined() ? t.device().str() : "undefined", "a CUDA device of compute capability 9.0", "ask grouped_fits first");
}
bool from_16_bytes(const Tensor& t) { return t.is_contiguous() && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0; }

void check_grouped(std::string_view op, Named t, std::initializer_list<int64_t> sizes, std::initializer_list<at::ScalarType> dtypes, const Tensor& beside) {
    check_shape(op, t, sizes);
    check_dtype(op, t, dtypes);
    check_same_device(op, t, {"w", beside});
    check_contiguous(op, t);
    MOE_CHECK(from_16_bytes(t.tensor), shape, fmt::format("{}: {}", op, t.name), "data that does not start at a multiple of 16 bytes", "a multiple of 16 bytes", "clone() it");
}

/// Of a product with w, or with dw in its place.
sm90::GroupedShape grouped_shape(std::string_view op, Named rows_in, Named rows_out, const Tensor& offsets_E1, Named w, std::initializer_list<at::ScalarType> w_dtypes = {at::kBFloat16}) {
    check_dims(op, rows_in, 2);
    check_dims(op, w, 3);
    const int64_t R = rows_in.tensor.size(0), E = w.tensor.size(0), O = w.tensor.size(1), I = w.tensor.size(2);
    check_grouped(op, rows_in, {R, I}, {at::kBFloat16}, w.tensor);
    check_grouped(op, rows_out, {R, O}, {at::kBFloat16}, w.tensor);
    check_grouped(op, w, {E, O, I}, w_dtypes, w.tensor);
    check_shape(op, {"offsets", offsets_E1}, {E + 1});
    check_dtype(op, {"offsets", offsets_E1}, {at::kInt});
    check_same_device(op, {"offsets", offsets_E1}, w);
    check_contiguous(op, {"offsets", offsets_E1});
    MOE_CHECK(sm90::grouped_device(), device, std::string(op), w.tensor.device().str(), "a CUDA device of compute capability 9.0", "ask grouped_fits first");
    MOE_CHECK(sm90::grouped_bf16_fits(O, I), shape, fmt::format("{}: experts", op), shape_text({O, I}), "out a multiple of 128, in of 8", "ask grouped_fits first");
    MOE_CHECK(R < kBelow && E * O < kBelow && E * I < kBelow, shape, std::string(op), fmt::format("{} rows, {} experts of {}", R, E, shape_text({O, I})), "rows and experts x sizes below 2^31", "");
    return {E, R, O, I, offsets_E1.const_data_ptr<int>()};
}
}  // namespace

bool grouped_fits(const Tensor& w_EOI, const Tensor& dw_EOI) {
    auto fits = [](const Tensor& t, bool or_fp32) {
        return !t.defined() || (t.is_cuda() && t.dim() == 3 && (t.scalar_type() == at::kBFloat16 || (or_fp32 && t.scalar_type() == at::kFloat)) && from_16_bytes(t));
    };
    if (!fits(w_EOI, false) || !fits(dw_EOI, true)) return false;
    const Tensor& shape = w_EOI.defined() ? w_EOI : dw_EOI;
    if (!shape.defined() || (dw_EOI.defined() && dw_EOI.sizes() != shape.sizes())) return false;
    const int64_t E = shape.size(0), O = shape.size(1), I = shape.size(2);
    c10::cuda::CUDAGuard guard(shape.device());
    return sm90::grouped_bf16_fits(O, I) && E * std::max(O, I) < kBelow && sm90::grouped_device();
}

void grouped_nt(const Tensor& x_RI, const Tensor& offsets_E1, const Tensor& w_EOI, Tensor y_RO) {
    check_on_cuda("grouped_nt", x_RI);
    OnDevice on(x_RI);
    auto s = grouped_shape("grouped_nt", {"x", x_RI}, {"y", y_RO}, offsets_E1, {"w", w_EOI});
    MOE_CUDA_CHECK(sm90::grouped_nt_bf16(s, in_pointer(x_RI), in_pointer(w_EOI), out_pointer(y_RO), on.stream));
}

void grouped_nn(const Tensor& dy_RO, const Tensor& offsets_E1, const Tensor& w_EOI, Tensor dx_RI) {
    check_on_cuda("grouped_nn", dy_RO);
    OnDevice on(dy_RO);
    auto s = grouped_shape("grouped_nn", {"dx", dx_RI}, {"dy", dy_RO}, offsets_E1, {"w", w_EOI});
    MOE_CUDA_CHECK(sm90::grouped_nn_bf16(s, in_pointer(dy_RO), in_pointer(w_EOI), out_pointer(dx_RI), on.stream));
}

void add_grouped_tn(const Tensor& dy_RO, const Tensor& x_RI, const Tensor& offsets_E1, Tensor dw_EOI) {
    check_on_cuda("add_grouped_tn", dy_RO);
    OnDevice on(dy_RO);
    auto s = grouped_shape("add_grouped_tn", {"x", x_RI}, {"dy", dy_RO}, offsets_E1, {"dw", dw_EOI}, {at::kFloat, at::kBFloat16});
    MOE_CUDA_CHECK(sm90::add_grouped_tn_bf16(s, in_pointer(dy_RO), in_pointer(x_RI), dw_EOI.mutable_data_ptr(), sm90_dtype("add_grouped_tn", dw_EOI), on.stream));
}

Tensor grouped_tn(const Tensor& dy_RO, const Tensor& x_RI, const Tensor& offsets_E1, Tensor dw_EOI) {
    check_on_cuda("grouped_tn", dy_RO);
    OnDevice on(dy_RO);
    auto s = grouped_shape("grouped_tn", {"x", x_RI}, {"dy", dy_RO}, offsets_E1, {"dw", dw_EOI}, {at::kFloat, at::kBFloat16});
    Tensor squares = at::zeros({sm90::square_parts()}, dw_EOI.options().dtype(at::kDouble));
    MOE_CUDA_CHECK(sm90::grouped_tn_bf16(s, in_pointer(dy_RO), in_pointer(x_RI), dw_EOI.mutable_data_ptr(), sm90_dtype("grouped_tn", dw_EOI), squares.mutable_data_ptr<double>(), on.stream));
    return squares;
}

bool grouped_fp8_fits(int64_t out, int64_t in, at::Device device) {
    if (!device.is_cuda() || !sm90::grouped_fp8_fits(out, in)) return false;
    c10::cuda::CUDAGuard guard(device);
    return sm90::grouped_device();
}

namespace {
/// a [R, K] times b [E, N, K], whose scales are those of w [E, O, I]; to d [R, N].
sm90::GroupedShape fp8_shape(std::string_view op, const QuantizedRows& a, const Tensor& offsets_E1, Named b, const QuantizedWeight& w, Named d) {
    check_dims(op, {"w", w.q_EOI}, 3);
    check_dims(op, {"rows", a.q_RK}, 2);
    const int64_t R = a.q_RK.size(0), E = w.q_EOI.size(0), O = w.q_EOI.size(1), I = w.q_EOI.size(2);
    const bool transposed = b.tensor.is_same(w.q_EIO);
    const int64_t K = transposed ? O : I, N = transposed ? I : O;
    check_grouped(op, {"rows", a.q_RK}, {R, K}, {at::kFloat8_e4m3fn}, w.q_EOI);
    check_grouped(op, {"the rows' scales", a.scale_KR}, {(K + kScaleBlock - 1) / kScaleBlock, (R + 3) / 4 * 4}, {at::kFloat}, w.q_EOI);
    check_grouped(op, b, {E, N, K}, {at::kFloat8_e4m3fn}, w.q_EOI);
    check_grouped(op, {"the weight's scales", w.scale_EOI}, {E, (O + kScaleBlock - 1) / kScaleBlock, (I + kScaleBlock - 1) / kScaleBlock}, {at::kFloat}, w.q_EOI);
    check_grouped(op, d, {R, N}, {at::kBFloat16}, w.q_EOI);
    MOE_CHECK(offsets_E1.defined() || E == 1, shape, fmt::format("{}: offsets", op), fmt::format("undefined with {} experts", E), "int32 [E + 1], or one expert", "");
    if (offsets_E1.defined()) {
        check_shape(op, {"offsets", offsets_E1}, {E + 1});
        check_dtype(op, {"offsets", offsets_E1}, {at::kInt});
        check_same_device(op, {"offsets", offsets_E1}, b);
        check_contiguous(op, {"offsets", offsets_E1});
    }
    MOE_CHECK(grouped_fp8_fits(O, I, w.q_EOI.device()), shape, fmt::format("{}: experts", op), shape_text({O, I}), "multiples of 16 up to 65536 on a device of compute capability 9.0",
              "ask grouped_fp8_fits first");
    MOE_CHECK(R < kBelow && E * O < kBelow && E * I < kBelow, shape, std::string(op), fmt::format("{} rows, {} experts of {}", R, E, shape_text({O, I})), "rows and experts x sizes below 2^31", "");
    return {E, R, O, I, offsets_E1.defined() ? offsets_E1.const_data_ptr<int>() : nullptr};
}
sm90::Fp8 operand(const Tensor& q, const Tensor& scales) { return {q.const_data_ptr(), scales.const_data_ptr<float>()}; }
}  // namespace

void grouped_nt_fp8(const QuantizedRows& x_RI, const Tensor& offsets_E1, const QuantizedWeight& w_EOI, Tensor y_RO) {
    check_on_cuda("grouped_nt_fp8", x_RI.q_RK);
    OnDevice on(x_RI.q_RK);
    auto s = fp8_shape("grouped_nt_fp8", x_RI, offsets_E1, {"w", w_EOI.q_EOI}, w_EOI, {"y", y_RO});
    MOE_CUDA_CHECK(sm90::grouped_nt_fp8(s, operand(x_RI.q_RK, x_RI.scale_KR), operand(w_EOI.q_EOI, w_EOI.scale_EOI), out_pointer(y_RO), on.stream));
}

void grouped_nn_fp8(const QuantizedRows& dy_RO, const Tensor& offsets_E1, const QuantizedWeight& w_EOI, Tensor dx_RI) {
    check_on_cuda("grouped_nn_fp8", dy_RO.q_RK);
    OnDevice on(dy_RO.q_RK);
    auto s = fp8_shape("grouped_nn_fp8", dy_RO, offsets_E1, {"transposed w", w_EOI.q_EIO}, w_EOI, {"dx", dx_RI});
    MOE_CUDA_CHECK(sm90::grouped_nn_fp8(s, operand(dy_RO.q_RK, dy_RO.scale_KR), operand(w_EOI.q_EIO, w_EOI.scale_EOI), out_pointer(dx_RI), on.stream));
}
}  // namespace moe::kernels
#endif
