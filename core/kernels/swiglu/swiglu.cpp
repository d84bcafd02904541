#include "core/kernels/swiglu/swiglu.h"

#include "core/kernels/common/autograd.h"
#include "core/kernels/common/dispatch.h"
#include "core/kernels/swiglu/swiglu_kernels.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

namespace moe::kernels {
namespace {
Tensor swiglu_rows(const Tensor& gate_up_R2F, const Tensor& row_weight_R) {
    Tensor y_RF = at::empty({gate_up_R2F.size(0), gate_up_R2F.size(1) / 2}, gate_up_R2F.options());
    MOE_BY_DEVICE("swiglu", gate_up_R2F, swiglu_forward, gate_up_R2F, row_weight_R, y_RF);
    return y_RF;
}

struct SwiGluFunction : Function<SwiGluFunction> {
    static Tensor forward(AutogradContext* ctx, const Tensor& gate_up_R2F, const std::optional<Tensor>& row_weight_R) {
        Tensor weight = row_weight_R.value_or(Tensor());
        ctx->save_for_backward({gate_up_R2F, weight});
        return swiglu_rows(gate_up_R2F, weight);
    }
    static Grads backward(AutogradContext* ctx, Grads grads) {
        auto saved = ctx->get_saved_variables();
        Tensor gate_up_R2F = saved[0], row_weight_R = saved[1], dy_RF = grads[0].contiguous();
        Tensor dgate_up_R2F = at::empty_like(gate_up_R2F), drow_weight_R;
        if (row_weight_R.defined() && ctx->needs_input_grad(1)) drow_weight_R = at::empty_like(row_weight_R);
        MOE_BY_DEVICE("swiglu", gate_up_R2F, swiglu_backward, dy_RF, gate_up_R2F, row_weight_R, dgate_up_R2F, drow_weight_R);
        return {dgate_up_R2F, drow_weight_R};
    }
};
}  // namespace

Tensor swiglu(const Tensor& gate_up_R2F, const Tensor& row_weight_R) {
    check_dims("swiglu", {"gate_up", gate_up_R2F}, 2);
    check_float("swiglu", {"gate_up", gate_up_R2F});
    MOE_CHECK(gate_up_R2F.size(1) % 2 == 0, shape, "swiglu: gate_up", shape_text(gate_up_R2F.sizes()), "an even last dim: gate and up", "");
    Tensor x = gate_up_R2F.contiguous(), weight = row_weight_R;
    if (weight.defined()) {
        check_shape("swiglu", {"row_weight", weight}, {x.size(0)});
        check_wide_float("swiglu", {"row_weight", weight});
        check_same_device("swiglu", {"gate_up", x}, {"row_weight", weight});
        weight = weight.contiguous();
    }
    if (!wants_grad(x) && !(weight.defined() && wants_grad(weight))) return swiglu_rows(x, weight);
    return SwiGluFunction::apply(x, weight.defined() ? std::optional<Tensor>(weight) : std::nullopt);
}
}  // namespace moe::kernels
