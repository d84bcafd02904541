#include "lua/session/complete.h"

#include "core/config/load.h"
#include "core/config/names.h"
#include "lua/bind/lua.h"
#include "lua/session/chain.h"
#include "lua/session/modules.h"
#include "lua/session/signature.h"

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <set>

namespace moe::lua {
namespace {
namespace fs = std::filesystem;
using Names = std::vector<std::string>;
constexpr lua_Integer kMostIds = 512;
constexpr int kMostRuns = 50, kMostPairs = 1000;
constexpr size_t kLongestSearch = 100;

void add_keys(lua_State* L, int index, bool functions_only, Names& out) {
    index = lua_absindex(L, index);
    for (auto& key : ordered_keys(L, index)) {
        if (!is_identifier(key)) continue;
        lua_getfield(L, index, key.c_str());
        if (!functions_only || lua_isfunction(L, -1)) out.push_back(key);
        lua_pop(L, 1);
    }
}

/// The string keys that a C __pairs gives: of configurations and their sections.
void add_pairs(lua_State* L, int index, Names& out) {
    index = lua_absindex(L, index);
    int top = lua_gettop(L);
    if (luaL_getmetafield(L, index, "__pairs") != LUA_TNIL && lua_iscfunction(L, -1)) {
        lua_pushvalue(L, index);
        lua_call(L, 1, 3);
        for (int i = 0; i < kMostPairs; ++i) {
            lua_pushvalue(L, top + 1);
            lua_pushvalue(L, top + 2);
            lua_pushvalue(L, top + 3);
            lua_call(L, 2, 2);
            if (lua_isnil(L, -2)) break;
            if (lua_type(L, -2) == LUA_TSTRING) out.emplace_back(lua_tostring(L, -2));
            lua_pop(L, 1);
            lua_replace(L, top + 3);
        }
    }
    lua_settop(L, top);
}

/// Fields of the value on the stack's top, after "." (methods where it has no fields of that start), or its methods, after ":".
Names members(lua_State* L, bool method, const std::string& prefix) {
    Names out;
    int object = lua_gettop(L);
    bool keys_are_private = false;
    for (int i = 0; i < 10 && lua_istable(L, -1); ++i) {           // the table, and those that its __index names
        bool marked = luaL_getmetafield(L, -1, "__keys") != LUA_TNIL;
        if (marked) lua_pop(L, 1);
        add_keys(L, -1, method, out);
        keys_are_private |= marked;
        if (luaL_getmetafield(L, -1, "__index") == LUA_TNIL) break;
    }
    lua_settop(L, object);
    lua_getglobal(L, "moe");
    if (lua_rawequal(L, object, -1) && !method)
        for (auto& name : module_names()) out.push_back(name);
    lua_settop(L, object);
    if (lua_istable(L, object)) return out;
    if (lua_type(L, object) == LUA_TSTRING) {
        luaL_getmetafield(L, object, "__index");
        if (lua_istable(L, -1)) add_keys(L, -1, true, out);
    } else if (lua_isuserdata(L, object)) {
        if (!method) {
            if (luaL_getmetafield(L, object, "__fields") == LUA_TTABLE) add_keys(L, -1, false, out);
            lua_settop(L, object);
            add_pairs(L, object, out);
            bool any = std::any_of(out.begin(), out.end(), [&](auto& n) { return n.starts_with(prefix); });
            if (any) return out;
        }
        if (luaL_getmetafield(L, object, "__methods") == LUA_TTABLE) add_keys(L, -1, true, out);
    }
    lua_settop(L, object);
    return out;
}

std::string type_name(lua_State* L, int index) {
    std::string name;
    if (luaL_getmetafield(L, index, "__name") != LUA_TNIL) {
        if (lua_type(L, -1) == LUA_TSTRING) name = lua_tostring(L, -1);
        lua_pop(L, 1);
    }
    return name;
}

// --- what a help text says about its function's arguments ---

/// A function's name and help text: the bracket's or the text's at token `at`, "" where it has none.
struct Callee {
    std::string name, help;
    bool of_config = false;         ///< a method of a configuration
    int argument = 0;               ///< 0: the first
};

/// The call whose argument starts at token `i`: f(…, i), f i.
Callee callee_of(lua_State* L, const Code& code, size_t i) {
    Callee c;
    size_t last = i - 1;
    if (i == 0) return c;
    if (code.text(last) == "(" || code.text(last) == ",") {
        size_t bracket = code.enclosing(i);
        if (bracket == Code::npos || bracket == 0 || code.text(bracket) != "(") return c;
        c.argument = code.commas(bracket, i);
        last = bracket - 1;
    }
    if (!code.is_name(last)) return c;
    c.name = code.text(last);
    int top = lua_gettop(L);
    if (last >= 2 && code.text(last - 1) == ":" && push_chain(L, code, last - 2)) c.of_config = type_name(L, -1) == "config";
    lua_settop(L, top);
    if (push_chain(L, code, last)) c.help = help_of(L, -1).value_or("");
    lua_settop(L, top);
    return c;
}

/// Keys and sections of the configuration's section at `path`; none where there is no such section.
Names config_keys(const std::string& path) {
    try {
        return help(path).keys;
    } catch (const Error&) {
        return {};
    }
}

/// Keys of the option table whose open brace encloses token `i`.
Names option_keys(lua_State* L, const Code& code, size_t i) {
    std::string path;
    size_t brace = code.enclosing(i);
    auto is_value = [&](size_t b) { return b >= 2 && b != Code::npos && code.text(b) == "{" && code.text(b - 1) == "=" && code.is_name(b - 2); };
    Names outer;
    while (is_value(brace)) {
        outer.emplace_back(code.text(brace - 2));
        brace = code.enclosing(brace - 2);
    }
    if (brace == Code::npos || brace == 0 || code.text(brace) != "{") return {};
    Callee callee = callee_of(L, code, brace);
    bool changes = callee.of_config && callee.name == "with";
    changes |= callee.name == "config" && callee.help.starts_with("moe.config");
    Names names = option_names(callee.help, callee.argument, changes);
    if (!outer.empty() && outer.back() == "config" && !changes) {
        changes = true;
        outer.pop_back();
    } else if (!outer.empty() && !changes) {
        return {};
    }
    if (changes) {
        for (auto name = outer.rbegin(); name != outer.rend(); ++name) path += (path.empty() ? "" : ".") + *name;
        names = config_keys(path);
    }
    for (auto& name : names) name += " = ";
    return names;
}

// --- texts ---

/// Runs below the default output_dir, newest first: {name, folder}.
std::vector<std::pair<std::string, fs::path>> runs() {
    std::vector<std::pair<std::string, fs::path>> list;
    std::error_code e;
    for (fs::directory_iterator name(Config().output_dir, e), end; !e && name != end; name.increment(e)) {
        std::error_code inner;
        for (fs::directory_iterator run(name->path(), inner); !inner && run != end; run.increment(inner)) list.emplace_back(name->path().filename().string(), run->path());
    }
    std::sort(list.begin(), list.end(), [](auto& a, auto& b) { return a.second.filename() > b.second.filename(); });
    if (list.size() > size_t(kMostRuns)) list.resize(size_t(kMostRuns));
    return list;
}

Names saves() {
    Names names = {"last"};
    for (auto& run : runs()) {
        std::error_code e;
        for (fs::directory_iterator save(run.second / "checkpoints", e), end; !e && save != end; save.increment(e)) names.push_back(save->path().filename().string());
    }
    return names;
}

std::string expanded(const std::string& path) {
    const char* home = std::getenv("HOME");
    return home && (path == "~" || path.starts_with("~/")) ? home + path.substr(1) : path;
}

/// Files and folders (with "/" behind) whose path starts with `prefix`.
Names paths(const std::string& prefix) {
    size_t slash = prefix.rfind('/');
    std::string folder = slash == std::string::npos ? "" : prefix.substr(0, slash + 1), start = prefix.substr(folder.size());
    Names names;
    std::error_code e;
    for (fs::directory_iterator file(folder.empty() ? "." : expanded(folder), fs::directory_options::skip_permission_denied, e), end; !e && file != end; file.increment(e)) {
        std::string name = file->path().filename().string();
        std::error_code ignored;
        if (name.starts_with(start) && (name[0] != '.' || start.starts_with("."))) names.push_back(folder + name + (file->is_directory(ignored) ? "/" : ""));
    }
    return names;
}

Names all_config_keys() {
    Names names;
    for (auto& field : fields()) names.push_back(field.path);
    return names;
}

/// Names that help(x, "…") knows of the value on the stack's top.
Names help_names(lua_State* L) {
    if (type_name(L, -1) == "config") return all_config_keys();
    Names names = members(L, false, ""), methods = members(L, true, "");
    names.insert(names.end(), methods.begin(), methods.end());
    return names;
}

/// What the text that starts at token `i` may be, as its place says: the argument of a call, the value of an option, a key.
Names text_values(lua_State* L, const Code& code, size_t i) {
    std::string_view before = i > 0 ? code.text(i - 1) : std::string_view();
    if (before == "=" && code.is_name(i - 2)) {
        std::string option(code.text(i - 2));
        size_t brace = code.enclosing(i);
        if (option == "config" || option == "base") return config_names();
        if (brace == Code::npos || code.text(brace) != "{") return {};
        Callee callee = callee_of(L, code, brace);
        Names names;
        if (option == "name")
            for (auto& run : runs()) names.push_back(run.first);
        if (option == "resume") return saves();
        return names.empty() ? quoted_words(callee.help) : names;
    }
    if (before == "[") {                // ["model.moe.num_experts"] = …
        size_t brace = code.enclosing(i - 1);
        return brace != Code::npos && code.text(brace) == "{" ? all_config_keys() : Names();
    }
    Callee callee = callee_of(L, code, i);
    if (callee.name == "help" && callee.argument == 1) return i >= 2 && push_chain(L, code, i - 2) ? help_names(L) : all_config_keys();
    if (callee.name == "help") {
        push_help_names(L);
        Names names = ordered_keys(L, -1), keys = all_config_keys();
        names.insert(names.end(), keys.begin(), keys.end());
        return names;
    }
    if (callee.name == "resume" || callee.name == "restore") return saves();
    if (callee.name == "require" || callee.name == "reload") {
        Names names;
        for (auto& name : module_names()) names.push_back("moe." + name);
        return names;
    }
    if (callee.name == "config" && callee.argument == 0) return config_names();
    return quoted_words(callee.help);
}

// --- everything ---

/// Ids of an object with a length, from 0 for our own types.
Names ids(lua_State* L) {
    Names names;
    if (lua_istable(L, -1)) {
        Names keys;
        add_keys(L, -1, false, keys);
        for (auto& key : keys) names.push_back('"' + key + "\"]");
        auto n = std::min(lua_Integer(lua_rawlen(L, -1)), kMostIds);
        for (lua_Integer i = 1; i <= n; ++i) names.push_back(std::to_string(i) + "]");
    } else if (luaL_getmetafield(L, -1, "__len") != LUA_TNIL) {
        bool ours = lua_iscfunction(L, -1);
        lua_pushvalue(L, -2);
        if (ours && lua_pcall(L, 1, 1, 0) == LUA_OK) {
            auto n = std::min(lua_tointeger(L, -1), kMostIds);
            for (lua_Integer i = 0; i < n; ++i) names.push_back(std::to_string(i) + "]");
        }
    }
    return names;
}

Names globals(lua_State* L, std::string_view whole, size_t cursor) {
    Names names = keywords();
    lua_pushglobaltable(L);
    add_keys(L, -1, false, names);
    lua_pop(L, 1);
    for (auto& t : tokens(whole)) {         // names of the input itself: locals, parameters
        if (t.kind == TokenKind::name && !(t.begin < cursor && cursor <= t.end)) names.emplace_back(whole.substr(t.begin, t.end - t.begin));
    }
    return names;
}

/// Sorted and once each, those that start with the prefix; names with "_" in front only where it is asked for.
Names chosen(Names names, const std::string& prefix) {
    std::erase_if(names, [&](auto& n) { return !n.starts_with(prefix) || (prefix.empty() && n.starts_with("_")); });
    std::set<std::string> once(names.begin(), names.end());
    return {once.begin(), once.end()};
}
}  // namespace

Completion complete(lua_State* L, std::string_view whole, size_t cursor) {
    cursor = std::min(cursor, whole.size());
    std::string_view text = whole.substr(0, cursor);
    Code code(text);
    Completion c{cursor, cursor, {}};
    if (code.in_comment()) return c;
    int top = lua_gettop(L);
    size_t i = code.size();
    if (i > 0 && code[i - 1].open) {        // inside a text
        size_t begin = code[i - 1].begin;
        begin += text[begin] == '[' ? text.find('[', begin + 1) - begin + 1 : 1;
        c.begin = std::min(begin, cursor);
        std::string prefix(text.substr(c.begin));
        c.matches = chosen(text_values(L, code, i - 1), prefix);
        if (c.matches.empty() || prefix.find('/') != std::string::npos) c.matches = chosen(paths(prefix), prefix);
        lua_settop(L, top);
        return c;
    }
    bool in_word = i > 0 && code[i - 1].end == cursor && (code[i - 1].kind == TokenKind::name || code[i - 1].kind == TokenKind::keyword || code[i - 1].kind == TokenKind::number);
    if (in_word) c.begin = code[--i].begin;
    std::string prefix(text.substr(c.begin));
    std::string_view before = i > 0 ? code.text(i - 1) : std::string_view();
    Names names;
    bool is_number = in_word && code[i].kind == TokenKind::number;
    if (before == "." || before == ":") {
        if (i >= 2 && push_chain(L, code, i - 2)) names = members(L, before == ":", prefix);
    } else if (before == "[" && (prefix.empty() || is_number)) {
        if (i >= 2 && push_chain(L, code, i - 2)) names = ids(L);
        c.matches.clear();
        for (auto& name : names)
            if (name.starts_with(prefix)) c.matches.push_back(name);           // in their own order
        lua_settop(L, top);
        return c;
    } else if (!is_number) {
        if (before == "{" || before == "," || before == ";") names = option_keys(L, code, i);
        if (names.empty() && prefix.empty() && (before == "(" || before == ",")) {
            Callee callee = callee_of(L, code, i);
            lua_settop(L, top);
            if (!callee.help.empty()) {                                     // an argument begins: what it is, and not every name there is
                bool changes = false;
                c.note = note_of(callee.help);
                for (auto& name : option_names(callee.help, callee.argument, changes)) c.matches.push_back("{ " + name + " = ");
                std::sort(c.matches.begin(), c.matches.end());
                return c;
            }
        }
        bool own = std::any_of(names.begin(), names.end(), [&](auto& n) { return n.starts_with(prefix); });
        if (!own && !(prefix.empty() && before == "")) names = globals(L, whole, cursor);
        else if (!own) names = globals(L, "", 0);
    }
    lua_settop(L, top);
    c.matches = chosen(std::move(names), prefix);
    return c;
}

// --- inspection ---

namespace {
/// "function at input 3:1" and the lines.
std::string source_text(lua_State* L, int index, const std::function<std::string(const std::string&)>& source_of) {
    lua_Debug d;
    push_unguarded(L, index);
    lua_getinfo(L, ">S", &d);
    if (*d.what == 'C') return {};
    std::string out = fmt::format("-- {}:{}\n", d.short_src, d.linedefined), text = source_of(d.source);
    int line = 1;
    for (size_t at = 0; at < text.size() && line <= d.lastlinedefined; ++line) {
        size_t end = std::min(text.find('\n', at), text.size());
        if (line >= d.linedefined) out += text.substr(at, end - at) + "\n";
        at = end + 1;
    }
    if (!out.empty()) out.pop_back();
    return out;
}

/// help_text(value, name) of the binding, "" where it raises.
std::string asked(lua_State* L, int object, const char* name) {
    int top = lua_gettop(L);
    object = lua_absindex(L, object);
    lua_getglobal(L, "moe");
    if (!lua_istable(L, -1) || !push_member(L, -1, "help_text")) return lua_settop(L, top), "";
    lua_pushvalue(L, object);
    if (name) lua_pushstring(L, name);
    std::string text = lua_pcall(L, name ? 2 : 1, 1, 0) == LUA_OK ? to_string(L, -1) : "";
    lua_settop(L, top);
    return text;
}

/// The key that a chain of names after a configuration means, "" for none.
std::string config_key(lua_State* L, const Code& code, size_t last) {
    int top = lua_gettop(L);
    std::string path(code.text(last));
    for (size_t i = last; i >= 2 && code.text(i - 1) == "."; i -= 2) {
        bool found = push_chain(L, code, i - 2) && type_name(L, -1) == "config";
        lua_settop(L, top);
        if (found) return path;
        path = std::string(code.text(i - 2)) + "." + path;
    }
    return "";
}

bool explain(lua_State* L, const Code& code, size_t last, bool detail, const std::function<std::string(const std::string&)>& source_of, Inspection& out) {
    int top = lua_gettop(L);
    std::string name(code.text(last));
    if (std::string key = config_key(L, code, last); !key.empty()) {
        lua_getglobal(L, "moe");
        push_string(L, key);
        out.text = asked(L, -1, nullptr);
        lua_settop(L, top);
    }
    bool member = last >= 2 && (code.text(last - 1) == "." || code.text(last - 1) == ":");
    if (out.text.empty() && member && push_chain(L, code, last - 2) && !lua_istable(L, -1)) out.text = asked(L, -1, name.c_str());
    lua_settop(L, top);
    if (push_chain(L, code, last)) {
        if (out.text.empty()) out.text = asked(L, -1, nullptr);
        if (detail && lua_isfunction(L, -1)) out.source = source_text(L, lua_gettop(L), source_of);
    }
    lua_settop(L, top);
    out.name = name;
    return out.found();
}
}  // namespace

Inspection inspect(lua_State* L, std::string_view whole, size_t cursor, bool detail, const std::function<std::string(const std::string&)>& source_of) {
    // The whole word under the cursor counts.
    for (cursor = std::min(cursor, whole.size()); cursor < whole.size() && is_identifier(std::string("a") + whole[cursor]);) ++cursor;
    Code code(whole.substr(0, cursor));
    Inspection out;
    if (code.in_comment() || code.size() == 0) return out;
    size_t last = code.size() - 1;
    bool words = true, path = whole.size() < kLongestSearch;        // what a person may search for: words, or a name in parts
    for (size_t i = 0; i <= last; ++i) {
        bool word = code[i].kind == TokenKind::name || code[i].kind == TokenKind::keyword;
        words = words && word && path;
        path = path && (word || code.text(i) == "." || code.text(i) == ":");
    }
    auto search = [&] {
        push_string(L, whole);
        out.text = asked(L, -1, nullptr);
        lua_pop(L, 1);
    };
    if (detail && words && last > 0) return search(), out;
    if (code.is_name(last) && explain(L, code, last, detail, source_of, out)) return out;
    if (code[last].kind == TokenKind::string) --last;
    for (size_t bracket = code.enclosing(code.size()); bracket != Code::npos && bracket > 0; bracket = code.enclosing(bracket)) {
        if (code.is_name(bracket - 1) && explain(L, code, bracket - 1, detail, source_of, out)) return out;
    }
    if (last < code.size() && code.is_name(last)) explain(L, code, last, detail, source_of, out);
    if (!path || out.found()) return out;
    if (detail) search();
    else if (auto keys = fields(); std::any_of(keys.begin(), keys.end(), [&](auto& key) { return key.path == whole; })) out.text = help(std::string(whole)).text;
    else {                                 // a type's: run:set, run.lr, before there is a run
        push_help_names(L);
        if (lua_getfield(L, -1, std::string(whole).c_str()) != LUA_TNIL) out.text = help_of(L, -1).value_or("");
        lua_pop(L, 2);
    }
    return out;
}
}  // namespace moe::lua
