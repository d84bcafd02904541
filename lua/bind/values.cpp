// Arguments: typed, with messages that carry what was given.
#include "core/base/suggest.h"
#include "lua/bind/lua.h"

#include <cmath>

namespace moe::lua {

std::string to_string(lua_State* L, int index) {
    size_t size = 0;
    const char* data = luaL_tolstring(L, index, &size);
    std::string text(data, size);
    lua_pop(L, 1);
    return text;
}

std::string got_text(lua_State* L, int index) {
    switch (lua_type(L, index)) {
        case LUA_TNONE: return "nothing";
        case LUA_TNIL: return "nil";
        case LUA_TNUMBER:
        case LUA_TBOOLEAN: return to_string(L, index);
        case LUA_TSTRING: {
            std::string text = lua_tostring(L, index);
            return '"' + (text.size() > 60 ? text.substr(0, 57) + "…" : text) + '"';
        }
        default: break;
    }
    std::string name = luaL_typename(L, index);
    if (luaL_getmetafield(L, index, "__name") != LUA_TNIL) {
        if (lua_isstring(L, -1)) name = lua_tostring(L, -1);
        lua_pop(L, 1);
    }
    return (std::string("aeiou").find(name[0]) == std::string::npos ? "a " : "an ") + name;
}

void bad_argument(lua_State* L, int index, const char* name, const std::string& want, const std::string& hint) {
    MOE_THROW(usage, running(L) + ": " + name, got_text(L, index), want, hint);
}

bool is_nothing(lua_State* L, int index) { return lua_isnoneornil(L, index); }

int64_t check_integer(lua_State* L, int index, const char* name) {
    if (lua_type(L, index) == LUA_TNUMBER) {
        int fits = 0;
        lua_Integer value = lua_tointegerx(L, index, &fits);    // a float without a fraction fits
        if (fits) return value;
    }
    bad_argument(L, index, name, "an integer");
}

double check_number(lua_State* L, int index, const char* name) {
    if (lua_type(L, index) != LUA_TNUMBER) bad_argument(L, index, name, "a number");
    return lua_tonumber(L, index);
}

bool check_bool(lua_State* L, int index, const char* name) {
    if (!lua_isboolean(L, index)) bad_argument(L, index, name, "true or false");
    return lua_toboolean(L, index);
}

std::string check_string(lua_State* L, int index, const char* name) {
    if (lua_type(L, index) != LUA_TSTRING) bad_argument(L, index, name, "a text");
    size_t size = 0;
    const char* data = lua_tolstring(L, index, &size);
    return {data, size};
}

void check_table(lua_State* L, int index, const char* name) {
    if (!lua_istable(L, index)) bad_argument(L, index, name, "a table");
}

void check_function(lua_State* L, int index, const char* name) {
    if (lua_isfunction(L, index)) return;
    if (luaL_getmetafield(L, index, "__call") == LUA_TNIL) bad_argument(L, index, name, "a function");
    lua_pop(L, 1);
}

std::vector<int64_t> check_integers(lua_State* L, int index, const char* name) {
    check_table(L, index, name);
    index = lua_absindex(L, index);
    std::vector<int64_t> values;
    for (lua_Integer i = 1, n = lua_Integer(lua_rawlen(L, index)); i <= n; ++i) {
        lua_rawgeti(L, index, i);
        int fits = 0;
        int64_t value = lua_type(L, -1) == LUA_TNUMBER ? lua_tointegerx(L, -1, &fits) : 0;
        values.push_back(fits ? value : check_integer(L, -1, fmt::format("{}[{}]", name, i).c_str()));
        lua_pop(L, 1);
    }
    return values;
}

Options::Options(lua_State* L, int index, std::initializer_list<const char*> known) : L_(L), index_(0) {
    if (lua_isnoneornil(L, index)) return;
    check_table(L, index, "options");
    index_ = lua_absindex(L, index);
    lua_pushnil(L);
    while (lua_next(L, index_)) {
        lua_pop(L, 1);
        bool found = false;
        if (lua_type(L, -1) == LUA_TSTRING) {
            std::string_view key = lua_tostring(L, -1);
            for (const char* name : known) found |= name == key;
        }
        if (found) continue;
        std::vector<std::string> names(known.begin(), known.end());
        std::string want = "one of ", got = got_text(L, -1), key = to_string(L, -1);
        for (auto& name : names) want += (&name == &names[0] ? "" : ", ") + name;
        MOE_THROW(usage, running(L) + ": options", got, names.empty() ? "no options" : want, did_you_mean(key, names));
    }
}

void Options::push(const char* name) const {
    if (index_) {
        lua_getfield(L_, index_, name);
    } else {
        lua_pushnil(L_);
    }
}

bool Options::has(const char* name) const {
    push(name);
    bool there = !lua_isnil(L_, -1);
    lua_pop(L_, 1);
    return there;
}

namespace {
template <class T, class Check>
T option(const Options& options, lua_State* L, const char* name, T fallback, Check check) {
    if (!options.has(name)) return fallback;
    options.push(name);
    T value = check(L, -1, name);
    lua_pop(L, 1);
    return value;
}
}  // namespace

int64_t Options::integer(const char* name, int64_t fallback) const { return option(*this, L_, name, fallback, check_integer); }
double Options::number(const char* name, double fallback) const { return option(*this, L_, name, fallback, check_number); }
bool Options::boolean(const char* name, bool fallback) const { return option(*this, L_, name, fallback, check_bool); }
std::string Options::string(const char* name, const std::string& fallback) const { return option(*this, L_, name, fallback, check_string); }
}  // namespace moe::lua
