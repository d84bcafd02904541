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
void check_ranges(std::string_view op, const Tensor& master, const Tensor& grad, const Tensor& value) {
    check_wide_float(op, {"master", master});
    check_contiguous(op, {"master", master});
    check_state(op, master, {"grad", grad});
    if (value.defined()) check_beside(op, master, {"value", value});
}
}  // namespace

void adamw(Tensor master, const Tensor& grad, Tensor m, Tensor v, Tensor value, const AdamWOptions& options) {
    check_ranges("adamw", master, grad, value);
    check_state("adamw", master, {"m", m});
    check_state("adamw", master, {"v", v});
    check_same_dtype("adamw", {"m", m}, {"v", v});
    MOE_CHECK(options.step >= 1, usage, "adamw: step", std::to_string(options.step), "at least 1", "");
    MOE_BY_DEVICE("adamw", master, adamw, master, grad, m, v, value, options);
}

void sgd(Tensor master, const Tensor& grad, Tensor buffer, Tensor value, const SgdOptions& options) {
    check_ranges("sgd", master, grad, value);
    if (buffer.defined()) check_state("sgd", master, {"buffer", buffer});
    MOE_CHECK(buffer.defined() || options.momentum == 0, usage, "sgd: momentum", fmt::format("{} without a buffer", options.momentum), "a buffer, or momentum 0", "");
    MOE_BY_DEVICE("sgd", master, sgd, master, grad, buffer, value, options);
}

Tensor sum_of_squares(const Tensor& x) {
    check_float("sum_of_squares", {"x", x});
    Tensor flat = x.contiguous(), out = at::zeros({}, x.options().dtype(at::kDouble));
    MOE_BY_DEVICE("sum_of_squares", flat, sum_of_squares, flat, out);
    return out;
}
}  // namespace moe::kernels
