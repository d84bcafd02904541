// help(x): the text of a function, a module, an object or one of its fields; for a configuration, of one of its keys.
#include "core/base/suggest.h"
#include "core/config/load.h"
#include "lua/bind/bind.h"
#include "lua/bind/config.h"
#include "lua/bind/control.h"

#include <algorithm>
#include <cctype>

namespace moe::lua {
namespace {
std::string first_sentence(const std::string& text) {
    std::string line = text.substr(0, text.find('\n'));
    return line.size() > 110 ? line.substr(0, line.find(' ', 100)) + " …" : line;
}

/// Lists a table's functions and modules, a line each, also those that it loads on first use.
void list_members(lua_State* L, int index, std::string& out) {
    index = lua_absindex(L, index);
    if (luaL_getmetafield(L, index, "__load") != LUA_TNIL) {
        lua_pushvalue(L, index);
        lua_call(L, 1, 0);
    }
    for (auto& key : ordered_keys(L, index)) {
        lua_getfield(L, index, key.c_str());
        if (auto text = help_of(L, -1); text && !key.starts_with("__")) out += "\n  " + first_sentence(*text);
        lua_pop(L, 1);
    }
}

/// Methods and fields of a userdata's type.
void list_type(lua_State* L, int index, std::string& out) {
    for (const char* list : {"__methods", "__fields"}) {
        if (luaL_getmetafield(L, index, list) == LUA_TNIL) continue;
        list_members(L, -1, out);
        lua_pop(L, 1);
    }
}

/// Pushes the function behind object.name, where there is one with a help text.
bool push_member(lua_State* L, int index, const std::string& name) {
    index = lua_absindex(L, index);
    if (lua_istable(L, index)) {
        lua_getfield(L, index, name.c_str());
        return true;
    }
    for (const char* list : {"__methods", "__fields"}) {
        if (luaL_getmetafield(L, index, list) == LUA_TNIL) continue;
        int type = lua_getfield(L, -1, name.c_str());
        lua_remove(L, -2);
        if (type != LUA_TNIL) return true;
        lua_pop(L, 1);
    }
    return false;
}

// --- search ---

constexpr size_t kMostFound = 20, kFoundBytes = 100, kLongestSearch = 200;

std::string lower(std::string text) {
    for (char& c : text) c = char(std::tolower(static_cast<unsigned char>(c)));
    return text;
}

bool has_all(const std::string& text, const std::vector<std::string>& words) {
    return std::all_of(words.begin(), words.end(), [&](auto& w) { return text.find(w) != std::string::npos; });
}

/// The line that holds the word, what is far from it left out.
std::string line_with(const std::string& text, const std::string& word) {
    size_t at = lower(text).find(word), begin = at == 0 ? 0 : text.rfind('\n', at - 1) + 1, end = std::min(text.find('\n', at), text.size());
    size_t from = begin, to = end;
    if (at - begin > kFoundBytes / 2) from = std::min(text.find(' ', at - kFoundBytes / 2), at - 1) + 1;
    if (to - from > kFoundBytes) to = std::max(std::min(text.rfind(' ', from + kFoundBytes), to), std::min(at + word.size(), end));
    return (from > begin ? "… " : "") + text.substr(from, to - from) + (to < end ? " …" : "");
}

/// Name and help text of everything that help knows, the keys of the configuration last.
std::vector<std::pair<std::string, std::string>> everything(lua_State* L) {
    luaL_getsubtable(L, LUA_REGISTRYINDEX, LUA_LOADED_TABLE);
    lua_getfield(L, -1, "moe");
    lua_getfield(L, -1, "modules");                       // those that are written in Lua load on first use
    lua_call(L, 0, 1);
    for (lua_Integer i = 1; lua_rawgeti(L, -1, i) == LUA_TSTRING; ++i, lua_pop(L, 2)) lua_getfield(L, -3, lua_tostring(L, -1));
    lua_pop(L, 4);
    std::vector<std::pair<std::string, std::string>> all;
    push_help_names(L);
    for (auto& name : ordered_keys(L, -1)) {
        lua_getfield(L, -1, name.c_str());
        if (auto text = help_of(L, -1); text && name.find(":__") == std::string::npos && name.find(".__") == std::string::npos) all.emplace_back(name, *text);
        lua_pop(L, 1);
    }
    lua_pop(L, 1);
    for (auto& field : fields()) {
        std::string text = help(field.path).text;               // the first line is its name
        all.emplace_back(field.path, text.substr(std::min(text.find_first_not_of(" \n", text.find('\n')), text.size())));
    }
    return all;
}

/// What has the words in its name, then what has them in its text, a line each. Throws (usage) where nothing has.
std::string search(lua_State* L, const std::string& text) {
    std::vector<std::string> words, names, lines[2];
    bool long_text = text.size() > kLongestSearch;
    for (size_t at = text.find_first_not_of(' '); at < text.size() && !long_text; at = text.find_first_not_of(' ', text.find(' ', at))) words.push_back(lower(text.substr(at, text.find(' ', at) - at)));
    for (auto& [name, about] : everything(L)) {
        names.push_back(name);
        if (words.empty()) continue;
        bool in_name = has_all(lower(name), words);
        if (in_name || has_all(lower(about), words)) lines[in_name ? 0 : 1].push_back("  " + name + ": " + (in_name ? first_sentence(about) : line_with(about, words[0])));
    }
    std::string out;
    const char* titles[] = {"Names with ", "Texts with "};
    for (int i : {0, 1}) {
        if (lines[i].empty()) continue;
        out += (out.empty() ? "" : "\n") + (titles[i] + text);
        for (size_t k = 0; k < std::min(lines[i].size(), kMostFound); ++k) out += "\n" + lines[i][k];
        if (lines[i].size() > kMostFound) out += fmt::format("\n  … {} more", lines[i].size() - kMostFound);
    }
    std::string shown = '"' + text.substr(0, 80) + '"';
    if (out.empty()) MOE_THROW(usage, "help", shown, "a name, or words of a name or of a help text", did_you_mean(text, names));
    return out;
}

std::string text_of(lua_State* L, int index) {
    auto text = help_of(L, index);
    if (!text && lua_type(L, index) == LUA_TSTRING) {
        // A name: a type ("tensor"), a binding ("tensor:sum", "moe.run") or a key of the configuration; else words to search for.
        std::string name = lua_tostring(L, index);
        push_help_names(L);
        bool known = lua_getfield(L, -1, name.c_str()) != LUA_TNIL;
        std::string found = known ? text_of(L, -1) : "";
        lua_pop(L, 2);
        if (known) return found;
        try {
            return help(name).text;
        } catch (const Error&) {
            return search(L, name);
        }
    }
    if (lua_isnil(L, index)) return "nil: nothing has this name yet. help(moe) lists what there is, help \"words\" searches.";
    if (!text) return got_text(L, index) + ": " + to_string(L, index);
    if (lua_istable(L, index)) {
        index = lua_absindex(L, index);
        lua_pushliteral(L, "__methods");
        bool is_type = lua_rawget(L, index) == LUA_TTABLE;
        lua_pop(L, 1);
        if (is_type) {
            for (const char* list : {"__methods", "__fields"}) {
                lua_pushstring(L, list);
                if (lua_rawget(L, index) == LUA_TTABLE) list_members(L, -1, *text);
                lua_pop(L, 1);
            }
        } else if (luaL_getmetafield(L, index, "__methods") == LUA_TTABLE) {      // an object of a type that is written in Lua
            list_members(L, -1, *text);
            lua_pop(L, 1);
        } else {
            list_members(L, index, *text);
        }
    } else if (lua_isuserdata(L, index)) {
        list_type(L, index, *text);
    }
    return *text;
}

int help_text(lua_State* L) {
    if (lua_isnone(L, 1)) bad_argument(L, 1, "x", "a value, or a name");
    if (lua_isnoneornil(L, 2)) {
        push_string(L, text_of(L, 1));
        return 1;
    }
    std::string name = check_string(L, 2, "name");
    if (test_box<ConfigValue>(L, 1) && !push_member(L, 1, name)) {
        push_string(L, help(name).text);
        return 1;
    }
    if (!test_box<ConfigValue>(L, 1) && !push_member(L, 1, name)) {
        MOE_THROW(usage, "help", name, "a method or field of " + got_text(L, 1), "help(x) lists them");
    }
    push_string(L, text_of(L, -1));
    return 1;
}

int print_help(lua_State* L) {
    if (lua_gettop(L) == 0) lua_getglobal(L, "moe");
    help_text(L);
    Control& c = control(L);
    if (auto& out = c.page ? c.page : c.print) out(check_string(L, -1, "text") + "\n");
    return 0;
}

int document(lua_State* L) {
    if (!lua_isfunction(L, 1) && !lua_istable(L, 1)) bad_argument(L, 1, "value", "a function or a module");
    set_help(L, 1, check_string(L, 2, "name"), check_string(L, 3, "text"));
    lua_settop(L, 1);
    if (lua_istable(L, 1)) {
        lua_pushliteral(L, "__methods");
        bool is_type = lua_rawget(L, 1) == LUA_TTABLE;
        lua_settop(L, 1);
        if (is_type) guard_type(L);
    }
    return 1;
}

int documented(lua_State* L) {
    push_help_names(L);
    lua_newtable(L);
    lua_pushnil(L);
    while (lua_next(L, -3)) {
        lua_pushvalue(L, -2);
        lua_insert(L, -2);
        lua_rawset(L, -4);
    }
    return 1;
}

const Binding kFunctions[] = {
    {"help", print_help,
     "help(x), help(x, \"name\"): prints what a function, module or object is, or one of its methods, fields or keys. help(cfg, \"model.moe.num_experts\") explains a key. help \"words\" that name nothing: searches names, then texts, for all of them.\nExample: help(moe.config \"tiny\", \"model.moe.num_experts\")"},
    {"help_text", help_text, "moe.help_text(x, name): the text that help prints.\nExample: print(moe.help_text \"tensor:sum\")"},
    {"document", document, "moe.document(f, \"module.name\", text): gives a function, a module or a type written in Lua (a metatable whose __methods lists its methods) its help text. Returns it. A line \"Example: code\" at the end is shown as code and run by the tests.\n"
     "Example: print(moe.help_text(moe.document(function(x) return 2 * x end, \"mine.double\", \"mine.double(x): twice x.\")))"},
    {"documented", documented, "moe.documented(): name → value of everything that has a help text.\nExample: for name in pairs(moe.documented()) do if name:find(\"^moe.json\") then print(name) end end"},
};
}  // namespace

void open_help(lua_State* L) { set_functions(L, "moe.", kFunctions); }
}  // namespace moe::lua
