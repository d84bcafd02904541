#include "lua/session/chain.h"

#include "lua/bind/config.h"

namespace moe::lua {
namespace {
constexpr int kMostIndices = 10;        // tables whose __index is a table, in a row

/// The table `name` of a userdata's metatable; false and nothing for none.
bool push_list(lua_State* L, int index, const char* name) {
    if (luaL_getmetafield(L, index, name) == LUA_TTABLE) return true;
    if (!lua_isnil(L, -1)) lua_pop(L, 1);
    return false;
}

/// Calls a C function with the object and, where given, a key; an error gives nothing.
bool push_called(lua_State* L, int index, const std::string* key) {
    if (!lua_iscfunction(L, -1)) return lua_pop(L, 1), false;
    lua_pushvalue(L, index);
    if (key) push_string(L, *key);
    if (lua_pcall(L, key ? 2 : 1, 1, 0) == LUA_OK && !lua_isnil(L, -1)) return true;
    lua_pop(L, 1);
    return false;
}

bool push_table_member(lua_State* L, int index, const std::string& key, int depth) {
    push_string(L, key);
    if (lua_rawget(L, index) != LUA_TNIL) return true;
    lua_pop(L, 1);
    int kind = depth < kMostIndices ? luaL_getmetafield(L, index, "__index") : LUA_TNIL;
    if (kind == LUA_TTABLE) {
        bool found = push_table_member(L, lua_gettop(L), key, depth + 1);
        lua_remove(L, found ? -2 : -1);
        return found;
    }
    return kind != LUA_TNIL && push_called(L, index, &key);
}
}  // namespace

Code::Code(std::string_view code) : code_(code) {
    for (auto& t : tokens(code)) {
        if (t.kind == TokenKind::comment) in_comment_ = t.open;
        else tokens_.push_back(t), in_comment_ = false;
    }
}

std::string_view Code::text(size_t i) const { return i < size() ? code_.substr(tokens_[i].begin, tokens_[i].end - tokens_[i].begin) : std::string_view(); }

size_t Code::opening(size_t close) const {
    int depth = 0;
    for (size_t i = close + 1; i-- > 0;) {
        if (tokens_[i].kind != TokenKind::symbol) continue;
        char c = text(i)[0];
        if (c == ')' || c == '}' || c == ']') ++depth;
        if ((c == '(' || c == '{' || c == '[') && --depth == 0) return i;
    }
    return npos;
}

size_t Code::enclosing(size_t i) const {
    int depth = 0;
    for (i = std::min(i, size()); i-- > 0;) {
        if (tokens_[i].kind != TokenKind::symbol) continue;
        char c = text(i)[0];
        if (c == ')' || c == '}' || c == ']') ++depth;
        if ((c == '(' || c == '{' || c == '[') && --depth < 0) return i;
    }
    return npos;
}

int Code::commas(size_t bracket, size_t i) const {
    int count = 0;
    for (size_t k = bracket + 1; k < i && k < size(); ++k) {
        if (text(k) == "," && enclosing(k) == bracket) ++count;
    }
    return count;
}

bool push_member(lua_State* L, int index, const std::string& key) {
    index = lua_absindex(L, index);
    luaL_checkstack(L, 8, "completion");
    if (lua_istable(L, index)) return push_table_member(L, index, key, 0);
    for (const char* list : {"__methods", "__fields"}) {
        if (!push_list(L, index, list)) continue;
        bool is_field = list[2] == 'f', found = lua_getfield(L, -1, key.c_str()) != LUA_TNIL;
        lua_remove(L, -2);
        if (found) return is_field ? push_called(L, index, nullptr) : true;
        lua_pop(L, 1);
    }
    int kind = luaL_getmetafield(L, index, "__index");
    if (kind == LUA_TTABLE) {
        bool found = push_table_member(L, lua_gettop(L), key, 0);
        lua_remove(L, found ? -2 : -1);
        return found;
    }
    return kind != LUA_TNIL && push_called(L, index, &key);
}

std::string string_value(std::string_view token) {
    if (token.size() >= 2 && (token[0] == '"' || token[0] == '\'')) return std::string(token.substr(1, token.size() - 2));
    return {};
}

namespace {
/// Leaves the value on the stack's top, if one was found, as the only one above `top`.
bool keep_one(lua_State* L, int top, bool found) {
    if (found && lua_gettop(L) > top + 1) lua_replace(L, top + 1);
    lua_settop(L, found ? top + 1 : top);
    return found;
}

/// Stack: an object, a number → the element.
bool push_element(lua_State* L) {
    int object = lua_gettop(L) - 1;
    if (lua_istable(L, object)) return lua_rawget(L, object) != LUA_TNIL;
    if (luaL_getmetafield(L, object, "__index") == LUA_TNIL || !lua_iscfunction(L, -1)) return false;
    lua_pushvalue(L, object);
    lua_pushvalue(L, object + 1);
    return lua_pcall(L, 2, 1, 0) == LUA_OK && !lua_isnil(L, -1);
}

/// A call that ends at token `last` and gives a configuration, moe.config "tiny" or cfg:with {…}: the defaults in its place, whose names are the same.
bool push_config_call(lua_State* L, const Code& code, size_t last) {
    bool is_text = code[last].kind == TokenKind::string;
    size_t open = is_text ? last : code.opening(last), name = open - 1;
    if (open == Code::npos || open == 0 || !code.is_name(name) || !push_chain(L, code, name)) return false;
    std::string help = help_of(L, -1).value_or("");
    lua_pop(L, 1);
    if (!help.starts_with("moe.config(") && !help.starts_with("cfg:with ")) return false;
    auto standard = std::make_shared<Config>();
    push<ConfigValue>(L, {standard, standard});
    return true;
}

bool push_link(lua_State* L, const Code& code, size_t last) {
    std::string word(code.text(last));
    if ((word == ")" || word == "}" || code[last].kind == TokenKind::string) && push_config_call(L, code, last)) return true;
    if (code.is_name(last)) {
        bool member = last > 0 && (code.text(last - 1) == "." || code.text(last - 1) == ":");
        if (!member) lua_pushglobaltable(L);
        else if (last < 2 || !push_chain(L, code, last - 2)) return false;
        return push_member(L, -1, word);
    }
    size_t open = word == "]" || word == ")" ? code.opening(last) : Code::npos;
    if (word == "]" && open != Code::npos && open > 0 && last == open + 2 && push_chain(L, code, open - 1)) {
        std::string index(code.text(open + 1));
        if (code[open + 1].kind == TokenKind::string) return push_member(L, -1, string_value(index));
        return lua_stringtonumber(L, index.c_str()) != 0 && push_element(L);
    }
    if (word == ")" && last >= 2 && open == last - 2) last -= 1;       // ("text"):rep
    if (code[last].kind != TokenKind::string || code[last].open) return false;
    push_string(L, string_value(code.text(last)));
    return true;
}
}  // namespace

bool push_chain(lua_State* L, const Code& code, size_t last) {
    if (last >= code.size()) return false;
    luaL_checkstack(L, 12, "completion");
    int top = lua_gettop(L);
    return keep_one(L, top, push_link(L, code, last));
}

bool push_callee(lua_State* L, const Code& code, size_t bracket) { return bracket != Code::npos && bracket > 0 && push_chain(L, code, bracket - 1); }
}  // namespace moe::lua
