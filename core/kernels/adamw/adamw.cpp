#include "core/kernels/adamw/adamw.h"

#include "core/kernels/adamw/adamw_kernels.h"
#include "core/kernels/common/dispatch.h"
#include "core/kernels/quantize/quantize_kernels.h"

#include <ATen/ops/zeros.h>

namespace moe::kernels {
namespace {
/// A flat range beside master: same length and device, contiguous.
void check_beside(std::string_view op, const Tensor& master, Named range) {
    check_float(op, range);
    check_same_device(op, {"master", master}, range);
    check_contiguous(op, range);
    MOE_CHECK(range.tensor.numel() == master.numel(), shape, fmt::format("{}: {}", op, range.name), fmt::format("{} elements", range.tensor.numel()),
              fmt::format("{}, as master", master.numel()), "");
}
void check_state(std::string_view op, const Tensor& master, Named range) {
    check_beside(op, master, range);
    check_main_float(op, range);
}
void check_ranges(std::string_view op, const Master& master, const Tensor& grad) {
    check_dtype(op, {"master", master.data}, {at::kFloat, at::kDouble, at::kShort});
    check_contiguous(op, {"master", master.data});
    check_state(op, master.data, {"grad", grad});
    if (master.value.defined() || master.is_split()) check_beside(op, master.data, {"value", master.value});
    if (master.is_split()) check_dtype(op, {"value of a split master", master.value}, {at::kBFloat16});
}
void check_adamw(const Master& master, const Tensor& grad, const Tensor& m, const Tensor& v, const AdamWOptions& options) {
    check_ranges("adamw", master, grad);
    check_state("adamw", master.data, {"m", m});
    check_state("adamw", master.data, {"v", v});
    check_same_dtype("adamw", {"m", m}, {"v", v});
    MOE_CHECK(options.step >= 1, usage, "adamw: step", std::to_string(options.step), "at least 1", "");
}
/// What is quantised.
const Tensor& weights_of(const Master& master) { return master.value.defined() ? master.value : master.data; }
void check_copy(std::string_view op, const AdamWMatrix& a) {
    const Tensor& w = weights_of(a.master);
    check_dtype(op, {"weights", w}, {at::kBFloat16, at::kFloat});
    check_dims(op, {"q", a.copy.q_EOI}, 3);
    check_quantized_weight(op, {"weights", w}, a.copy.q_EOI.size(0), a.copy.q_EOI.size(1), a.copy.q_EOI.size(2), a.copy);
    MOE_CHECK(a.copy.q_EOI.numel() == w.numel(), shape, fmt::format("{}: q", op), shape_text(a.copy.q_EOI.sizes()), fmt::format("{} elements, as master", w.numel()), "");
}
}  // namespace

void adamw(const Master& master, const Tensor& grad, Tensor m, Tensor v, const AdamWOptions& options) {
    check_adamw(master, grad, m, v, options);
    MOE_BY_DEVICE("adamw", master.data, adamw, master, grad, m, v, options);
}

void adamw_quantized(const std::vector<AdamWMatrix>& matrices, const AdamWOptions& options) {
    if (matrices.empty()) return;
    for (const AdamWMatrix& a : matrices) {
        check_adamw(a.master, a.grad, a.m, a.v, options);
        check_same_device("adamw_quantized", {"the first master", matrices[0].master.data}, {"master", a.master.data});
        check_copy("adamw_quantized", a);
    }
    MOE_BY_DEVICE("adamw_quantized", matrices[0].master.data, adamw_quantized, matrices, options);
}

void adamw_quantized_apart(const AdamWMatrix& a, const AdamWOptions& options) {
    adamw(a.master, a.grad, a.m, a.v, options);
    quantize_weight(weights_of(a.master).view(a.copy.q_EOI.sizes()), a.copy);
}
void adamw_quantized_cpu(const std::vector<AdamWMatrix>& matrices, const AdamWOptions& options) {
    for (const AdamWMatrix& a : matrices) adamw_quantized_apart(a, options);
}

void sgd(const Master& master, const Tensor& grad, Tensor buffer, const SgdOptions& options) {
    check_ranges("sgd", master, grad);
    if (buffer.defined()) check_state("sgd", master.data, {"buffer", buffer});
    MOE_CHECK(buffer.defined() || options.momentum == 0, usage, "sgd: momentum", fmt::format("{} without a buffer", options.momentum), "a buffer, or momentum 0", "");
    MOE_BY_DEVICE("sgd", master.data, sgd, master, grad, buffer, options);
}

Tensor sum_of_squares(const Tensor& x) {
    check_float("sum_of_squares", {"x", x});
    Tensor flat = x.contiguous(), out = at::zeros({}, x.options().dtype(at::kDouble));
    MOE_BY_DEVICE("sum_of_squares", flat, sum_of_squares, flat, out);
    return out;
}
}  // namespace moe::kernels
