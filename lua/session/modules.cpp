#include "lua/session/modules.h"

#include "core/base/embedded.h"
#include "core/base/suggest.h"
#include "lua/bind/bind.h"
#include "lua/bind/control.h"
#include "lua/bind/ranks.h"
#include "lua/bind/script.h"

#include <ATen/CPUGeneratorImpl.h>

#include <algorithm>
#include <mutex>

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
    if (module->name.find('.', 4) == std::string::npos) guard_module(L);        // "moe.x"; further files of it are called by it alone
    return 1;
}

/// __index of the table moe: modules written in Lua are loaded on first use; other unknown names are errors.
int index_moe(lua_State* L) {
    check_table(L, 1, "moe");
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

/// __load of the table moe: the modules that index_moe would load, for those who list what there is.
int load_moe(lua_State* L) {
    check_table(L, 1, "moe");
    for (auto& m : embedded_modules()) {
        if (m.name.find('.', 4) != std::string_view::npos) continue;
        push_string(L, m.name.substr(4));
        lua_gettable(L, 1);
        lua_pop(L, 1);
    }
    return 0;
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

/// What writes to standard output goes where print goes, so that a notebook gets it and nothing lands in the middle of a prompt.
/// Upvalues: the stock function, io.stdout. file:write(…) and io.write(…), whose file is the default output.
int write_through(lua_State* L, int file, int first) {
    std::string text;
    for (int i = first, n = lua_gettop(L); i <= n; ++i) {
        if (lua_type(L, i) != LUA_TSTRING && lua_type(L, i) != LUA_TNUMBER) bad_argument(L, i, "text", "texts and numbers");
        size_t size = 0;
        lua_pushvalue(L, i);
        const char* data = lua_tolstring(L, -1, &size);
        text.append(data, size);
        lua_pop(L, 1);
    }
    if (auto& out = control(L).print) out(text);
    lua_pushvalue(L, file);
    return 1;
}
int call_stock(lua_State* L) {
    lua_pushvalue(L, upvalue(1));
    lua_insert(L, 1);
    lua_call(L, lua_gettop(L) - 1, LUA_MULTRET);
    return lua_gettop(L);
}
int file_write(lua_State* L) { return lua_rawequal(L, 1, upvalue(2)) ? write_through(L, 1, 2) : call_stock(L); }
/// Upvalue 3: io.output.
int io_write(lua_State* L) {
    int n = lua_gettop(L);
    lua_pushvalue(L, upvalue(3));
    lua_call(L, 0, 1);
    bool is_stdout = lua_rawequal(L, -1, upvalue(2));
    lua_settop(L, n);
    return is_stdout ? write_through(L, upvalue(2), 1) : call_stock(L);
}

/// Upvalue 1: the stock function. Without a comparison of the caller's there is no Lua code in a sort that an interrupt could stop.
int interruptible_less(lua_State* L) {
    throw_if_interrupted(L);
    lua_pushboolean(L, lua_compare(L, 1, 2, LUA_OPLT));
    return 1;
}
constexpr Binding kLess = {"less", interruptible_less, "less(a, b): a < b."};

/// A list of numbers of one type, without a metatable: sorted here, ten times as fast. False for anything else.
template <class T>
bool sort_numbers(lua_State* L, bool (*get)(lua_State*, T&), void (*put)(lua_State*, T)) {
    auto n = lua_Integer(lua_rawlen(L, 1));
    std::vector<T> values;
    for (lua_Integer i = 1; i <= n; ++i) {
        lua_rawgeti(L, 1, i);
        T value;
        bool fits = get(L, value);
        lua_pop(L, 1);
        if (!fits) return false;
        values.push_back(value);
        if (i % 4096 == 0) throw_if_interrupted(L);
    }
    size_t count = 0;
    std::stable_sort(values.begin(), values.end(), [&](T a, T b) {
        if (++count % 4096 == 0) throw_if_interrupted(L);
        return a < b;
    });
    for (lua_Integer i = 1; i <= n; ++i) {
        put(L, values[size_t(i - 1)]);
        lua_rawseti(L, 1, i);
    }
    return true;
}
int sort(lua_State* L) {
    check_table(L, 1, "list");
    if (!is_nothing(L, 2)) return call_stock(L);
    lua_settop(L, 1);
    bool plain = !lua_getmetatable(L, 1);
    lua_settop(L, 1);
    auto get_integer = [](lua_State* S, lua_Integer& v) { return lua_isinteger(S, -1) ? (v = lua_tointeger(S, -1), true) : false; };
    auto get_float = [](lua_State* S, lua_Number& v) { return lua_type(S, -1) == LUA_TNUMBER && !lua_isinteger(S, -1) ? (v = lua_tonumber(S, -1), v == v) : false; };
    if (plain && (sort_numbers<lua_Integer>(L, get_integer, lua_pushinteger) || sort_numbers<lua_Number>(L, get_float, lua_pushnumber))) return 0;
    push_function(L, kLess, "table.sort: less");
    return call_stock(L);
}

/// Threads that train, write or read ahead must not see the program's end: jobs are ended and the state is closed first, as at the end of a script. Upvalue 1: the stock function.
int exit_program(lua_State* L) {
    if (!is_nothing(L, 1) && !lua_isboolean(L, 1)) check_integer(L, 1, "code");
    MOE_CHECK(!background_control(), state, "os.exit", "a callback of a job", "another input", "an error ends the job: error \"enough\"");
    {
        Unlocked unlocked(L);
        end_background(session_control(L));
    }
    lua_settop(L, 1);
    lua_pushboolean(L, true);
    return call_stock(L);
}

/// A module that was edited: required anew. Of moe's own modules the table moe forgets the old one, too.
int reload(lua_State* L) {
    std::string name = check_string(L, 1, "module");
    lua_settop(L, 1);
    luaL_getsubtable(L, LUA_REGISTRYINDEX, LUA_LOADED_TABLE);
    if (name == "moe" || (lua_getfield(L, -1, name.c_str()) != LUA_TNIL && lua_rawlen(L, 1) == 0)) {
        MOE_THROW(usage, "reload", '"' + name + '"', "a module written in Lua", "reload \"mymodule\" requires mymodule.lua anew");
    }
    lua_settop(L, 2);
    lua_pushnil(L);
    lua_setfield(L, 2, name.c_str());
    lua_getglobal(L, "require");
    lua_pushvalue(L, 1);
    lua_call(L, 1, 1);
    if (name.starts_with("moe.")) {
        lua_getglobal(L, "moe");
        push_string(L, name.substr(4));
        lua_pushvalue(L, -3);
        lua_rawset(L, -3);
        lua_pop(L, 1);
    }
    return 1;
}

int modules_of(lua_State* L) {
    lua_newtable(L);
    lua_Integer i = 0;
    for (auto& m : embedded_modules()) {
        if (m.name.find('.', 4) != std::string::npos) continue;
        push_string(L, std::string_view(m.name).substr(4));
        lua_rawseti(L, -2, ++i);
    }
    return 1;
}

constexpr Binding kCommands = {"commands", commands_of, "moe.commands(): the commands that are written in Lua: a list of {name, usage, about}.\nExample: print(moe.table(moe.commands()))"};
constexpr Binding kModules = {"modules", modules_of, "moe.modules(): names of the parts of moe that are written in Lua and load on first use.\nExample: print(table.concat(moe.modules(), \" \"))"};

const Binding kGlobals[] = {
    {"print", print, "print(…): writes the values as tostring shows them, separated by tabs, and a line end. On several ranks only rank 0 prints."},
    {"reload", reload, "reload(\"module\"): requires a Lua module anew after its file was edited, and returns it. What was taken from the old one stays as it was."},
    {"pairs", sorted_pairs, "pairs(t): as in Lua, in a defined order: numbers ascending, then texts in byte order. moe's tables keep their own order."},
};
constexpr Binding kIpairs = {"ipairs", guarded_ipairs, "ipairs(t): as in Lua; on tensors and layers, which are 0-based, it is an error."};
constexpr Binding kSort = {"sort", sort, "table.sort(list, less): as in Lua; an interrupt ends it."};
constexpr Binding kExit = {"exit", exit_program, "os.exit(code): ends the program, as in Lua; jobs are ended after the step at hand, and everything is closed first."};
constexpr Binding kIoWrite = {"write", io_write, "io.write(…): as in Lua; to standard output it goes where print goes."};
constexpr Binding kFileWrite = {"write", file_write, "file:write(…): as in Lua; to standard output it goes where print goes."};
constexpr Binding kIndexMoe = {"__index", index_moe, "moe.name: loads a module of moe on first use."};
constexpr Binding kLoadMoe = {"__load", load_moe, "Loads all modules of moe."};


/// Functions of Lua's libraries that are replaced.
void open_libraries(lua_State* L) {
    lua_getglobal(L, "table");
    lua_getfield(L, -1, "sort");
    push_function(L, kSort, "table.sort", 1);
    lua_setfield(L, -2, "sort");
    lua_getglobal(L, "os");
    lua_getfield(L, -1, "exit");
    push_function(L, kExit, "os.exit", 1);
    lua_setfield(L, -2, "exit");
    lua_pop(L, 1);
    lua_getglobal(L, "io");
    lua_getfield(L, -1, "stdout");
    luaL_getmetafield(L, -1, "__index");        // the methods of all files
    lua_getfield(L, -1, "write");
    lua_pushvalue(L, -3);
    push_function(L, kFileWrite, "file:write", 2);
    lua_setfield(L, -2, "write");
    lua_pop(L, 1);
    lua_getfield(L, -2, "write");
    lua_insert(L, -2);
    lua_getfield(L, -3, "output");
    push_function(L, kIoWrite, "io.write", 3);
    lua_setfield(L, -2, "write");
    lua_pop(L, 2);
    if (control(L).ranks) share_libraries(L);
}
}  // namespace

void open_globals(lua_State* L) {
    luaL_openlibs(L);
    open_coroutines(L);
    open_libraries(L);
    lua_pushglobaltable(L);
    set_functions(L, "", kGlobals);
    lua_getfield(L, -1, "ipairs");
    push_function(L, kIpairs, "ipairs", 1);
    lua_setfield(L, -2, "ipairs");
    luaL_getsubtable(L, LUA_REGISTRYINDEX, LUA_PRELOAD_TABLE);
    for (auto& module : embedded_modules()) {
        lua_pushlightuserdata(L, const_cast<EmbeddedModule*>(&module));
        lua_pushcclosure(L, load_embedded, 1);
        lua_setfield(L, -2, module.name.c_str());
    }
    lua_pop(L, 1);
    push_moe(L);
    push_function(L, kCommands, "moe.commands");
    lua_setfield(L, -2, kCommands.name);
    push_function(L, kModules, "moe.modules");
    lua_setfield(L, -2, kModules.name);
    lua_createtable(L, 0, 1);
    push_function(L, kIndexMoe, "moe.__index");
    lua_setfield(L, -2, "__index");
    push_function(L, kLoadMoe, "moe.__load");
    lua_setfield(L, -2, "__load");
    lua_setmetatable(L, -2);
    luaL_getsubtable(L, LUA_REGISTRYINDEX, LUA_LOADED_TABLE);
    lua_pushvalue(L, -2);
    lua_setfield(L, -2, "moe");
    lua_pop(L, 1);
    lua_pushvalue(L, -1);
    lua_setfield(L, -3, "moe");
    lua_getfield(L, -1, "help");
    lua_setfield(L, -3, "help");
    lua_getfield(L, -1, "plot");
    lua_setfield(L, -3, "viz");
    lua_pop(L, 2);
    // The order of draws is the same in every process: stock Lua seeds from the clock and an address, LibTorch from the system's noise.
    luaL_dostring(L, "math.randomseed(0)");
    auto generator = at::detail::getDefaultCPUGenerator();
    std::lock_guard guard(generator.mutex());
    generator.set_current_seed(0);
}


std::vector<std::string> module_names() {
    std::vector<std::string> names;
    for (auto& m : embedded_modules())
        if (m.name.find('.', 4) == std::string::npos) names.push_back(m.name.substr(4));
    return names;
}

std::vector<std::string> command_names() {
    std::vector<std::string> names;
    for (auto& m : embedded_modules())
        if (m.name.starts_with(kCommandPrefix)) names.push_back(m.name.substr(kCommandPrefix.size()));
    std::sort(names.begin(), names.end());
    return names;
}

std::string module_text(const std::string& file) {
    for (auto& m : embedded_modules())
        if (m.file == file) return std::string(m.text);
    return {};
}
}  // namespace moe::lua
