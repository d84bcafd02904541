// C++ values in an autograd context, and the way of a weight's gradient.
#pragma once
#include "core/tensor/weight.h"

#include <torch/csrc/autograd/custom_function.h>

namespace moe::kernels {
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using Grads = torch::autograd::variable_list;

/// Any C++ value as something that a context can hold.
template <class X> struct Box : torch::CustomClassHolder {
    X value;
    explicit Box(X v) : value(std::move(v)) {}
};
template <class X> void keep(AutogradContext* ctx, const char* key, X v) {
    ctx->saved_data[key] = c10::IValue::make_capsule(c10::make_intrusive<Box<X>>(std::move(v)));
}
template <class X> X& kept(AutogradContext* ctx, const char* key) {
    return c10::static_intrusive_pointer_cast<Box<X>>(ctx->saved_data.at(key).toCapsule())->value;
}

/// Weights are held by handle, never by save_for_backward: all views of a flat buffer share one version counter, and the
/// value may be replaced between forward and backward.
inline void hold_weight(AutogradContext* ctx, const WeightPtr& w) { ctx->saved_data["w"] = c10::IValue::make_capsule(w); }
inline WeightPtr held_weight(AutogradContext* ctx) { return c10::static_intrusive_pointer_cast<Weight>(ctx->saved_data.at("w").toCapsule()); }

/// Hands the making of w.grad to its sink; at once where there is none, not at all where there is no main gradient.
inline void add_weight_grad(const WeightPtr& w, std::function<void()> make) {
    if (!w->grad.defined()) return;
    if (w->sink) w->sink->add(std::move(make));
    else make();
}

/// True where a graph is wanted. Asked before Function::apply: inside forward grad mode is always off.
inline bool wants_grad(const Tensor& x) { return at::GradMode::is_enabled() && x.requires_grad(); }
}  // namespace moe::kernels
