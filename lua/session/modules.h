// What a fresh state holds: Lua's libraries with our replacements, moe, and the modules of lua/moe that are inside the binary.
#pragma once
#include <lua.hpp>

#include <string>
#include <string_view>
#include <vector>

namespace moe::lua {

constexpr std::string_view kCommandPrefix = "moe.commands.";

/// Fills a new state: libraries, moe, viz, help, require for the embedded modules. May raise Lua's errors.
void open_globals(lua_State* L);
/// Names of the modules of moe that are written in Lua, without "moe." and without those in folders.
std::vector<std::string> module_names();
/// Names of the embedded commands, sorted.
std::vector<std::string> command_names();
/// Text of an embedded file, "lua/moe/plot.lua", "" for none.
std::string module_text(const std::string& file);

}  // namespace moe::lua
