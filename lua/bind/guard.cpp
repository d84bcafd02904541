// The guard of functions that are written in Lua: moe's modules and types raise error objects as the bindings do.
#include "core/base/suggest.h"
#include "lua/bind/lua.h"

namespace moe::lua {
namespace {
int to_error_object(lua_State* L) {
    if (lua_istable(L, 1) && !is_error(L, 1)) return 1;              // a script's own object comes out as it is
    add_traceback_to_error(L);
    return 1;
}

/// Stack: the handler, results or what was raised.
int finish(lua_State* L, int status, lua_KContext) {
    if (status == LUA_OK || status == LUA_YIELD) return lua_gettop(L) - 1;
    if (!lua_istable(L, -1)) {                  // no memory, or an error in the handler: Lua's texts
        ErrorParts parts = error_parts(L, -1);
        parts.kind = status == LUA_ERRMEM ? ErrorKind::memory : ErrorKind::lua;
        push_error(L, parts);
    }
    return lua_error(L);
}

/// Upvalue 1: the Lua function.
int guarded_lua(lua_State* L) {
    lua_pushcfunction(L, to_error_object);
    lua_insert(L, 1);
    lua_pushvalue(L, lua_upvalueindex(1));
    lua_insert(L, 2);
    return finish(L, lua_pcallk(L, lua_gettop(L) - 2, LUA_MULTRET, 1, 0, finish), 0);
}

bool is_guarded(lua_State* L, int index) { return lua_iscfunction(L, index) && lua_tocfunction(L, index) == guarded_lua; }
bool is_plain(lua_State* L, int index) { return lua_isfunction(L, index) && !lua_iscfunction(L, index); }

/// Stack: a Lua function → its guarded one, with the same help text; one function has one.
void guard_top(lua_State* L) {
    if (!luaL_getsubtable(L, LUA_REGISTRYINDEX, "moe.guarded")) {
        lua_createtable(L, 0, 1);
        lua_pushliteral(L, "k");
        lua_setfield(L, -2, "__mode");
        lua_setmetatable(L, -2);
    }
    lua_pushvalue(L, -2);
    bool there = lua_rawget(L, -2) != LUA_TNIL;
    if (there) {
        lua_replace(L, -3);
        return lua_pop(L, 1);
    }
    lua_pop(L, 1);
    auto text = help_of(L, -2);
    lua_pushvalue(L, -2);
    lua_pushcclosure(L, guarded_lua, 1);
    lua_pushvalue(L, -3);
    lua_pushvalue(L, -2);
    lua_rawset(L, -4);
    lua_replace(L, -3);
    lua_pop(L, 1);
    if (!text) return;
    // Under the names that the plain one has.
    push_help_names(L);
    std::vector<std::string> names;
    for (lua_pushnil(L); lua_next(L, -2); lua_pop(L, 1)) {
        if (!lua_isfunction(L, -1)) continue;
        lua_getupvalue(L, -4, 1);
        if (lua_rawequal(L, -1, -2)) names.emplace_back(lua_tostring(L, -3));
        lua_pop(L, 1);
    }
    lua_pop(L, 1);
    for (auto& name : names) set_help(L, -1, name, *text);
}

/// Stack: a table. Guards the functions in it whose key passes `wanted`; one that is there under two keys is one afterwards, too.
template <class Wanted>
void guard_fields(lua_State* L, Wanted wanted) {
    std::vector<std::string> keys;
    for (lua_pushnil(L); lua_next(L, -2); lua_pop(L, 1))
        if (lua_type(L, -2) == LUA_TSTRING && is_plain(L, -1) && wanted(std::string(lua_tostring(L, -2)))) keys.emplace_back(lua_tostring(L, -2));
    for (auto& key : keys) {
        push_string(L, key);
        push_string(L, key);
        lua_rawget(L, -3);
        guard_top(L);
        lua_rawset(L, -3);
    }
}

/// __index of moe's tables of functions. Keys that are no texts are nil, which ipairs and # need.
int refuse_name(lua_State* L) {
    check_table(L, 1, "module");
    if (lua_type(L, 2) != LUA_TSTRING) return lua_pushnil(L), 1;
    std::string key = lua_tostring(L, 2), module = "module";
    push_help_names(L);
    for (lua_pushnil(L); lua_next(L, -2); lua_pop(L, 1))
        if (lua_rawequal(L, -1, 1)) module = lua_tostring(L, -2);
    MOE_THROW(usage, module + "." + key.substr(0, 80), "no such function", "one of those that help(" + module + ") lists", did_you_mean(key, ordered_keys(L, 1)));
}
constexpr Binding kRefuseName = {"__index", refuse_name, "module.name: a name that the module does not have is an error."};
}  // namespace

void guard_module(lua_State* L) {
    if (is_plain(L, -1)) return guard_top(L);
    if (!lua_istable(L, -1)) return;
    if (!lua_getmetatable(L, -1)) {
        lua_createtable(L, 0, 1);
        push_function(L, kRefuseName, "module.__index");
        lua_setfield(L, -2, "__index");
        lua_setmetatable(L, -2);
    } else {
        lua_pop(L, 1);
    }
    guard_fields(L, [&](const std::string& key) {
        lua_getfield(L, -3, key.c_str());       // below: key, value
        bool documented = help_of(L, -1).has_value();
        lua_pop(L, 1);
        return documented;
    });
}

void guard_type(lua_State* L) {
    // __index and __pairs stay: completion runs C functions there, which it takes for harmless.
    guard_fields(L, [](const std::string& key) { return key.starts_with("__") && key != "__index" && key != "__pairs" && key != "__gc"; });
    lua_pushliteral(L, "__methods");
    if (lua_rawget(L, -2) == LUA_TTABLE) {
        guard_fields(L, [](const std::string&) { return true; });
        // Where the metatable itself holds the methods, it gets the same ones.
        std::vector<std::string> keys;
        for (lua_pushnil(L); lua_next(L, -2); lua_pop(L, 1))
            if (lua_type(L, -2) == LUA_TSTRING && is_guarded(L, -1)) keys.emplace_back(lua_tostring(L, -2));
        for (auto& key : keys) {
            push_string(L, key);
            lua_rawget(L, -2);
            push_string(L, key);
            if (lua_rawget(L, -4) != LUA_TNIL && !is_guarded(L, -1)) {
                push_string(L, key);
                lua_pushvalue(L, -3);
                lua_rawset(L, -6);
            }
            lua_pop(L, 2);
        }
    }
    lua_pop(L, 1);
}

void push_unguarded(lua_State* L, int index) {
    index = lua_absindex(L, index);
    if (!is_guarded(L, index) || !lua_getupvalue(L, index, 1)) lua_pushvalue(L, index);
}
}  // namespace moe::lua
