// What the files that bind core/kernels share: optional tensors, weights of a call, random rows.
#pragma once
#include "core/kernels/dropout/dropout.h"
#include "core/tensor/weight.h"
#include "lua/bind/tensor.h"

namespace moe::lua {

/// The tensor at index, an undefined one for nil.
at::Tensor optional_tensor(lua_State* L, int index, const char* name);
/// A tensor among named arguments, an undefined one where there is none.
at::Tensor optional_tensor(lua_State* L, const Options& options, const char* name);
/// A weight that lives for one call: contiguous, without a gradient.
WeightPtr call_weight(lua_State* L, int index, const char* name, bool fp8 = false);
/// dtype and device of what a call makes, from its options.
at::ScalarType option_dtype(const Options& options, const char* name, at::ScalarType fallback);
at::Device option_device(const Options& options);
/// The stream of draws and the rows' numbers: options seed, purpose, step, layer, first, group, stride, with fallbacks of `rows`.
kernels::RandomRows random_rows(lua_State* L, const Options& options, kernels::RandomRows rows);
#define MOE_LUA_RANDOM_ROWS "seed", "purpose", "step", "layer", "first", "group", "stride"

/// Adds attention, its cache and the random draws to the table moe.kernels on the stack's top.
void add_attention_kernels(lua_State* L);

}  // namespace moe::lua
