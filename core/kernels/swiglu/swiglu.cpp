#include "core/kernels/swiglu/swiglu.h"

#include "core/kernels/common/autograd.h"
#include "core/kernels/common/dispatch.h"
#include "core/kernels/swiglu/swiglu_kernels.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/graph_task.h>

namespace moe::kernels {
namespace {
Tensor swiglu_rows(const Tensor& gate_up_R2F, const Tensor& row_weight_R, bool fp8) {
    Tensor y_RF = at::empty({gate_up_R2F.size(0), gate_up_R2F.size(1) / 2}, gate_up_R2F.options());
    auto copy = copy_to_fill(y_RF.size(0), y_RF.size(1), y_RF, fp8);
    MOE_BY_DEVICE("swiglu", gate_up_R2F, swiglu_forward, gate_up_R2F, row_weight_R, y_RF, copy);
    attach_rows(y_RF, copy);
    return y_RF;
}

/// Where gate_up's gradient goes: into gate_up's own memory where this backward is the last to see it, the graph being let go of and nobody but the node (and `gate_up` here) having the tensor.
/// It is the widest activation that there is. The loops read each element before they write it.
Tensor room_for_gradient(const Tensor& gate_up_R2F) {
    const bool ours = !gate_up_R2F.is_leaf() && gate_up_R2F.use_count() == 2 && gate_up_R2F.storage().use_count() == 1;
    return ours && !torch::autograd::get_current_graph_task_keep_graph() ? gate_up_R2F.detach() : at::empty_like(gate_up_R2F);
}

struct SwiGluFunction : Function<SwiGluFunction> {
    static Tensor forward(AutogradContext* ctx, const Tensor& gate_up_R2F, const std::optional<Tensor>& row_weight_R, bool fp8) {
        Tensor weight = row_weight_R.value_or(Tensor());
        ctx->save_for_backward({gate_up_R2F, weight});
        ctx->saved_data["fp8"] = fp8;
        return swiglu_rows(gate_up_R2F, weight, fp8);
    }
    static Grads backward(AutogradContext* ctx, Grads grads) {
        auto saved = ctx->get_saved_variables();
        Tensor gate_up_R2F = std::move(saved[0]), row_weight_R = saved[1], dy_RF = grads[0].contiguous();
        Tensor dgate_up_R2F = room_for_gradient(gate_up_R2F), drow_weight_R;
        if (row_weight_R.defined() && ctx->needs_input_grad(1)) drow_weight_R = at::empty_like(row_weight_R);
        auto copy = copy_to_fill(dgate_up_R2F.size(0), dgate_up_R2F.size(1), dgate_up_R2F, ctx->saved_data["fp8"].toBool());
        MOE_BY_DEVICE("swiglu", gate_up_R2F, swiglu_backward, dy_RF, gate_up_R2F, row_weight_R, dgate_up_R2F, drow_weight_R, copy);
        attach_rows(dgate_up_R2F, copy);
        return {dgate_up_R2F, drow_weight_R, Tensor()};
    }
};
}  // namespace

Tensor swiglu(const Tensor& gate_up_R2F, const Tensor& row_weight_R, bool fp8) {
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
    if (!wants_grad(x) && !(weight.defined() && wants_grad(weight))) return swiglu_rows(x, weight, fp8);
    return SwiGluFunction::apply(x, weight.defined() ? std::optional<Tensor>(weight) : std::nullopt, fp8);
}
}  // namespace moe::kernels
