// Tensors in Lua: names, shapes and dims as in PyTorch, dims 0-based.
#pragma once
#include "lua/bind/lua.h"

#include <ATen/core/Tensor.h>

namespace moe::lua {

template <>
struct TypeName<at::Tensor> {
    static constexpr const char* value = "tensor";
};

/// Pushes a tensor and tells Lua's collector its bytes, so that a loop over large tensors does not fill the memory.
int push_tensor(lua_State* L, at::Tensor t);
/// The tensor at index. Throws moe::Error (usage; state for a freed one).
at::Tensor& check_tensor(lua_State* L, int index, const char* name);
/// "fp32", "float32", "bf16", "int64", … Throws moe::Error (dtype) with the nearest name.
at::ScalarType dtype_named(const std::string& name);
/// "cpu", "cuda", "cuda:1". Throws moe::Error (device).
at::Device device_named(const std::string& name);
/// Nested tables of numbers (or booleans) as a tensor: float32 unless every number is an integer (int64), or `dtype` says.
at::Tensor tensor_from_table(lua_State* L, int index, std::optional<at::ScalarType> dtype);
/// Methods and operators of the type, from tensor_ops.cpp.
std::span<const Binding> tensor_methods();
std::span<const Binding> tensor_operators();

}  // namespace moe::lua
