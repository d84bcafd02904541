// Gradients of weights for kernels called alone. In a model a weight's gradient goes to its main gradient, beside the graph; here a weight is a tensor like any other. So a call
// whose weights want gradients is a node that runs the kernel again in backward, with main gradients of its own, and hands those on.
#include "core/kernels/common/autograd.h"
#include "lua/bind/kernels.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>

namespace moe::lua {
namespace {
using at::Tensor;
using Tensors = std::vector<Tensor>;
using torch::autograd::AutogradContext;

WeightPtr weight_of(const CallWeight& from, const Tensor& value) {
    auto w = c10::make_intrusive<Weight>();
    w->value = value.detach().contiguous();
    w->name = from.name;
    w->is_fp8 = from.is_fp8;
    return w;
}

struct Plan {
    size_t num_inputs;
    std::vector<CallWeight> weights;
    KernelCall call;
};

struct WeightedKernel : torch::autograd::Function<WeightedKernel> {
    static Tensors forward(AutogradContext* ctx, const Plan& plan, at::TensorList all) {
        Tensors inputs(all.begin(), all.begin() + long(plan.num_inputs));
        std::vector<WeightPtr> weights;
        for (size_t i = 0; i < plan.weights.size(); ++i) weights.push_back(weight_of(plan.weights[i], all[plan.num_inputs + i]));
        ctx->save_for_backward(all.vec());
        kernels::keep(ctx, "plan", plan);
        Tensors outputs = plan.call(inputs, weights), fixed;
        for (auto& y : outputs) {
            if (!at::isFloatingType(y.scalar_type())) fixed.push_back(y);
        }
        ctx->mark_non_differentiable(fixed);
        return outputs;
    }

    static Tensors backward(AutogradContext* ctx, Tensors grads) {
        auto& plan = kernels::kept<Plan>(ctx, "plan");
        Tensors saved = ctx->get_saved_variables(), inputs, outputs, given;
        std::vector<WeightPtr> weights;
        at::AutoGradMode record(true);
        for (size_t i = 0; i < plan.num_inputs; ++i) inputs.push_back(saved[i].detach().requires_grad_(true));
        for (size_t i = 0; i < plan.weights.size(); ++i) {
            auto w = weight_of(plan.weights[i], saved[plan.num_inputs + i]);
            bool half = w->value.scalar_type() == at::kHalf;
            w->grad = at::zeros(w->value.sizes(), w->value.options().dtype(half ? at::kFloat : w->value.scalar_type()));
            weights.push_back(w);
        }
        Tensors results = plan.call(inputs, weights);
        for (size_t i = 0; i < results.size(); ++i) {
            if (results[i].requires_grad() && grads[i].defined()) outputs.push_back(results[i]), given.push_back(grads[i].contiguous());
        }
        Tensors out(1);                                       // the plan's
        Tensors of_inputs = torch::autograd::grad(outputs, inputs, given, false, false, true);
        out.insert(out.end(), of_inputs.begin(), of_inputs.end());
        for (auto& w : weights) out.push_back(w->grad_to_add().to(w->value.scalar_type()));
        return out;
    }
};
}  // namespace

Tensors call_kernel(const Tensors& inputs, const std::vector<CallWeight>& weights, const KernelCall& call) {
    bool wanted = false;
    for (auto& w : weights) wanted = wanted || (at::GradMode::is_enabled() && w.value.requires_grad());
    if (!wanted) {
        std::vector<WeightPtr> list;
        for (auto& w : weights) list.push_back(weight_of(w, w.value));
        return call(inputs, list);
    }
    Tensors all = inputs;
    for (auto& w : weights) all.push_back(w.value);
    return WeightedKernel::apply(Plan{inputs.size(), weights, call}, at::TensorList(all));
}
}  // namespace moe::lua
