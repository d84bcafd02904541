#include "core/kernels/dropout/dropout.h"

#include "core/kernels/common/autograd.h"
#include "core/kernels/common/dispatch.h"
#include "core/kernels/common/dtype.h"
#include "core/kernels/dropout/dropout_kernels.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <cmath>

namespace moe::kernels {
namespace {
constexpr int64_t kMostColumns = int64_t(1) << 18;       // a block of four has 16 bits of the counter

Tensor empty_draws(const char* op, int64_t R, int64_t C, const RandomRows& rows, at::ScalarType dtype, at::Device device) {
    MOE_CHECK(rows.group >= 1, usage, fmt::format("{}: rows.group", op), std::to_string(rows.group), "at least 1", "");
    MOE_CHECK(R >= 0 && C >= 0 && C <= kMostColumns, shape, op, fmt::format("{} x {}", R, C), fmt::format("at most {} columns", kMostColumns), "");
    return at::empty({R, C}, at::TensorOptions().dtype(dtype).device(device));
}

struct DropoutFunction : Function<DropoutFunction> {
    static Tensor apply_mask(const Tensor& x_RC, double p, const RandomRows& rows) {
        return (x_RC * dropout_mask(x_RC.size(0), x_RC.size(1), p, rows, wide_dtype(x_RC), x_RC.device())).to(x_RC.scalar_type());
    }
    static Tensor forward(AutogradContext* ctx, const Tensor& x_RC, double p, const RandomRows& rows) {
        ctx->saved_data["p"] = p;
        keep(ctx, "rows", rows);
        return apply_mask(x_RC, p, rows);
    }
    static Grads backward(AutogradContext* ctx, Grads grads) { return {apply_mask(grads[0], ctx->saved_data["p"].toDouble(), kept<RandomRows>(ctx, "rows")), Tensor(), Tensor()}; }
};
}  // namespace

Tensor dropout_mask(int64_t R, int64_t C, double p, const RandomRows& rows, at::ScalarType dtype, at::Device device) {
    MOE_CHECK(p >= 0 && p < 1, usage, "dropout: p", fmt::format("{}", p), "0 or more, below 1", "");
    Tensor out_RC = empty_draws("dropout", R, C, rows, dtype, device);
    if (out_RC.numel() > 0) MOE_BY_DEVICE("dropout", out_RC, dropout_mask, rows, uint32_t(std::floor(p * 0x1p32)), 1 / (1 - p), out_RC);
    return out_RC;
}

Tensor dropout(const Tensor& x_RC, double p, const RandomRows& rows) {
    check_dims("dropout", {"x", x_RC}, 2);
    check_float("dropout", {"x", x_RC});
    if (p == 0) return x_RC;
    return wants_grad(x_RC) ? DropoutFunction::apply(x_RC, p, rows) : DropoutFunction::apply_mask(x_RC, p, rows);
}

Tensor normal_rows(int64_t R, int64_t C, const RandomRows& rows, at::ScalarType dtype, at::Device device) {
    Tensor out_RC = empty_draws("normal_rows", R, C, rows, dtype, device);
    if (out_RC.numel() > 0) MOE_BY_DEVICE("normal_rows", out_RC, normal_rows, rows, out_RC);
    return out_RC;
}
}  // namespace moe::kernels
