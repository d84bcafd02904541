// What the files that bind core/kernels share: optional tensors, weights of a call, random rows.
#pragma once
#include "core/kernels/dropout/dropout.h"
#include "core/tensor/weight.h"
#include "lua/bind/tensor.h"

#include <functional>

namespace moe::lua {

/// The tensor at index, an undefined one for nil.
at::Tensor optional_tensor(lua_State* L, int index, const char* name);
/// A tensor among named arguments, an undefined one where there is none.
at::Tensor optional_tensor(lua_State* L, const Options& options, const char* name);
/// A tensor that a call takes for a weight, by name for messages.
struct CallWeight {
    at::Tensor value;
    const char* name;
    bool is_fp8 = false;
};
inline CallWeight weight_argument(lua_State* L, int index, const char* name, bool fp8 = false) { return {check_tensor(L, index, name), name, fp8}; }
/// A kernel as a function of the tensors that gradients go through (all of a float dtype) and of its weights; called again in backward, so it holds all else by value.
using KernelCall = std::function<std::vector<at::Tensor>(const std::vector<at::Tensor>& inputs, const std::vector<WeightPtr>& weights)>;
/// Runs it; where a weight has requires_grad, so that gradients reach the weights as they reach any tensor.
std::vector<at::Tensor> call_kernel(const std::vector<at::Tensor>& inputs, const std::vector<CallWeight>& weights, const KernelCall& call);
/// dtype and device of what a call makes, from its options.
at::ScalarType option_dtype(const Options& options, const char* name, at::ScalarType fallback);
at::Device option_device(const Options& options);
/// The stream of draws and the rows' numbers: options seed, purpose, step, layer, first, group, stride, with fallbacks of `rows`.
kernels::RandomRows random_rows(lua_State* L, const Options& options, kernels::RandomRows rows);
#define MOE_LUA_RANDOM_ROWS "seed", "purpose", "step", "layer", "first", "group", "stride"

/// Sets kernels as fields of the table on the stack's top: called like functions, each with its .reference beside it where moe.kernels_reference has one.
void set_kernels(lua_State* L, std::span<const Binding> bindings);
/// Adds attention, its cache and the random draws to the table moe.kernels on the stack's top.
void add_attention_kernels(lua_State* L);

}  // namespace moe::lua
