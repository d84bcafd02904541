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
void check_ranges(std::string_view op, const Tensor& master, const Tensor& grad, const Tensor& value) {
    check_wide_float(op, {"master", master});
    check_contiguous(op, {"master", master});
    check_beside(op, master, {"grad", grad});
    if (value.defined()) check_beside(op, master, {"value", value});
}
}  // namespace

void adamw(Tensor master, const Tensor& grad, Tensor m, Tensor v, Tensor value, const AdamWOptions& options) {
    check_ranges("adamw", master, grad, value);
    check_beside("adamw", master, {"m", m});
    check_beside("adamw", master, {"v", v});
    check_same_dtype("adamw", {"m", m}, {"v", v});
    MOE_CHECK(options.step >= 1, usage, "adamw: step", std::to_string(options.step), "at least 1", "");
    MOE_BY_DEVICE("adamw", master, adamw, master, grad, m, v, value, options);
}

void sgd(Tensor master, const Tensor& grad, Tensor value, double lr, double weight_decay, double grad_scale) {
    check_ranges("sgd", master, grad, value);
    MOE_BY_DEVICE("sgd", master, sgd, master, grad, value, lr, weight_decay, grad_scale);
}

Tensor sum_of_squares(const Tensor& x) {
    check_float("sum_of_squares", {"x", x});
    Tensor flat = x.contiguous(), out = at::zeros({}, x.options().dtype(at::kDouble));
    MOE_BY_DEVICE("sum_of_squares", flat, sum_of_squares, flat, out);
    return out;
}
}  // namespace moe::kernels
