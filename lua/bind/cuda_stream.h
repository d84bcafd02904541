// Streams of a GPU in Lua.
#pragma once
#include "lua/bind/lua.h"

#include <c10/core/Stream.h>

namespace moe::lua {

template <>
struct TypeName<c10::Stream> {
    static constexpr const char* value = "cuda stream";
};
/// Registers the type and adds stream and synchronize to the table moe.cuda on the stack's top.
void add_cuda_streams(lua_State* L);

}  // namespace moe::lua
