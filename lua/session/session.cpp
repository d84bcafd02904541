#include "lua/session/session.h"

#include "core/base/embedded.h"
#include "core/base/json.h"
#include "core/base/log.h"
#include "core/base/suggest.h"
#include "lua/bind/bind.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cstdio>
#include <filesystem>

namespace moe::lua {
/// The files of lua/moe, in a source file that the build writes.
const std::vector<EmbeddedFile>& embedded_lua();

namespace {
/// name as require knows it ("moe.plot", "moe.commands.bench"); file for messages ("lua/moe/plot.lua").
struct EmbeddedModule {
    std::string name, file;
    std::string_view text;
};
const std::vector<EmbeddedModule>& embedded_modules() {
    static const std::vector<EmbeddedModule> modules = [] {
        std::vector<EmbeddedModule> out;
        for (auto& file : embedded_lua()) {
            std::string name(file.path.substr(0, file.path.rfind('.')));
            std::replace(name.begin(), name.end(), '/', '.');
            out.push_back({name, "lua/" + std::string(file.path), file.text});
        }
        return out;
    }();
    return modules;
}

constexpr std::string_view kCommandPrefix = "moe.commands.";

/// Message handler of every evaluation: makes the error object while the stack that raised it is still there.
int on_error(lua_State* L) {
    if (control(L).ends_with_program && error_parts(L, 1).kind == ErrorKind::interrupted) save_runs_on_interrupt();
    if (!is_error(L, 1)) {
        ErrorParts parts = error_parts(L, 1);
        push_error(L, parts);
        if (!parts.where.empty()) {
            push_string(L, parts.where);
            lua_setfield(L, -2, "where");
        }
        lua_replace(L, 1);
    }
    lua_settop(L, 1);
    luaL_traceback(L, L, nullptr, 1);
    lua_setfield(L, 1, "traceback");
    return 1;
}

int print(lua_State* L) {
    std::string line;
    for (int i = 1, n = lua_gettop(L); i <= n; ++i) {
        if (i > 1) line += '\t';
        line += to_string(L, i);
    }
    line += '\n';
    if (auto& out = control(L).print) out(line);
    return 0;
}

/// ipairs starts at 1: on a userdata with 0-based elements it would leave out the first one in silence.
int guarded_ipairs(lua_State* L) {
    if (lua_type(L, 1) == LUA_TUSERDATA) {
        MOE_THROW(usage, "ipairs", got_text(L, 1), "a table", "tensors and layers are 0-based: for i = 0, #x - 1 do … x[i] … end");
    }
    lua_pushvalue(L, upvalue(1));
    lua_insert(L, 1);
    lua_call(L, lua_gettop(L) - 1, 3);
    return 3;
}

int load_embedded(lua_State* L) {
    auto* module = static_cast<const EmbeddedModule*>(lua_touserdata(L, lua_upvalueindex(1)));
    std::string chunk = "@" + module->file;
    if (luaL_loadbufferx(L, module->text.data(), module->text.size(), chunk.c_str(), "t")) return lua_error(L);
    push_string(L, module->name);
    lua_call(L, 1, 1);
    return 1;
}

/// __index of the table moe: modules written in Lua are loaded on first use; other unknown names are errors.
int index_moe(lua_State* L) {
    std::string key = to_string(L, 2);
    std::string module = "moe." + key;
    for (auto& m : embedded_modules()) {
        if (m.name != module) continue;
        lua_getglobal(L, "require");
        push_string(L, module);
        lua_call(L, 1, 1);
        lua_pushvalue(L, 2);
        lua_pushvalue(L, -2);
        lua_rawset(L, 1);
        return 1;
    }
    std::vector<std::string> known;
    lua_pushnil(L);
    while (lua_next(L, 1)) {
        lua_pop(L, 1);
        known.push_back(to_string(L, -1));
    }
    for (auto& m : embedded_modules()) {
        if (m.name.find('.', 4) == std::string_view::npos) known.emplace_back(m.name.substr(4));
    }
    std::string hint = did_you_mean(key, known);
    MOE_THROW(usage, module, "no such function or module", "one of those that help(moe) lists", hint);
}

/// The first comment of a command's file is "-- moelab NAME arguments: what it does."
int commands_of(lua_State* L) {
    lua_newtable(L);
    lua_Integer i = 0;
    for (auto& m : embedded_modules()) {
        if (!m.name.starts_with(kCommandPrefix)) continue;
        std::string_view line = m.text.substr(0, m.text.find('\n'));
        size_t at = line.find(": ");
        MOE_CHECK(line.starts_with("-- ") && at != std::string_view::npos, internal, m.file, std::string(line), "-- moelab NAME arguments: what it does.", "");
        push_ordered_table(L, {"name", "usage", "about"});
        push_string(L, m.name.substr(kCommandPrefix.size()));
        lua_setfield(L, -2, "name");
        push_string(L, line.substr(3, at - 3));
        lua_setfield(L, -2, "usage");
        push_string(L, line.substr(at + 2));
        lua_setfield(L, -2, "about");
        lua_rawseti(L, -2, ++i);
    }
    return 1;
}

constexpr Binding kCommands = {"commands", commands_of, "moe.commands(): the commands that are written in Lua: a list of {name, usage, about}."};

const Binding kGlobals[] = {
    {"print", print, "print(…): writes the values as tostring shows them, separated by tabs, and a line end. On several ranks only rank 0 prints."},
    {"pairs", sorted_pairs, "pairs(t): as in Lua, in a defined order: numbers ascending, then texts in byte order. moe's tables keep their own order."},
};
constexpr Binding kIpairs = {"ipairs", guarded_ipairs, "ipairs(t): as in Lua; on tensors and layers, which are 0-based, it is an error."};
constexpr Binding kIndexMoe = {"__index", index_moe, "moe.name: loads a module of moe on first use."};

void push_converted(lua_State* L, const std::string& text) {
    if (text == "true" || text == "false") {
        lua_pushboolean(L, text == "true");
    } else if (text.empty() || lua_stringtonumber(L, text.c_str()) != text.size() + 1) {
        push_string(L, text);
    }
}

/// require finds modules beside the script.
void prepend_to_path(lua_State* L, const std::filesystem::path& folder) {
    std::string place = (folder.empty() ? "." : folder.native()) + "/?.lua;";
    lua_getglobal(L, "package");
    lua_getfield(L, -1, "path");
    std::string path = to_string(L, -1);
    if (!path.starts_with(place)) {
        push_string(L, place + path);
        lua_setfield(L, -3, "path");
    }
    lua_pop(L, 2);
}
}  // namespace

Arguments Arguments::parse(const std::vector<std::string>& words) {
    Arguments result;
    for (auto& word : words) {
        size_t at = word.find('=');
        bool named = at != std::string::npos && at > 0 && std::all_of(word.begin(), word.begin() + long(at), [](unsigned char c) {
            return std::isalnum(c) || c == '_' || c == '.';
        });
        if (word == "--help" || word == "-h") {
            result.options.emplace_back("help", "true");
        } else if (named) {
            result.options.emplace_back(word.substr(0, at), word.substr(at + 1));
        } else {
            result.positional.push_back(word);
        }
    }
    return result;
}

Session::Session(SessionOptions options) {
    control_.command = std::move(options.command);
    control_.device = std::move(options.device);
    control_.json = options.json;
    if (!options.quiet) {
        control_.print = options.print ? std::move(options.print) : [](std::string_view text) { log::print(text); };
    }
    L_ = luaL_newstate();
    MOE_CHECK(L_, memory, "session", "no memory for a Lua state", "", "");
    control_slot(L_) = &control_;
    control_.running = L_;
    lua_pushcfunction(L_, [](lua_State* L) {
        static_cast<Session*>(lua_touserdata(L, 1))->open();
        return 0;
    });
    lua_pushlightuserdata(L_, this);
    Result opened = call(1);
    if (opened.error) {
        lua_close(L_);
        throw Error(*opened.error);
    }
}

Session::~Session() {
    end_background(control_);
    lua_close(L_);
}

void Session::open() {
    luaL_openlibs(L_);
    open_coroutines(L_);
    lua_pushglobaltable(L_);
    set_functions(L_, "", kGlobals);
    lua_getfield(L_, -1, "ipairs");
    push_function(L_, kIpairs, "ipairs", 1);
    lua_setfield(L_, -2, "ipairs");
    luaL_getsubtable(L_, LUA_REGISTRYINDEX, LUA_PRELOAD_TABLE);
    for (auto& module : embedded_modules()) {
        lua_pushlightuserdata(L_, const_cast<EmbeddedModule*>(&module));
        lua_pushcclosure(L_, load_embedded, 1);
        lua_setfield(L_, -2, module.name.c_str());
    }
    lua_pop(L_, 1);
    push_moe(L_);
    push_function(L_, kCommands, "moe.commands");
    lua_setfield(L_, -2, kCommands.name);
    lua_createtable(L_, 0, 1);
    push_function(L_, kIndexMoe, "moe.__index");
    lua_setfield(L_, -2, "__index");
    lua_setmetatable(L_, -2);
    luaL_getsubtable(L_, LUA_REGISTRYINDEX, LUA_LOADED_TABLE);
    lua_pushvalue(L_, -2);
    lua_setfield(L_, -2, "moe");
    lua_pop(L_, 1);
    lua_pushvalue(L_, -1);
    lua_setfield(L_, -3, "moe");
    lua_getfield(L_, -1, "help");
    lua_setfield(L_, -3, "help");
    lua_getfield(L_, -1, "plot");
    lua_setfield(L_, -3, "viz");
    lua_pop(L_, 2);
    // The order of draws is the same in every process: stock Lua seeds from the clock and an address.
    luaL_dostring(L_, "math.randomseed(0)");
}

bool Session::load(const std::string& code, const std::string& chunk_name, Result& result) {
    if (luaL_loadbufferx(L_, code.data(), code.size(), chunk_name.c_str(), "t") == LUA_OK) {
        remember_chunk(control_, chunk_name, code);
        return true;
    }
    result.error = error_parts(L_, -1);
    lua_pop(L_, 1);
    return false;
}

/// Stack: function, arguments → nothing.
Result Session::call(int num_arguments) {
    Result result;
    int base = lua_gettop(L_) - num_arguments;
    lua_pushcfunction(L_, on_error);
    lua_insert(L_, base);
    control_.running = L_;
    int status = lua_pcall(L_, num_arguments, LUA_MULTRET, base);
    control_.interrupted = false;
    lua_sethook(L_, nullptr, 0, 0);
    if (status == LUA_OK) {
        for (int i = base + 1, n = lua_gettop(L_); i <= n; ++i) result.values.push_back(to_string(L_, i));
    } else {
        result.error = error_parts(L_, -1);
        if (status == LUA_ERRMEM) result.error->kind = ErrorKind::memory;
    }
    lua_settop(L_, base - 1);
    return result;
}

Result Session::eval(const std::string& code, const std::string& name) {
    std::lock_guard guard(*control_.lock);
    Result result;
    std::string chunk = "=" + name;
    if (!load("return " + code, chunk, result)) {
        result.error.reset();
        if (!load(code, chunk, result)) return result;
    }
    return call(0);
}

void Session::push_arguments(const Arguments& arguments, const std::string& script) {
    lua_newtable(L_);
    push_string(L_, script);
    lua_rawseti(L_, -2, 0);
    lua_Integer i = 0;
    for (auto& word : arguments.positional) {
        push_string(L_, word);
        lua_rawseti(L_, -2, ++i);
    }
    lua_newtable(L_);
    for (auto& [key, value] : arguments.options) {
        push_converted(L_, value);
        lua_setfield(L_, -2, key.c_str());
    }
    lua_setfield(L_, -2, "options");
}

Result Session::run_file(const std::string& path, const Arguments& arguments) {
    std::lock_guard guard(*control_.lock);
    Result result;
    std::string text;
    try {
        text = read_text(path);
    } catch (const Error& e) {
        result.error = e.parts();
        return result;
    }
    if (!text.empty() && text[0] == '#') text = "--" + text;    // a line "#!/usr/bin/env …" counts, so that line numbers stay
    if (!load(text, "@" + path, result)) return result;
    control_.script = path;
    prepend_to_path(L_, std::filesystem::path(path).parent_path());
    push_arguments(arguments, path);
    lua_setglobal(L_, "arg");
    control_.ends_with_program = true;
    result = call(0);
    control_.ends_with_program = false;
    control_.script.clear();
    return result;
}

Result Session::run_command(const std::string& name, const Arguments& arguments) {
    std::lock_guard guard(*control_.lock);
    Result result;
    lua_getglobal(L_, "require");
    push_string(L_, std::string(kCommandPrefix) + name);
    if (lua_pcall(L_, 1, 1, 0) != LUA_OK) {
        result.error = error_parts(L_, -1);
        lua_pop(L_, 1);
        return result;
    }
    push_arguments(arguments, name);
    lua_getfield(L_, -1, "options");
    lua_newtable(L_);
    for (auto& [name, value] : arguments.given) {
        push_string(L_, value);
        lua_setfield(L_, -2, name.c_str());
    }
    lua_newtable(L_);
    lua_Integer i = 0;
    for (auto& [key, value] : arguments.options) {
        push_string(L_, key + "=" + value);
        lua_rawseti(L_, -2, ++i);
    }
    control_.ends_with_program = true;
    result = call(4);
    control_.ends_with_program = false;
    return result;
}

std::vector<std::string> Session::commands() {
    std::vector<std::string> names;
    for (auto& module : embedded_modules()) {
        if (module.name.starts_with(kCommandPrefix)) names.emplace_back(module.name.substr(kCommandPrefix.size()));
    }
    std::sort(names.begin(), names.end());
    return names;
}

bool Session::is_complete(const std::string& code) {
    std::lock_guard guard(*control_.lock);
    Result result;
    for (const char* start : {"return ", ""}) {
        // A line end is appended: an open quoted string cannot be completed by more lines, an open long one can.
        if (load(start + code + "\n", "=input", result)) {
            lua_pop(L_, 1);
            return true;
        }
    }
    return !result.error->op.ends_with("<eof>");
}

std::string describe(const ErrorParts& error, bool colour) {
    std::string text = fmt::format("{}error:{} {}", colour ? "\033[31m" : "", colour ? "\033[0m" : "", Error(error).what());
    if (!error.where.empty() && text.find(error.where) == std::string::npos) text += "\n  at " + error.where;
    // A traceback of the main chunk alone says nothing that `where` does not say.
    size_t levels = size_t(std::count(error.traceback.begin(), error.traceback.end(), '\n'));
    // Nor does that of a command of ours to who typed it.
    bool deep = levels > 3 && !error.where.starts_with("lua/moe/commands/") && error.kind != ErrorKind::interrupted && error.kind != ErrorKind::usage && error.kind != ErrorKind::config;
    if (deep) text += "\n" + error.traceback;
    return text;
}

std::string to_json(const ErrorParts& e) {
    nlohmann::ordered_json object = {{"kind", to_string(e.kind)}, {"op", e.op}, {"got", e.got}, {"want", e.want}, {"hint", e.hint},
                                     {"where", e.where}, {"rank", e.rank}, {"traceback", e.traceback}};
    return nlohmann::ordered_json{{"error", object}}.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}
}  // namespace moe::lua
