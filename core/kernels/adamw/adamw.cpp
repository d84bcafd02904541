#include "core/kernels/adamw/adamw.h"

#include "core/kernels/adamw/adamw_kernels.h"
#include "core/kernels/common/dispatch.h"

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
}  // namespace

void adamw(const Master& master, const Tensor& grad, Tensor m, Tensor v, const AdamWOptions& options) {
    check_ranges("adamw", master, grad);
    check_state("adamw", master.data, {"m", m});
    check_state("adamw", master.data, {"v", v});
    check_same_dtype("adamw", {"m", m}, {"v", v});
    MOE_CHECK(options.step >= 1, usage, "adamw: step", std::to_string(options.step), "at least 1", "");
    MOE_BY_DEVICE("adamw", master.data, adamw, master, grad, m, v, options);
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
