#include "lua/bind/source.h"

#include "core/base/json.h"
#include "core/base/log.h"
#include "core/train/interventions.h"
#include "lua/bind/bytecode.h"
#include "lua/bind/control.h"
#include "lua/bind/tensor.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <regex>
#include <set>

namespace moe::lua {
namespace {
using Json = nlohmann::ordered_json;
constexpr int kMaxDepth = 20;

bool is_word(char c) { return std::isalnum(uint8_t(c)) || c == '_'; }

/// Places of a word in text[from, to).
std::vector<size_t> places_of(const std::string& text, const std::string& word, size_t from, size_t to) {
    std::vector<size_t> out;
    for (size_t at = text.find(word, from); at != std::string::npos && at < to; at = text.find(word, at + 1))
        if ((at == 0 || !is_word(text[at - 1])) && (at + word.size() >= text.size() || !is_word(text[at + word.size()]))) out.push_back(at);
    return out;
}

/// "function name.a:b(" as "function(self, ".
std::string nameless(const std::string& source) {
    static const std::regex named(R"(^function\s+[\w.]+(:\w+)?\s*\()");
    std::smatch m;
    if (!std::regex_search(source, m, named)) return source;
    std::string rest = source.substr(size_t(m.length()));
    if (!m[1].matched) return "function(" + rest;
    size_t next = rest.find_first_not_of(" \t\r\n");
    return "function(self" + std::string(next != std::string::npos && rest[next] == ')' ? "" : ", ") + rest;
}

/// A chunk that returns the function, with locals for its upvalues; lines count as in the original.
std::string chunk_of(const std::string& source, const std::vector<std::string>& upvalues, int line) {
    std::string locals;
    for (auto& name : upvalues)
        if (name != "_ENV") locals += (locals.empty() ? "" : ", ") + name;
    return std::string(size_t(std::max(0, line - 1)), '\n') + (locals.empty() ? "" : "local " + locals + " = ...; ") + "return " + source;
}

/// The texts that a chunk of this name may have come from, likely ones first.
std::vector<std::string> texts_of(lua_State* L, const std::string& chunk) {
    std::vector<std::string> texts;
    if (chunk.empty()) return texts;
    if (chunk[0] != '@' && chunk[0] != '=') return {chunk};
    for (auto& [name, text] : session_control(L).chunks)
        if (name == chunk) texts.push_back(text);
    std::error_code error;
    if (chunk[0] == '@' && std::filesystem::is_regular_file(chunk.substr(1), error)) {
        std::string text = read_text(chunk.substr(1));
        if (!text.empty() && text[0] == '#') text = "--" + text;
        texts.push_back(std::move(text));
    }
    return texts;
}

struct Found {
    std::string source;
    int line = 0;
};

std::optional<Found> find_source(lua_State* L, int index, const std::vector<std::string>& upvalues) {
    lua_Debug d;
    lua_pushvalue(L, index);
    lua_getinfo(L, ">S", &d);
    std::string want = code_of(L, index);
    for (const std::string& text : texts_of(L, d.source)) {
        auto line_start = [&](int line) {
            size_t at = 0;
            for (int i = 1; i < line && at != std::string::npos; ++i) {
                at = text.find('\n', at);
                if (at != std::string::npos) ++at;
            }
            return at;
        };
        size_t first = line_start(d.linedefined), first_end = line_start(d.linedefined + 1), last = line_start(d.lastlinedefined), last_end = line_start(d.lastlinedefined + 1);
        if (first == std::string::npos || last == std::string::npos) continue;
        for (size_t begin : places_of(text, "function", first, std::min(first_end, text.size())))
            for (size_t end : places_of(text, "end", std::max(begin, last), std::min(last_end, text.size()))) {
                Found found{nameless(text.substr(begin, end + 3 - begin)), d.linedefined};
                std::string chunk = chunk_of(found.source, upvalues, d.linedefined);
                bool same = false;
                if (luaL_loadbufferx(L, chunk.data(), chunk.size(), "=hook", "t") == LUA_OK) {
                    for (size_t i = 0; i < upvalues.size(); ++i) lua_pushnil(L);
                    same = lua_pcall(L, int(upvalues.size()), 1, 0) == LUA_OK && lua_isfunction(L, -1) && !lua_iscfunction(L, -1) && code_of(L, -1) == want;
                }
                lua_pop(L, 1);
                if (same) return found;
            }
    }
    return std::nullopt;
}

/// {module =, name =} of a function or module of Lua or moe; null for another value.
Json builtin_of(lua_State* L, int index) {
    index = lua_absindex(L, index);
    lua_getfield(L, LUA_REGISTRYINDEX, LUA_LOADED_TABLE);
    int loaded = lua_gettop(L);
    Json out;
    for (lua_pushnil(L); out.is_null() && lua_next(L, loaded); lua_pop(L, 1)) {
        if (lua_type(L, -2) != LUA_TSTRING) continue;
        std::string module = lua_tostring(L, -2);
        // A script's own globals and modules are not there in another session: their functions go by source.
        bool ours = module == "moe" || module.starts_with("moe.");
        static const std::set<std::string> kLibraries = {"_G", "math", "string", "table", "coroutine", "utf8", "os", "io", "debug", "package"};
        if (!ours && !kLibraries.contains(module)) continue;
        if (!ours && lua_type(L, index) == LUA_TFUNCTION && !lua_iscfunction(L, index)) continue;
        if (lua_rawequal(L, -1, index)) out = {{"module", module}};
        if (!lua_istable(L, -1) || !out.is_null() || (!ours && lua_type(L, index) != LUA_TFUNCTION)) continue;
        int table = lua_gettop(L);
        for (lua_pushnil(L); out.is_null() && lua_next(L, table); lua_pop(L, 1))
            if (lua_type(L, -2) == LUA_TSTRING && lua_rawequal(L, -1, index)) out = {{"module", module}, {"name", lua_tostring(L, -2)}};
    }
    lua_settop(L, loaded - 1);
    return out;
}

Json value_of(lua_State* L, int index, const std::string& path, int depth);

/// Functions that are being stored, the outermost first, and the globals that they were found to read.
struct Storing {
    std::vector<const void*> functions;
    std::set<std::string> globals;
};
thread_local Storing storing;

/// The user's globals that a function reads and does not change, as upvalues by their names: at the prompt every variable is a global. What cannot be stored stays the session's.
void add_globals(lua_State* L, const std::set<std::string>& names, const std::string& place, int depth, Json& upvalues) {
    for (const std::string& name : names) {
        const int top = lua_gettop(L);           // what could not be stored leaves its parts there
        lua_pushglobaltable(L);
        push_string(L, name);
        lua_rawget(L, -2);
        lua_remove(L, -2);
        Json builtin = builtin_of(L, -1);
        bool of_lua = builtin.is_object() && (builtin.value("name", "") == name || builtin.value("module", "") == name);
        if (!lua_isnil(L, -1) && !of_lua) {
            try {
                bool within = std::find(storing.functions.begin(), storing.functions.end(), lua_topointer(L, -1)) != storing.functions.end();
                MOE_CHECK(!within, usage, "a hook: global " + name, "a function that calls itself", "one that is local", "");
                upvalues.push_back({name, value_of(L, -1, name, depth + 1)});
                storing.globals.insert(name);
            } catch (const Error& e) {
                log::warn(fmt::format("the function of {} reads the global {}, which is not stored with it: a resume or replay may find another one, or none ({})", place, name, e.parts().got));
            }
        }
        lua_settop(L, top);
    }
}

Json function_of(lua_State* L, int index, int depth) {
    index = lua_absindex(L, index);
    MOE_CHECK(depth < kMaxDepth, usage, "a hook", "functions that hold each other", "plain upvalues", "");
    struct Within {
        explicit Within(const void* f) { storing.functions.push_back(f); }
        ~Within() { storing.functions.pop_back(); }
    } within(lua_topointer(L, index));
    std::vector<std::string> names;
    Json upvalues = Json::array();
    for (int i = 1; const char* name = lua_getupvalue(L, index, i); ++i) {
        names.emplace_back(name);
        lua_pop(L, 1);
    }
    std::string place = function_place(L, index);
    auto found = find_source(L, index, names);
    MOE_CHECK(found, usage, "a hook", "the function of " + place, "one whose source is known",
              "write it as function(…) … end in the script or input itself, without <const> locals and not through a file that has changed since; or { replay = false }");
    OuterNames outer = outer_names(L, index);
    for (size_t i = 0; i < names.size(); ++i) {
        MOE_CHECK(!outer.assigned.contains(int(i)), usage, "a hook: upvalue " + names[i], "an assignment to it in the function of " + place, "upvalues that are only read: the run holds copies of them",
                  "assign to a global, or give { replay = false }, which takes the function as it is");
        lua_getupvalue(L, index, int(i) + 1);
        Json value;
        if (names[i] != "_ENV") value = value_of(L, -1, names[i], depth + 1);
        lua_pop(L, 1);
        if (names[i] != "_ENV") upvalues.push_back({names[i], value});
        else upvalues.push_back({names[i], nullptr});
    }
    for (auto& name : outer.written) outer.read.erase(name);
    for (auto& name : names) outer.read.erase(name);
    add_globals(L, outer.read, place, depth, upvalues);
    return {{"source", found->source}, {"name", place}, {"line", found->line}, {"upvalues", upvalues}};
}

Json value_of(lua_State* L, int index, const std::string& path, int depth) {
    index = lua_absindex(L, index);
    MOE_CHECK(depth < kMaxDepth, usage, "a hook: upvalue " + path, "a table that contains itself, or a deep one", "a tree of plain values", "");
    luaL_checkstack(L, 8, "a value");
    switch (lua_type(L, index)) {
        case LUA_TNIL: return nullptr;
        case LUA_TBOOLEAN: return bool(lua_toboolean(L, index));
        case LUA_TNUMBER:
            if (lua_isinteger(L, index)) return int64_t(lua_tointeger(L, index));
            if (double x = lua_tonumber(L, index); !std::isfinite(x)) return {{"number", std::isnan(x) ? "nan" : x > 0 ? "inf" : "-inf"}};
            return lua_tonumber(L, index);
        case LUA_TSTRING: return std::string(lua_tostring(L, index), lua_rawlen(L, index));
        case LUA_TUSERDATA:
            if (test_box<at::Tensor>(L, index)) return train::tensor_to_values(check_tensor(L, index, path.c_str()));
            break;
        case LUA_TFUNCTION:
            if (Json builtin = builtin_of(L, index); !builtin.is_null()) return {{"builtin", builtin}};
            if (!lua_iscfunction(L, index)) return {{"function", function_of(L, index, depth)}};
            break;
        case LUA_TTABLE: {
            if (Json builtin = builtin_of(L, index); !builtin.is_null()) return {{"builtin", builtin}};
            if (lua_getmetatable(L, index)) {
                lua_pop(L, 1);
                break;
            }
            Json list = Json::array();
            for (lua_pushnil(L); lua_next(L, index); lua_pop(L, 1)) {
                Json key = value_of(L, -2, path, depth + 1);
                list.push_back(Json::array({key, value_of(L, -1, path + "." + to_string(L, -2), depth + 1)}));
            }
            return {{"table", list}};
        }
        default: break;
    }
    MOE_THROW(usage, "a hook: upvalue " + path, got_text(L, index), "a plain value: nil, boolean, number, text, tensor, a table of them, or a function of Lua or moe",
              "make it inside of the function, or give { replay = false }: the run then cannot be replayed or resumed with it");
}
}  // namespace

std::string function_place(lua_State* L, int index) {
    lua_Debug d;
    lua_pushvalue(L, index);
    lua_getinfo(L, ">S", &d);
    return d.linedefined > 0 ? fmt::format("{}:{}", d.short_src, d.linedefined) : d.short_src;
}

Json to_values(lua_State* L, int index, const std::string& path) { return value_of(L, index, path, 0); }

Json function_to_values(lua_State* L, int index) {
    if (Json builtin = builtin_of(L, index); !builtin.is_null()) return {{"builtin", builtin}, {"name", builtin.value("module", "") + "." + builtin.value("name", "")}};
    MOE_CHECK(!lua_iscfunction(L, index), usage, "a hook", "a function that is not Lua's", "function(…) … end", "");
    storing.globals.clear();
    Json f = function_of(L, index, 0);
    if (!storing.globals.empty()) log::info(fmt::format("the function of {} keeps the values that these globals have now: {}", function_place(L, index), fmt::join(storing.globals, ", ")));
    return f;
}

void push_values(lua_State* L, const Json& v) {
    luaL_checkstack(L, 8, "a value");
    if (v.is_null()) lua_pushnil(L);
    else if (v.is_boolean()) lua_pushboolean(L, v.get<bool>());
    else if (v.is_number_integer()) lua_pushinteger(L, v.get<int64_t>());
    else if (v.is_number()) lua_pushnumber(L, v.get<double>());
    else if (v.is_string()) push_string(L, v.get<std::string>());
    else if (v.contains("number")) lua_pushnumber(L, v["number"] == "nan" ? std::nan("") : v["number"] == "inf" ? HUGE_VAL : -HUGE_VAL);
    else if (train::is_tensor_values(v)) push_tensor(L, train::tensor_from_values(v));
    else if (v.contains("function")) push_function_of(L, v["function"]);
    else if (v.contains("builtin")) {
        lua_getfield(L, LUA_REGISTRYINDEX, LUA_LOADED_TABLE);
        lua_getfield(L, -1, v["builtin"].at("module").get<std::string>().c_str());
        lua_remove(L, -2);
        if (v["builtin"].contains("name")) {
            MOE_CHECK(lua_istable(L, -1), data, "a stored function", v["builtin"].dump(), "a function of this program", "");
            lua_getfield(L, -1, v["builtin"]["name"].get<std::string>().c_str());
            lua_remove(L, -2);
        }
    } else if (v.contains("table")) {
        lua_newtable(L);
        for (auto& pair : v["table"]) {
            push_values(L, pair.at(0));
            push_values(L, pair.at(1));
            lua_rawset(L, -3);
        }
    } else MOE_THROW(data, "a stored value", brief(nlohmann::json(v)), "a plain value", "");
}

void push_function_of(lua_State* L, const Json& values) {
    luaL_checkstack(L, 8, "a function");
    if (values.contains("builtin")) return push_values(L, {{"builtin", values["builtin"]}});
    try {
        std::vector<std::string> names;
        for (auto& up : values.at("upvalues")) names.push_back(up.at(0));
        std::string chunk = chunk_of(values.at("source"), names, values.value("line", 1)), name = "=" + values.value("name", "hook");
        if (size_t colon = name.rfind(':'); colon != std::string::npos) name.resize(colon);         // the line is counted anyway
        if (luaL_loadbufferx(L, chunk.data(), chunk.size(), name.c_str(), "t") != LUA_OK) {
            std::string message = to_string(L, -1);
            lua_pop(L, 1);
            MOE_THROW(data, "a stored function", message, "Lua", "");
        }
        // The function may be stored again: its source is this, where a text of the session under the same name does not have it.
        auto& chunks = session_control(L).chunks;
        if (std::find(chunks.begin(), chunks.end(), std::pair(name, chunk)) == chunks.end()) remember_chunk(session_control(L), name, chunk);
        int count = 0;
        for (auto& up : values["upvalues"])
            if (up.at(0) != "_ENV") push_values(L, up.at(1)), ++count;
        lua_call(L, count, 1);
    } catch (const Json::exception& e) {
        MOE_THROW(data, "a stored function", e.what(), "{source, name, upvalues}", "");
    }
}
}  // namespace moe::lua
