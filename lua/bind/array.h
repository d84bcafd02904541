// Labelled results from C++: moe.array and moe.records of lua/moe.
#pragma once
#include "lua/bind/tensor.h"

namespace moe::lua {

/// A dim of a result; without labels it counts from 0.
struct Dim {
    std::string name;
    std::vector<std::string> texts;
    std::vector<int64_t> numbers;
};
/// Pushes moe.array(values, {name = name, dims = …, labels = …}).
int push_array(lua_State* L, at::Tensor values, const std::string& name, const std::vector<Dim>& dims);
/// Replaces the list of rows on the stack's top by moe.records(list).
int as_records(lua_State* L);

}  // namespace moe::lua
