#include "lua/bind/json.h"

#include "core/base/json.h"
#include "lua/bind/bind.h"

namespace moe::lua {
namespace {
using Json = nlohmann::ordered_json;
constexpr int kMaxDepth = 200;
constexpr const char* kListType = "moe.list";    // metatable of tables that came from a JSON list: an empty one stays a list

Json table_to_json(lua_State* L, int index, int depth);

Json value_to_json(lua_State* L, int index, int depth) {
    switch (lua_type(L, index)) {
        case LUA_TNIL: return nullptr;
        case LUA_TBOOLEAN: return bool(lua_toboolean(L, index));
        case LUA_TNUMBER:
            if (lua_isinteger(L, index)) return int64_t(lua_tointeger(L, index));
            return lua_tonumber(L, index);
        case LUA_TSTRING: return check_string(L, index, "text");
        case LUA_TLIGHTUSERDATA:
            if (!lua_touserdata(L, index)) return nullptr;
            break;
        case LUA_TTABLE: return table_to_json(L, lua_absindex(L, index), depth);
        default: break;
    }
    bad_argument(L, index, "value", "nil, true, false, a number, a text or a table of them");
}

/// __tostring: "{1, 2}".
int list_text(lua_State* L) {
    luaL_checkstack(L, 6, "nested list");
    std::string text;
    for (lua_Integer i = 1, n = lua_Integer(lua_rawlen(L, 1)); i <= n; ++i) {
        lua_rawgeti(L, 1, i);
        text += (i > 1 ? ", " : "") + to_string(L, -1);
        lua_pop(L, 1);
    }
    push_string(L, "{" + text + "}");
    return 1;
}

bool is_list(lua_State* L, int index) {
    auto n = lua_Integer(lua_rawlen(L, index));
    if (n == 0) {
        if (!lua_getmetatable(L, index)) return false;
        luaL_getmetatable(L, kListType);
        bool list = lua_rawequal(L, -1, -2);
        lua_pop(L, 2);
        return list;
    }
    lua_Integer count = 0;
    lua_pushnil(L);
    while (lua_next(L, index)) {
        lua_pop(L, 1);
        ++count;
    }
    return count == n;
}

Json table_to_json(lua_State* L, int index, int depth) {
    MOE_CHECK(depth < kMaxDepth, usage, running(L), "a table that contains itself, or one nested deeper than 200", "a tree of values", "");
    luaL_checkstack(L, 6, "nested table");
    if (is_list(L, index)) {
        Json list = Json::array();
        for (lua_Integer i = 1, n = lua_Integer(lua_rawlen(L, index)); i <= n; ++i) {
            lua_rawgeti(L, index, i);
            list.push_back(value_to_json(L, -1, depth + 1));
            lua_pop(L, 1);
        }
        return list;
    }
    lua_pushnil(L);
    while (lua_next(L, index)) {
        lua_pop(L, 1);
        if (lua_type(L, -1) != LUA_TSTRING) {
            MOE_THROW(usage, running(L) + ": key of a table", got_text(L, -1), "a text, or the keys 1 … n without gaps for a list", "");
        }
    }
    Json object = Json::object();
    for (auto& key : ordered_keys(L, index)) {
        lua_getfield(L, index, key.c_str());
        object[key] = value_to_json(L, -1, depth + 1);
        lua_pop(L, 1);
    }
    return object;
}

int encode(lua_State* L) {
    Options options(L, 2, {"indent"});
    int64_t indent = options.integer("indent", -1);
    MOE_CHECK(indent >= -1 && indent <= 80, usage, "moe.json.encode: indent", std::to_string(indent), "0 to 80; -1 for one line", "");
    push_string(L, to_json(L, 1).dump(int(indent), ' ', false, Json::error_handler_t::replace));
    return 1;
}

int decode(lua_State* L) {
    std::string text = check_string(L, 1, "text");
    std::string source = lua_isnoneornil(L, 2) ? "json" : check_string(L, 2, "source");
    parse_json(text, source);    // finds keys that are there twice, and names the line of what is malformed
    push_json(L, Json::parse(text, nullptr, true, true));
    return 1;
}

const Binding kFunctions[] = {
    {"encode", encode, "moe.json.encode(value, {indent = 2}): JSON text of a value. Tables with the keys 1 … n are lists, others objects; moe.null is null.\n"
     "Example: print(moe.json.encode({ 1, \"two\", { three = moe.null } }, { indent = 2 }))"},
    {"decode", decode, "moe.json.decode(text, source): the value of a JSON text (comments allowed). Errors name `source` with line and column.\n"
     "Example: print(moe.json.decode('{\"a\": [1, 2]}').a[2])"},
};
}  // namespace

Json to_json(lua_State* L, int index) { return value_to_json(L, index, 0); }

static void push_json(lua_State* L, const Json& value, int depth) {
    MOE_CHECK(depth < kMaxDepth, data, running(L), fmt::format("JSON nested deeper than {}", kMaxDepth), "less", "");
    luaL_checkstack(L, 8, "nested JSON");
    switch (value.type()) {
        case Json::value_t::boolean: lua_pushboolean(L, value.get<bool>()); return;
        case Json::value_t::number_integer:
        case Json::value_t::number_unsigned: lua_pushinteger(L, value.get<int64_t>()); return;
        case Json::value_t::number_float: lua_pushnumber(L, value.get<double>()); return;
        case Json::value_t::string: push_string(L, value.get_ref<const std::string&>()); return;
        case Json::value_t::array: {
            lua_createtable(L, int(value.size()), 0);
            if (luaL_newmetatable(L, kListType)) {
                lua_pushcfunction(L, list_text);
                lua_setfield(L, -2, "__tostring");
            }
            lua_setmetatable(L, -2);
            lua_Integer i = 0;
            for (auto& item : value) {
                push_json(L, item, depth + 1);
                lua_rawseti(L, -2, ++i);
            }
            return;
        }
        case Json::value_t::object: {
            std::vector<std::string> names;
            for (auto& [key, item] : value.items()) {
                if (!item.is_null()) names.push_back(key);
            }
            push_ordered_table(L, names);
            for (auto& name : names) {
                push_json(L, value[name], depth + 1);
                lua_setfield(L, -2, name.c_str());
            }
            return;
        }
        default: lua_pushlightuserdata(L, nullptr); return;
    }
}

void push_json(lua_State* L, const Json& value) { push_json(L, value, 0); }

void open_json(lua_State* L) {
    lua_pushlightuserdata(L, nullptr);
    lua_setfield(L, -2, "null");
    lua_newtable(L);
    set_functions(L, "moe.json.", kFunctions);
    set_help(L, -1, "moe.json", "moe.json: encode and decode JSON text.");
    lua_setfield(L, -2, "json");
}
}  // namespace moe::lua
