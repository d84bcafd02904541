// Calls, values and errors on their way to other ranks: what ranks.cpp, ranks_calls.cpp and ranks_libraries.cpp share.
#pragma once
#include "lua/bind/ranks.h"

namespace moe::lua {

/// The values from stack index `first` on as bytes. Throws moe::Error (usage) for what has no meaning in another process.
std::string pack_from(lua_State* L, int first);
/// Pushes them; how many there are.
int push_all(lua_State* L, const std::string& bytes);
/// "what at x.lua:12", the line that runs.
std::string at_place(lua_State* L, const std::string& what);
/// The running binding with its arguments, long ones shortened: "run:train(5)".
std::string call_text(lua_State* L);
/// Of all arguments, also of what call_text leaves out: numbers, texts, tables of them, tensors. `own_tensors`: each rank has its own, which are not looked at.
uint64_t digest_of_call(lua_State* L, bool own_tensors);
/// f with the top values, popped, as its stack; its error.
std::optional<ErrorParts> caught(lua_State* L, int num_arguments, const std::function<void(lua_State*)>& f);

/// moe's own functions whose results differ between processes; the table moe is on top.
void share_moe_functions(lua_State* L);

}  // namespace moe::lua
