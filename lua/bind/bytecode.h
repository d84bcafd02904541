// What a Lua function's bytecode says about it. Source: ldump.c, lopcodes.h of Lua 5.4.
#pragma once
#include "lua/bind/lua.h"

#include <set>
#include <string>

namespace moe::lua {

/// The code of the Lua function at index, without what depends on where its upvalues lived: the same for two functions of the same text.
std::string code_of(lua_State* L, int index);

/// Names from outside of a function that it or functions in it use.
struct OuterNames {
    std::set<std::string> read;            ///< globals
    std::set<std::string> written;         ///< globals that are assigned, or whose elements are
    std::set<int> assigned;                ///< its own upvalues, the first 0
};
/// Of the Lua function at index. What a name holds that is handed to another function counts as read.
OuterNames outer_names(lua_State* L, int index);

}  // namespace moe::lua
