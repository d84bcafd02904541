// Functions of Lua as plain values: their source text and upvalues, so that a run's log and checkpoints can hold them.
#pragma once
#include "lua/bind/lua.h"

#include <nlohmann/json.hpp>

namespace moe::lua {

/// The function at index as {source, name, upvalues = [[name, value], …]}. Upvalues may be nil, booleans, numbers, texts, tables of them, tensors,
/// the globals, functions and modules of Lua and moe, and Lua functions of the same kind. Throws moe::Error (usage) that names the
/// upvalue that is none of these, or says that the source is not known.
nlohmann::ordered_json function_to_values(lua_State* L, int index);
/// Pushes a function compiled from that: it has upvalues of its own. Throws moe::Error (data, usage).
void push_function_of(lua_State* L, const nlohmann::ordered_json& values);
/// "run.lua:12", of the function at index.
std::string function_place(lua_State* L, int index);

/// Any plain value, as function_to_values takes upvalues; `path` names it in errors.
nlohmann::ordered_json to_values(lua_State* L, int index, const std::string& path);
void push_values(lua_State* L, const nlohmann::ordered_json& value);

}  // namespace moe::lua
