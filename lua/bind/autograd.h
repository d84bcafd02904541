// Gradients from Lua, and who may call Lua while they are made.
#pragma once
#include "lua/bind/lua.h"

namespace moe::lua {

/// Lua's thread waits in C++ until this goes out of scope: functions of Lua that autograd calls from its own threads (backward on a GPU) may run meanwhile, for nothing else does.
/// To be held by every binding that runs a backward. Without it such a call from another thread is an error, not a race.
class LuaWaits {
public:
    explicit LuaWaits(lua_State* L);
    ~LuaWaits();
    LuaWaits(const LuaWaits&) = delete;
    LuaWaits& operator=(const LuaWaits&) = delete;

private:
    struct Host* host_;
};

/// Adds moe.autograd.
void open_autograd_operators(lua_State* L);

}  // namespace moe::lua
