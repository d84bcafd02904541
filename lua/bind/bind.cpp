#include "lua/bind/bind.h"

#include "core/base/version.h"
#include "lua/bind/lua.h"

namespace moe::lua {

void push_moe(lua_State* L) {
    lua_newtable(L);
    set_help(L, -1, "moe",
             "moe: a sandbox for mixture-of-experts language models. moe.config, moe.run, moe.model, moe.load_hf, tensors (moe.randn …), moe.plot (= viz).\n"
             "help(moe) lists its functions, help(moe.run) explains one.");
    lua_pushstring(L, kVersion);
    lua_setfield(L, -2, "version");
    lua_pushstring(L, kCommit);
    lua_setfield(L, -2, "commit");
    for (auto* open : {open_help, open_json, open_system, open_machine, open_process, open_tensor, open_random, open_autograd, open_npy, open_cuda, open_bench, open_kernels, open_config, open_store,
                       open_model, open_trace, open_router, open_layers, open_run, open_draw, open_datasets, open_ranks})
        open(L);
    for (auto& key : ordered_keys(L, -1)) {         // moe.fs, moe.kernels …
        lua_getfield(L, -1, key.c_str());
        if (lua_istable(L, -1)) guard_module(L);
        lua_pop(L, 1);
    }
}
}  // namespace moe::lua
