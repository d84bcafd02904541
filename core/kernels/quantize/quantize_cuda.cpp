#ifdef MOE_WITH_CUDA
#include "core/kernels/common/cuda_check.h"
#include "core/kernels/quantize/fused_copy.h"

namespace moe::kernels {
namespace {
void check_16_bytes(std::string_view op, std::initializer_list<Tensor> tensors) {
    for (const Tensor& t : tensors)
        MOE_CHECK(reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0, shape, std::string(op), "data that does not start at a multiple of 16 bytes", "a multiple of 16 bytes", "clone() it");
}
}  // namespace

void quantize_rows_cuda(const Tensor& x_RK, const QuantizedRows& into, const Tensor& used) {
    MOE_CHECK(x_RK.size(1) % 8 == 0, shape, "quantize_rows: x", shape_text(x_RK.sizes()), "columns a multiple of 8", "");
    check_16_bytes("quantize_rows", {x_RK, into.q_RK, into.scale_KR});
    OnDevice on(x_RK);
    MOE_CUDA_CHECK(sm90::quantize_rows(in_pointer(x_RK), sm90_dtype("quantize_rows", x_RK), x_RK.size(0), x_RK.size(1), out_pointer(into.q_RK), into.scale_KR.mutable_data_ptr<float>(),
                                       into.scale_KR.size(1), used.defined() ? used.const_data_ptr<int>() : nullptr, on.stream));
}

void fill_copy_cuda(const Tensor& x_RK, const QuantizedRows& copy) {
    if (copy.q_RK.defined()) quantize_rows_cuda(x_RK, copy, {});
}

sm90::RowsCopy fused_copy(const QuantizedRows& copy, std::initializer_list<Tensor> rows) {
    if (!copy.q_RK.defined() || copy.q_RK.size(1) % 8) return {};
    for (const Tensor& t : rows)
        if (reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16) return {};
    return {out_pointer(copy.q_RK), copy.scale_KR.mutable_data_ptr<float>(), copy.scale_KR.size(1)};
}

void quantize_weight_cuda(const Tensor& w_EOI, const QuantizedWeight& into) {
    const int64_t E = into.q_EOI.size(0), O = into.q_EOI.size(1), I = into.q_EOI.size(2);
    MOE_CHECK(O % 16 == 0 && I % 16 == 0, shape, "quantize_weight: w", shape_text(w_EOI.sizes()), "out and in multiples of 16", "");
    check_16_bytes("quantize_weight", {w_EOI, into.q_EOI, into.q_EIO});
    OnDevice on(w_EOI);
    MOE_CUDA_CHECK(sm90::quantize_weight(in_pointer(w_EOI), sm90_dtype("quantize_weight", w_EOI), E, O, I, out_pointer(into.q_EOI), out_pointer(into.q_EIO),
                                         into.scale_EOI.mutable_data_ptr<float>(), on.stream));
}
}  // namespace moe::kernels
#endif
