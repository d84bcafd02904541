#include "lua/session/echo.h"

#include "lua/bind/lua.h"
#include "lua/bind/source.h"
#include "lua/session/lexer.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cmath>
#include <vector>

namespace moe::lua {
namespace {
constexpr size_t kDepth = 3, kItems = 50, kWidth = 100, kTextBytes = 200, kLines = 40;

std::string quoted_text(std::string_view text) {
    std::string out = "\"";
    for (char c : text.substr(0, kTextBytes)) {
        auto byte = static_cast<unsigned char>(c);
        if (c == '"' || c == '\\') out += {'\\', c};
        else if (c == '\n') out += "\\n";
        else if (byte < 32 || byte == 127) out += fmt::format("\\{:03d}", byte);
        else out += c;
    }
    if (text.size() <= kTextBytes) return out + "\"";
    while (!out.empty() && (static_cast<unsigned char>(out.back()) & 0xc0) == 0x80) out.pop_back();      // not half a character
    return out + "…\"";
}

bool has_meta(lua_State* L, int index, const char* name) {
    if (luaL_getmetafield(L, index, name) == LUA_TNIL) return false;
    lua_pop(L, 1);
    return true;
}

/// A table that a literal shows best: without an idea of its own how it looks, or one of push_ordered_table.
bool is_plain(lua_State* L, int index) {
    return lua_istable(L, index) && (has_meta(L, index, "__keys") || !(has_meta(L, index, "__tostring") || has_meta(L, index, "__name")));
}

/// "function moe.randn", by its help text, or "function at run.lua:12".
std::string function_text(lua_State* L, int index) {
    if (auto help = help_of(L, index)) {
        std::string name = help->substr(0, help->find_first_of(" ({\n"));
        return "function " + (name.ends_with(':') ? name.substr(0, name.size() - 1) : name);
    }
    std::string place = function_place(L, index);
    return place == "[C]" ? "function" : "function at " + place;
}

/// As tostring shows it, without the address of what has no better text.
std::string object_text(lua_State* L, int index) {
    if (lua_isfunction(L, index)) return function_text(L, index);
    std::string text = to_string(L, index);
    size_t at = text.rfind(": 0x");
    bool address = lua_type(L, index) >= LUA_TLIGHTUSERDATA && at != std::string::npos && text.find_first_not_of("0123456789abcdef", at + 4) == std::string::npos;
    return address ? text.substr(0, at) : text;
}

bool is_tensor(lua_State* L, int index) {
    if (luaL_getmetafield(L, index, "__name") == LUA_TNIL) return false;
    bool is = lua_type(L, -1) == LUA_TSTRING && std::string_view(lua_tostring(L, -1)) == "tensor";
    return lua_pop(L, 1), is;
}

/// An object inside a table: its first line, which says of a tensor what it is.
std::string line_of(lua_State* L, int index) {
    std::string text = object_text(L, index);
    size_t end = text.find('\n');
    return end == std::string::npos ? text : text.substr(0, end) + (is_tensor(L, index) ? "" : " …");
}

/// Objects have a line each.
bool is_object(lua_State* L, int index) { return lua_isuserdata(L, index) || (lua_istable(L, index) && !is_plain(L, index)); }

struct Items {
    std::vector<std::string> texts;
    bool keyless = true;
    size_t left_out = 0, objects = 0;
};

std::string literal(lua_State* L, int index, size_t indent, std::vector<const void*>& above);

std::string value_text(lua_State* L, int index, size_t indent, std::vector<const void*>& above) {
    if (lua_type(L, index) == LUA_TSTRING) {
        size_t size = 0;
        const char* data = lua_tolstring(L, index, &size);
        return quoted_text({data, size});
    }
    return is_plain(L, index) ? literal(L, index, indent, above) : line_of(L, index);
}

std::string key_text(lua_State* L, int index) {
    if (lua_type(L, index) != LUA_TSTRING) return "[" + (is_plain(L, index) ? "table" : line_of(L, index)) + "]";
    std::string key = lua_tostring(L, index);
    return is_identifier(key) ? key : "[" + quoted_text(key) + "]";
}

/// Pushes a copy of the table without the items 1 to n.
void push_without_list(lua_State* L, int index, lua_Integer n) {
    lua_newtable(L);
    lua_pushnil(L);
    while (lua_next(L, index)) {
        lua_Integer i = lua_isinteger(L, -2) ? lua_tointeger(L, -2) : 0;
        if (i >= 1 && i <= n) {
            lua_pop(L, 1);
            continue;
        }
        lua_pushvalue(L, -2);
        lua_insert(L, -2);
        lua_rawset(L, -4);
    }
}

/// The items in pairs' order: the list first, without keys. The table is at the absolute `index`.
Items items_of(lua_State* L, int index, size_t indent, std::vector<const void*>& above) {
    Items items;
    auto n = lua_Integer(lua_rawlen(L, index));
    auto add = [&](const std::string& key) {
        if (items.texts.size() >= kItems) ++items.left_out;
        else items.texts.push_back(key + value_text(L, lua_gettop(L), indent, above)), items.objects += is_object(L, -1);
    };
    for (lua_Integer i = 1; i <= std::min(n, lua_Integer(kItems)); ++i) {
        lua_rawgeti(L, index, i);
        add("");
        lua_pop(L, 1);
    }
    items.left_out = size_t(std::max<lua_Integer>(0, n - lua_Integer(kItems)));
    if (has_meta(L, index, "__pairs")) lua_pushvalue(L, index);
    else push_without_list(L, index, n);
    each_sorted(L, -1, [&] {
        lua_Integer i = lua_isinteger(L, -2) ? lua_tointeger(L, -2) : 0;
        if (i >= 1 && i <= n) return;
        items.keyless = false;
        add(key_text(L, lua_absindex(L, -2)) + " = ");
    });
    lua_pop(L, 1);
    if (items.left_out) items.texts.push_back(fmt::format("… {} more", items.left_out));
    return items;
}

/// "{… 3 items}", of a table that is too deep to be shown.
std::string count_text(lua_State* L, int index) {
    size_t count = 0;
    lua_pushnil(L);
    for (; lua_next(L, index); lua_pop(L, 1)) ++count;
    return count == 0 ? "{}" : fmt::format("{{… {} item{}}}", count, count == 1 ? "" : "s");
}

std::string literal(lua_State* L, int index, size_t indent, std::vector<const void*>& above) {
    index = lua_absindex(L, index);
    luaL_checkstack(L, 12, "echo");
    const void* self = lua_topointer(L, index);
    if (std::find(above.begin(), above.end(), self) != above.end()) return "{cycle}";
    if (above.size() >= kDepth) return count_text(L, index);
    above.push_back(self);
    Items items = items_of(L, index, indent + 2, above);
    above.pop_back();
    size_t length = indent + 2;
    bool one_line = true, deep = items.objects > 1;
    for (auto& text : items.texts) {
        length += text.size() + 2;
        if (text.find('\n') != std::string::npos) deep = true;
    }
    one_line = !deep && length <= kWidth;
    std::string out = "{", pad(indent + 2, ' ');
    size_t column = kWidth;             // where the next item would start; a list of short values shares lines
    for (size_t i = 0; i < items.texts.size(); ++i) {
        const std::string& text = items.texts[i];
        bool shares = items.keyless && !deep && column + text.size() + 2 <= kWidth;
        if (one_line) out += i ? ", " : "";
        else if (shares) out += ", ";
        else out += (i ? ",\n" : "\n") + pad;
        column = one_line || shares ? column + text.size() + 2 : pad.size() + text.size() + 1;
        out += text;
    }
    return out + (one_line ? "}" : "\n" + std::string(indent, ' ') + "}");
}
}  // namespace

std::string echo_text(lua_State* L, int index) {
    if (!is_plain(L, index)) return object_text(L, index);
    std::vector<const void*> above;
    std::string text = literal(L, index, 0, above);
    auto lines = size_t(std::count(text.begin(), text.end(), '\n')) + 1;
    if (lines <= kLines) return text;
    size_t end = 0;
    for (size_t i = 0; i + 1 < kLines; ++i) end = text.find('\n', end) + 1;
    return text.substr(0, end) + fmt::format("… {} more lines", lines - kLines + 1);
}

std::string echo_json(lua_State* L, int index) {
    nlohmann::json value;
    if (lua_isboolean(L, index)) value = bool(lua_toboolean(L, index));
    else if (lua_isinteger(L, index)) value = lua_tointeger(L, index);
    else if (lua_type(L, index) == LUA_TNUMBER) {
        double x = lua_tonumber(L, index);
        if (std::isfinite(x)) value = x;
        else value = std::isnan(x) ? "nan" : x > 0 ? "inf" : "-inf";
    } else if (!lua_isnil(L, index)) value = echo_text(L, index);
    return value.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}
}  // namespace moe::lua
