// Between Lua tables and JSON.
#pragma once
#include "lua/bind/lua.h"

#include <nlohmann/json.hpp>

namespace moe::lua {

/// A value as JSON. Tables with the keys 1 … n are lists, others objects (the empty one too, unless it came from a JSON list);
/// moe.null is null; floats without a fraction stay floats. Throws moe::Error (usage) for functions, userdata, keys that are not
/// texts, and tables that contain themselves.
nlohmann::ordered_json to_json(lua_State* L, int index);
/// Pushes JSON: objects keep their order, null becomes moe.null inside lists and nothing inside objects.
void push_json(lua_State* L, const nlohmann::ordered_json& value);

}  // namespace moe::lua
