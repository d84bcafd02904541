// How an interactive session shows a value.
#pragma once
#include <lua.hpp>

#include <string>

namespace moe::lua {

/// A result as text: plain tables as an indented literal with sorted keys (moe's own in their order), three levels deep with at most fifty items each and
/// forty lines in all, objects such as tensors by the line that says what they are; texts as they are; all else as tostring shows it, without addresses.
/// May raise Lua's errors (a __tostring of the caller's).
std::string echo_text(lua_State* L, int index);
/// A result as JSON: null, truth, numbers and texts as they are (numbers that JSON does not have as "nan", "inf", "-inf"), other values as the text that echo_text gives.
std::string echo_json(lua_State* L, int index);

}  // namespace moe::lua
