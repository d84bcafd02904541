#include "lua/bind/array.h"

namespace moe::lua {
namespace {
void push_module(lua_State* L, const char* name) {
    lua_getglobal(L, "require");
    lua_pushstring(L, name);
    lua_call(L, 1, 1);
}
}  // namespace

int push_array(lua_State* L, at::Tensor values, const std::string& name, const std::vector<Dim>& dims) {
    push_module(L, "moe.array");
    push_tensor(L, std::move(values));
    lua_createtable(L, 0, 3);
    push_string(L, name);
    lua_setfield(L, -2, "name");
    lua_createtable(L, int(dims.size()), 0);
    lua_newtable(L);
    for (size_t i = 0; i < dims.size(); ++i) {
        push_string(L, dims[i].name);
        lua_rawseti(L, -3, lua_Integer(i) + 1);
        if (!dims[i].texts.empty()) {
            lua_createtable(L, int(dims[i].texts.size()), 0);
            for (size_t k = 0; k < dims[i].texts.size(); ++k) push_string(L, dims[i].texts[k]), lua_rawseti(L, -2, lua_Integer(k) + 1);
        } else if (!dims[i].numbers.empty()) {
            push_integers(L, dims[i].numbers);
        } else {
            continue;
        }
        lua_setfield(L, -2, dims[i].name.c_str());
    }
    lua_setfield(L, -3, "labels");
    lua_setfield(L, -2, "dims");
    lua_call(L, 2, 1);
    return 1;
}

int as_records(lua_State* L) {
    push_module(L, "moe.records");
    lua_insert(L, -2);
    lua_call(L, 1, 1);
    return 1;
}

}  // namespace moe::lua
