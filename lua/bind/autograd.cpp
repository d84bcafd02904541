// Gradients: t.requires_grad, t:backward(), t.grad, moe.grad, moe.no_grad.
#include "lua/bind/autograd.h"

#include "core/tensor/check.h"
#include "lua/bind/bind.h"
#include "lua/bind/tensor.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>

namespace moe::lua {
namespace {
using at::Tensor;
using Tensors = std::vector<Tensor>;

Tensor& t(lua_State* L) { return self_tensor(L); }

void require_float(const Tensor& x) {
    bool fits = at::isFloatingType(x.scalar_type()) || at::isComplexType(x.scalar_type());
    MOE_CHECK(fits, dtype, "requires_grad", describe(x), "a tensor of a float dtype", "t:float()");
}
void set_requires_grad(Tensor& x, bool on) {
    if (on) require_float(x);
    MOE_CHECK(on || x.is_leaf(), state, "requires_grad", "a result of other tensors", "a tensor that nothing was computed for", "t:detach() is one");
    x.set_requires_grad(on);
}
int requires_grad_(lua_State* L) {
    set_requires_grad(t(L), is_nothing(L, 2) || check_bool(L, 2, "on"));
    return lua_settop(L, 1), 1;
}
int detach(lua_State* L) { return push_tensor(L, t(L).detach()); }
int retain_grad(lua_State* L) {
    MOE_CHECK(t(L).requires_grad(), state, running(L), "a tensor without requires_grad", "one that gradients go through", "");
    t(L).retain_grad();
    return lua_settop(L, 1), 1;
}

/// y can be differentiated, and `grad` fits it: undefined only where y is one number.
void check_output(const char* op, const Tensor& y, const Tensor& grad) {
    MOE_CHECK(y.requires_grad(), state, op, "a tensor that no tensor with requires_grad went into", "one that depends on some", "x.requires_grad = true before computing; outside of moe.no_grad");
    if (grad.defined()) {
        MOE_CHECK(grad.sizes() == y.sizes(), shape, std::string(op) + ": gradient", shape_text(grad.sizes()), shape_text(y.sizes()), "");
    } else {
        MOE_CHECK(y.numel() == 1, shape, op, describe(y), "one number, or a gradient of y's shape", "y:sum() is one number");
    }
}

int backward(lua_State* L) {
    bool given = test_box<Tensor>(L, 2);
    Options o(L, given || is_nothing(L, 2) ? 3 : 2, {"retain_graph", "create_graph"});
    Tensor grad = given ? check_tensor(L, 2, "gradient") : Tensor();
    Tensor y = t(L);
    check_output("backward", y, grad);
    bool create = o.boolean("create_graph", false), retain = o.boolean("retain_graph", create);
    LuaWaits waits(L);
    y.backward(grad, retain, create);
    return 0;
}

/// A tensor or a list of them.
Tensors tensors_argument(lua_State* L, int index, const char* name) {
    if (test_box<Tensor>(L, index)) return {check_tensor(L, index, name)};
    if (!lua_istable(L, index)) bad_argument(L, index, name, "a tensor or a list of tensors");
    Tensors list;
    for (lua_Integer i = 1, n = lua_Integer(lua_rawlen(L, index)); i <= n; ++i) {
        lua_rawgeti(L, index, i);
        list.push_back(check_tensor(L, lua_gettop(L), name));
        lua_pop(L, 1);
    }
    MOE_CHECK(!list.empty(), usage, running(L) + ": " + name, "an empty list", "at least one tensor", "");
    return list;
}

int grad(lua_State* L) {
    Options o(L, 3, {"grad_outputs", "retain_graph", "create_graph", "allow_unused"});
    Tensors outputs = tensors_argument(L, 1, "outputs"), inputs = tensors_argument(L, 2, "inputs"), grads;
    bool one = !lua_istable(L, 2), create = o.boolean("create_graph", false), retain = o.boolean("retain_graph", create), unused = o.boolean("allow_unused", false);
    o.push("grad_outputs");
    if (!lua_isnil(L, -1)) grads = tensors_argument(L, lua_gettop(L), "grad_outputs");
    lua_pop(L, 1);
    MOE_CHECK(grads.empty() || grads.size() == outputs.size(), usage, "moe.grad: grad_outputs", std::to_string(grads.size()), fmt::format("{}, one for each output", outputs.size()), "");
    for (size_t i = 0; i < outputs.size(); ++i) check_output("moe.grad", outputs[i], grads.empty() ? Tensor() : grads[i]);
    for (auto& x : inputs) MOE_CHECK(x.requires_grad(), state, "moe.grad: inputs", "a tensor without requires_grad", "tensors that have it", "x.requires_grad = true before computing");
    Tensors result;
    {
        LuaWaits waits(L);
        result = torch::autograd::grad(outputs, inputs, grads, retain, create, true);
    }
    for (size_t i = 0; i < result.size(); ++i) {
        MOE_CHECK(result[i].defined() || unused, state, "moe.grad", fmt::format("outputs that do not depend on inputs[{}]", i + 1), "inputs that the outputs were computed of", "allow_unused = true gives zeros");
        if (!result[i].defined()) result[i] = at::zeros_like(inputs[i]);
    }
    return one ? push_tensor(L, result[0]) : push_tensors(L, result);
}

template <bool On>
int with_mode(lua_State* L) {
    check_function(L, 1, "f");
    at::AutoGradMode mode(On);
    lua_call(L, lua_gettop(L) - 1, LUA_MULTRET);
    return lua_gettop(L);
}
int is_grad_enabled(lua_State* L) { return lua_pushboolean(L, at::GradMode::is_enabled()), 1; }

int field_requires_grad(lua_State* L) { return lua_pushboolean(L, t(L).requires_grad()), 1; }
int field_is_leaf(lua_State* L) { return lua_pushboolean(L, t(L).is_leaf()), 1; }
int field_grad(lua_State* L) {
    const Tensor& g = t(L).grad();
    if (!g.defined()) return lua_pushnil(L), 1;
    return push_tensor(L, g);
}

const Binding kFields[] = {
    {"requires_grad", field_requires_grad, "t.requires_grad: true where gradients go to or through t; can be set on a tensor that is no result of others.\nExample: local w = moe.randn {3}; w.requires_grad = true"},
    {"grad", field_grad, "t.grad: the gradient that t:backward() calls have added up, nil before; t.grad = nil drops it."},
    {"is_leaf", field_is_leaf, "t.is_leaf: false for results that a gradient goes through."},
};
const Binding kMethods[] = {
    {"backward", backward,
     "y:backward(gradient, {retain_graph = false, create_graph = false}): adds dy/dx to x.grad of every leaf that y was computed of; gradient: of y's shape, may be left out for one number.\n"
     "Example: local w = moe.ones({3}, {requires_grad = true}); (w * w):sum():backward(); print(w.grad)"},
    {"detach", detach, "t:detach(): the same numbers, outside of the graph."},
    {"requires_grad_", requires_grad_, "t:requires_grad_(on = true): sets t.requires_grad. Returns t."},
    {"retain_grad", retain_grad, "t:retain_grad(): keeps t.grad of a result, too. Returns t."},
};
const Binding kFunctions[] = {
    {"grad", grad,
     "moe.grad(y, xs, {grad_outputs =, retain_graph = false, create_graph = false, allow_unused = false}): gradients of y (a tensor or a list) by xs (a tensor, or a list: then a list); x.grad\n"
     "stays as it is. create_graph: they can be differentiated again.\n"
     "Example: local x = moe.tensor({2.0}, {requires_grad = true}); local g = moe.grad((x ^ 3):sum(), x, {create_graph = true}); print(moe.grad(g:sum(), x))"},
    {"no_grad", with_mode<false>, "moe.no_grad(f, …): f(…) without recording for gradients; gives what f gives.\nExample: local w = moe.ones({3}, {requires_grad = true}); moe.no_grad(function() w:sub_(0.1) end)"},
    {"enable_grad", with_mode<true>, "moe.enable_grad(f, …): f(…) with recording, inside of moe.no_grad."},
    {"is_grad_enabled", is_grad_enabled, "moe.is_grad_enabled(): false inside of moe.no_grad."},
};
}  // namespace

std::span<const Binding> tensor_autograd() { return kMethods; }
std::span<const Binding> tensor_autograd_fields() { return kFields; }

bool set_autograd_field(lua_State* L, Tensor& x, const std::string& name, int value) {
    if (name == "requires_grad") {
        set_requires_grad(x, check_bool(L, value, "requires_grad"));
        return true;
    }
    if (name != "grad") return false;
    if (is_nothing(L, value)) {
        x.mutable_grad() = Tensor();
        return true;
    }
    Tensor& g = check_tensor(L, value, "grad");
    MOE_CHECK(g.sizes() == x.sizes() && g.scalar_type() == x.scalar_type() && g.device() == x.device(), shape, "tensor.grad = …", describe(g), describe(x), "");
    x.mutable_grad() = g;
    return true;
}

void open_autograd(lua_State* L) {
    set_functions(L, "moe.", kFunctions);
    open_autograd_operators(L);
}
}  // namespace moe::lua
