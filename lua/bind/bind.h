// All bindings of the core: the table `moe`. One open_*() a core folder.
#pragma once
#include "lua/bind/lua.h"

namespace moe::lua {

/// Registers all types and pushes the table moe.
void push_moe(lua_State* L);

// Each adds its functions to the table moe on the stack's top and registers its types.
void open_help(lua_State* L);
void open_json(lua_State* L);
void open_system(lua_State* L);
void open_machine(lua_State* L);
void open_process(lua_State* L);
void open_tensor(lua_State* L);
void open_random(lua_State* L);
void open_autograd(lua_State* L);
void open_npy(lua_State* L);
void open_cuda(lua_State* L);
void open_bench(lua_State* L);
void open_kernels(lua_State* L);
void open_config(lua_State* L);
void open_store(lua_State* L);
void open_model(lua_State* L);
void open_trace(lua_State* L);
void open_router(lua_State* L);
void open_layers(lua_State* L);
void open_run(lua_State* L);
void open_draw(lua_State* L);
void open_datasets(lua_State* L);
void open_ranks(lua_State* L);

}  // namespace moe::lua
