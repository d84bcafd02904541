#include "lua/bind/lua.h"

#include "core/base/suggest.h"

#include <algorithm>
#include <map>
#include <tuple>

namespace moe::lua {
namespace {
// Keys of the registry: the addresses of an array's members differ, those of equal constants need not.
const char kKeys[2] = {};
const void* const kHelpTexts = &kKeys[0];    // value → text, weak keys
const void* const kHelpNames = &kKeys[1];    // name → value

void push_registry_table(lua_State* L, const void* key, const char* mode) {
    if (lua_rawgetp(L, LUA_REGISTRYINDEX, key) == LUA_TTABLE) return;
    lua_pop(L, 1);
    lua_newtable(L);
    if (mode) {
        lua_newtable(L);
        lua_pushstring(L, mode);
        lua_setfield(L, -2, "__mode");
        lua_setmetatable(L, -2);
    }
    lua_pushvalue(L, -1);
    lua_rawsetp(L, LUA_REGISTRYINDEX, key);
}

/// Pushes the error object of the exception that is being handled. LibTorch's messages say neither which binding nor, most of them, which tensors: added here.
void push_failure(lua_State* L) {
    ErrorParts parts = current_exception_parts();
    bool ours = !parts.where.empty() || parts.kind == ErrorKind::interrupted || parts.kind == ErrorKind::lua, is_memory = parts.kind == ErrorKind::memory;
    if (!ours && (is_memory || (parts.got.empty() && parts.want.empty()))) {
        parts.op = running(L) + ": " + parts.op;
        if (!is_memory && describe_arguments) parts.got = describe_arguments(L);
    }
    push_error(L, parts);
}

/// The one guard. Exceptions are turned into Lua's error object in the inner scope, so that no C++ exception is alive when
/// lua_error throws its own.
int guarded(lua_State* L) {
    auto function = reinterpret_cast<Function>(lua_touserdata(L, lua_upvalueindex(1)));
    try {
        return function(L);
    } catch (const std::exception&) {
        push_failure(L);
    }
    return lua_error(L);
}

/// __call of push_callable's tables: the guard without the table that is called. Same upvalues.
int guarded_call(lua_State* L) {
    lua_remove(L, 1);
    return guarded(L);
}

/// __index of every type: methods, then fields (called with the object), then the type's fallback, then an error.
/// Upvalues: methods, fields, fallback or nil, the type's name.
int index_object(lua_State* L) {
    constexpr int kMethods = upvalue(1), kFields = upvalue(2), kFallback = upvalue(3), kName = upvalue(4);
    lua_pushvalue(L, 2);
    if (lua_rawget(L, kMethods) != LUA_TNIL) return 1;
    lua_pop(L, 1);
    lua_pushvalue(L, 2);
    if (lua_rawget(L, kFields) != LUA_TNIL) {
        lua_pushvalue(L, 1);
        lua_call(L, 1, 1);
        return 1;
    }
    lua_pop(L, 1);
    if (!lua_isnil(L, kFallback)) {
        int top = lua_gettop(L);
        lua_pushvalue(L, kFallback);
        lua_pushvalue(L, 1);
        lua_pushvalue(L, 2);
        lua_call(L, 2, LUA_MULTRET);
        if (lua_gettop(L) > top) return lua_gettop(L) - top;    // one value, which may be nil; none: it does not know the key
    }
    std::string type = lua_tostring(L, kName);
    std::vector<std::string> known = ordered_keys(L, kMethods);
    for (auto& name : ordered_keys(L, kFields)) known.push_back(name);
    std::string key = lua_type(L, 2) == LUA_TSTRING ? lua_tostring(L, 2) : got_text(L, 2);
    std::string hint = did_you_mean(key, known);
    MOE_THROW(usage, type + "." + key.substr(0, 80), "no such method or field", "one of those that help(" + type + ") lists", hint.empty() ? "help(x) lists them" : hint);
}

/// __newindex of types that have none of their own. Upvalue: the type's name.
int refuse_assignment(lua_State* L) {
    std::string type = lua_tostring(L, upvalue(1));
    std::string key = lua_type(L, 2) == LUA_TSTRING ? std::string(lua_tostring(L, 2)).substr(0, 80) : got_text(L, 2);
    MOE_THROW(usage, type + "." + key, "an assignment", "reading alone: fields of a " + type + " cannot be set", "help(x) lists what can be called");
}

int ordered_next(lua_State* L) {
    // Upvalues: list of keys, position. Keys whose value is gone are left out, as next() would.
    for (lua_Integer i = lua_tointeger(L, lua_upvalueindex(2)) + 1;; ++i) {
        if (lua_rawgeti(L, lua_upvalueindex(1), i) == LUA_TNIL) return 1;
        lua_pushinteger(L, i);
        lua_replace(L, lua_upvalueindex(2));
        lua_pushvalue(L, -1);
        lua_rawget(L, 1);
        if (!lua_isnil(L, -1)) return 2;
        lua_pop(L, 2);
    }
}

/// Upvalue 1: list of keys.
int ordered_pairs(lua_State* L) {
    lua_pushvalue(L, lua_upvalueindex(1));
    lua_pushinteger(L, 0);
    lua_pushcclosure(L, ordered_next, 2);
    lua_pushvalue(L, 1);
    lua_pushnil(L);
    return 3;
}

int rank_of(int type) { return type == LUA_TNUMBER ? 0 : type == LUA_TSTRING ? 1 : 2; }

/// Stack: list of keys at `list` with n entries → the same, sorted.
void sort_keys(lua_State* L, int list, lua_Integer n) {
    struct Key {
        int rank;
        double number;
        std::string text;
        lua_Integer place;
    };
    std::vector<Key> keys;
    keys.reserve(size_t(n));
    for (lua_Integer i = 1; i <= n; ++i) {
        int rank = rank_of(lua_rawgeti(L, list, i));
        keys.push_back({rank, rank == 0 ? lua_tonumber(L, -1) : 0, rank == 1 ? lua_tostring(L, -1) : "", i});
        lua_pop(L, 1);
    }
    std::stable_sort(keys.begin(), keys.end(), [](const Key& a, const Key& b) {
        return std::tie(a.rank, a.number, a.text) < std::tie(b.rank, b.number, b.text);
    });
    lua_createtable(L, int(n), 0);
    for (lua_Integer i = 1; i <= n; ++i) {
        lua_rawgeti(L, list, keys[size_t(i - 1)].place);
        lua_rawseti(L, -2, i);
    }
    lua_replace(L, list);
}
}  // namespace

static void push_guarded(lua_State* L, Function function, const std::string& full_name, int num_upvalues = 0) {
    lua_pushlightuserdata(L, reinterpret_cast<void*>(function));
    push_string(L, full_name);
    if (num_upvalues) lua_rotate(L, -(num_upvalues + 2), 2);
    lua_pushcclosure(L, guarded, num_upvalues + 2);
}

void push_function(lua_State* L, const Binding& binding, const std::string& full_name, int num_upvalues) {
    push_guarded(L, binding.function, full_name, num_upvalues);
    set_help(L, -1, full_name, binding.help);
}

void push_callable(lua_State* L, const Binding& binding, const std::string& full_name, const Binding& index) {
    lua_newtable(L);
    lua_createtable(L, 0, 3);
    lua_pushlightuserdata(L, reinterpret_cast<void*>(binding.function));
    push_string(L, full_name);
    lua_pushcclosure(L, guarded_call, 2);
    lua_setfield(L, -2, "__call");
    push_string(L, full_name);
    push_function(L, index, full_name + ".__index", 1);
    lua_setfield(L, -2, "__index");
    push_string(L, "function");
    lua_setfield(L, -2, "__name");
    lua_setmetatable(L, -2);
    set_help(L, -1, full_name, binding.help);
}

void set_functions(lua_State* L, const std::string& prefix, std::span<const Binding> bindings) {
    for (const Binding& b : bindings) {
        push_function(L, b, prefix + b.name);
        lua_setfield(L, -2, b.name);
    }
}

/// A metamethod as a script writes it: "run:__newindex" is "run.lr = …", "tensor:__add" is "tensor + …". Other names as they are. For an assignment or an index
/// the stack is still the call's.
static std::string as_written(lua_State* L, const std::string& name) {
    size_t at = name.find(":__");
    if (at == std::string::npos) return name;
    std::string type = name.substr(0, at), event = name.substr(at + 3);
    static const std::map<std::string, std::string> kOperators = {{"add", "+"}, {"sub", "-"}, {"mul", "*"}, {"div", "/"}, {"idiv", "//"}, {"mod", "%"}, {"pow", "^"}, {"concat", ".."}, {"eq", "=="}, {"lt", "<"}, {"le", "<="},
                                                                  {"band", "&"}, {"bor", "|"}, {"bxor", "~"}, {"shl", "<<"}, {"shr", ">>"}};
    if (auto it = kOperators.find(event); it != kOperators.end()) return type + " " + it->second + " …";
    if (event == "unm" || event == "bnot" || event == "len") return (event == "unm" ? "-" : event == "len" ? "#" : "~") + type;
    if (event == "tostring" || event == "pairs") return event + "(" + type + ")";
    if (event == "call") return type + "(…)";
    if (event == "close") return type + " <close>";
    if (event != "index" && event != "newindex") return name;
    std::string key = lua_type(L, 2) == LUA_TSTRING ? lua_tostring(L, 2) : "";
    bool is_name = !key.empty() && !std::isdigit(uint8_t(key[0])) && std::all_of(key.begin(), key.end(), [](uint8_t c) { return std::isalnum(c) || c == '_'; });
    return type + (is_name ? "." + key.substr(0, 80) : "[…]") + (event == "newindex" ? " = …" : "");
}

std::string running_binding(lua_State* L) {
    lua_Debug frame;
    if (!lua_getstack(L, 0, &frame) || !lua_getinfo(L, "f", &frame)) return "lua";
    std::string name = "lua";
    if (lua_iscfunction(L, -1) && (lua_tocfunction(L, -1) == guarded || lua_tocfunction(L, -1) == guarded_call) && lua_getupvalue(L, -1, 2)) {
        name = lua_tostring(L, -1);
        lua_pop(L, 1);
    }
    lua_pop(L, 1);
    return name;
}

std::string running(lua_State* L) { return as_written(L, running_binding(L)); }

void set_help(lua_State* L, int index, const std::string& name, const std::string& text) {
    index = lua_absindex(L, index);
    push_registry_table(L, kHelpTexts, "k");
    lua_pushvalue(L, index);
    push_string(L, text);
    lua_rawset(L, -3);
    lua_pop(L, 1);
    push_help_names(L);
    lua_pushvalue(L, index);
    lua_setfield(L, -2, name.c_str());
    lua_pop(L, 1);
}

void push_help_names(lua_State* L) {
    push_registry_table(L, kHelpNames, nullptr);
}

std::optional<std::string> help_of(lua_State* L, int index) {
    index = lua_absindex(L, index);
    if (lua_isnoneornil(L, index)) return std::nullopt;
    std::optional<std::string> text;
    push_registry_table(L, kHelpTexts, "k");
    lua_pushvalue(L, index);
    if (lua_rawget(L, -2) == LUA_TSTRING) text = lua_tostring(L, -1);
    lua_pop(L, 2);
    if (!text && lua_getmetatable(L, index)) {
        push_registry_table(L, kHelpTexts, "k");
        lua_insert(L, -2);
        if (lua_rawget(L, -2) == LUA_TSTRING) text = lua_tostring(L, -1);
        lua_pop(L, 2);
    }
    return text;
}

void push_string(lua_State* L, std::string_view text) { lua_pushlstring(L, text.data(), text.size()); }

void push_integers(lua_State* L, std::span<const int64_t> values) {
    lua_createtable(L, int(values.size()), 0);
    for (size_t i = 0; i < values.size(); ++i) {
        lua_pushinteger(L, values[i]);
        lua_rawseti(L, -2, lua_Integer(i + 1));
    }
}

/// __tostring: "{total = 6335488, active = 2104832}".
static int ordered_text(lua_State* L) {
    std::string text;
    for (auto& key : ordered_keys(L, 1)) {
        lua_getfield(L, 1, key.c_str());
        text += (text.empty() ? "" : ", ") + key + " = " + to_string(L, -1);
        lua_pop(L, 1);
    }
    push_string(L, "{" + text + "}");
    return 1;
}

void push_ordered_table(lua_State* L, const std::vector<std::string>& names) {
    lua_createtable(L, 0, int(names.size()));
    lua_createtable(L, 0, 2);
    lua_createtable(L, int(names.size()), 0);
    for (size_t i = 0; i < names.size(); ++i) {
        push_string(L, names[i]);
        lua_rawseti(L, -2, lua_Integer(i + 1));
    }
    lua_pushvalue(L, -1);
    lua_setfield(L, -3, "__keys");
    lua_pushcclosure(L, ordered_pairs, 1);
    lua_setfield(L, -2, "__pairs");
    lua_pushcfunction(L, ordered_text);
    lua_setfield(L, -2, "__tostring");
    lua_setmetatable(L, -2);
}

std::vector<std::string> ordered_keys(lua_State* L, int index) {
    index = lua_absindex(L, index);
    std::vector<std::string> keys;
    if (luaL_getmetafield(L, index, "__keys") == LUA_TTABLE) {
        for (lua_Integer i = 1; lua_rawgeti(L, -1, i) == LUA_TSTRING; ++i) {
            std::string key = lua_tostring(L, -1);
            lua_pop(L, 1);
            if (lua_getfield(L, index, key.c_str()) != LUA_TNIL) keys.push_back(std::move(key));
            lua_pop(L, 1);
        }
        lua_pop(L, 2);
        if (!keys.empty()) return keys;
    }
    lua_pushnil(L);
    while (lua_next(L, index)) {
        if (lua_type(L, -2) == LUA_TSTRING) keys.emplace_back(lua_tostring(L, -2));
        lua_pop(L, 1);
    }
    std::sort(keys.begin(), keys.end());
    return keys;
}

int sorted_pairs(lua_State* L) {
    luaL_checkany(L, 1);
    if (luaL_getmetafield(L, 1, "__pairs") != LUA_TNIL) {
        lua_pushvalue(L, 1);
        lua_call(L, 1, 3);
        return 3;
    }
    if (!lua_istable(L, 1)) bad_argument(L, 1, "t", "a table");
    lua_settop(L, 1);
    lua_newtable(L);
    lua_Integer n = 0;
    lua_pushnil(L);
    while (lua_next(L, 1)) {
        lua_pop(L, 1);
        lua_pushvalue(L, -1);
        lua_rawseti(L, 2, ++n);
    }
    sort_keys(L, 2, n);
    lua_pushinteger(L, 0);
    lua_pushcclosure(L, ordered_next, 2);
    lua_pushvalue(L, 1);
    lua_pushnil(L);
    return 3;
}

void each_sorted(lua_State* L, int index, const std::function<void()>& f) {
    index = lua_absindex(L, index);
    lua_pushcfunction(L, sorted_pairs);
    lua_pushvalue(L, index);
    lua_call(L, 1, 3);
    int iterate = lua_absindex(L, -3);
    for (;;) {
        lua_pushvalue(L, iterate);
        lua_pushvalue(L, iterate + 1);
        lua_pushvalue(L, iterate + 2);
        lua_call(L, 2, 2);
        if (lua_isnil(L, -2)) break;
        f();
        lua_pop(L, 1);
        lua_replace(L, iterate + 2);
    }
    lua_settop(L, iterate - 1);
}

void register_type(lua_State* L, const Type& type, Function gc) {
    std::string prefix = std::string(type.name) + ":";
    luaL_newmetatable(L, type.name);
    set_help(L, -1, type.name, type.help);
    set_functions(L, prefix, type.meta);
    lua_newtable(L);
    set_functions(L, prefix, type.methods);
    push_function(L, {"free", gc, "x:free(): gives back what x holds now, without waiting for the collector. Later uses of x are errors."}, prefix + "free");
    lua_setfield(L, -2, "free");
    lua_pushvalue(L, -1);
    lua_setfield(L, -3, "__methods");
    lua_newtable(L);
    set_functions(L, std::string(type.name) + ".", type.fields);
    lua_pushvalue(L, -1);
    lua_setfield(L, -4, "__fields");
    if (type.index) {
        push_function(L, {"__index", type.index, "x.name, x[i]: reads a field or an element."}, prefix + "__index");
    } else {
        lua_pushnil(L);
    }
    lua_pushstring(L, type.name);
    push_function(L, {"__index", index_object, "x.name: a method or a field; help(x) lists them."}, prefix + "__index", 4);
    lua_setfield(L, -2, "__index");
    if (lua_getfield(L, -1, "__newindex") == LUA_TNIL) {
        lua_pushstring(L, type.name);
        push_function(L, {"__newindex", refuse_assignment, "x.name = value: an error: the fields of this type are read only."}, prefix + "__newindex", 1);
        lua_setfield(L, -3, "__newindex");
    }
    lua_pop(L, 1);
    push_guarded(L, gc, prefix + "free");
    lua_pushvalue(L, -1);
    lua_setfield(L, -3, "__gc");
    lua_setfield(L, -2, "__close");
    lua_pushliteral(L, "protected");
    lua_setfield(L, -2, "__metatable");
    lua_pop(L, 1);
}
}  // namespace moe::lua
