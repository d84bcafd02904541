// Gradients from Lua, and who may call Lua while they are made.
#pragma once
#include "lua/bind/lua.h"

#include <c10/util/ThreadLocalDebugInfo.h>

namespace moe::lua {

/// This thread, which holds the state's lock, waits in C++ until this goes out of scope: functions of Lua that autograd calls for it from threads of its own (backward on a GPU) may run meanwhile,
/// for nothing else does. To be held by every binding that runs a backward. Without it such a call from another thread is an error, not a race.
class LuaWaits {
public:
    explicit LuaWaits(lua_State* L);
    LuaWaits(const LuaWaits&) = delete;
    LuaWaits& operator=(const LuaWaits&) = delete;

private:
    c10::DebugInfoGuard guard_;
};

/// Adds moe.autograd.
void open_autograd_operators(lua_State* L);

}  // namespace moe::lua
