// What rank 0 knows and all ranks get: the time, names, random seeds, standard input; and the program's end.
#include "lua/bind/bind.h"
#include "lua/bind/control.h"
#include "lua/bind/ranks_calls.h"

namespace moe::lua {
namespace {
/// The stock function in upvalue 1 with the values on the stack; its results replace them.
int call_stock_here(lua_State* L) {
    lua_pushvalue(L, upvalue(1));
    lua_insert(L, 1);
    lua_call(L, lua_gettop(L) - 1, LUA_MULTRET);
    return lua_gettop(L);
}

/// The same on rank 0, its results on all. What Lua raises arrives as moe::Error.
int call_stock_there(lua_State* L) {
    if (!ranks_of(L)) return call_stock_here(L);
    std::string name = running(L);
    std::string values = from_rank_0(L, name, [&] {
        std::string out;
        lua_pushvalue(L, upvalue(1));
        lua_insert(L, 1);
        auto error = caught(L, lua_gettop(L), [&](lua_State* S) {
            lua_call(S, lua_gettop(S) - 1, LUA_MULTRET);
            out = pack_from(S, 1);
        });
        if (error) throw Error(*error);
        return out;
    });
    lua_settop(L, 0);
    return push_all(L, values);
}

/// os.time and os.date of a time that is given need nobody.
int time_of(lua_State* L) { return is_nothing(L, 1) ? call_stock_there(L) : call_stock_here(L); }
int date_of(lua_State* L) { return is_nothing(L, 2) ? call_stock_there(L) : call_stock_here(L); }

/// Without a seed: the one that rank 0 draws.
int seed_random(lua_State* L) {
    if (lua_gettop(L) > 0 || !ranks_of(L)) return call_stock_here(L);
    call_stock_there(L);
    return call_stock_here(L);
}

/// Upvalue 2: io.stdin; 3: io.input.
int read_input(lua_State* L) {
    int n = lua_gettop(L);
    lua_pushvalue(L, upvalue(3));
    lua_call(L, 0, 1);
    bool is_stdin = lua_rawequal(L, -1, upvalue(2));
    lua_settop(L, n);
    return is_stdin ? call_stock_there(L) : call_stock_here(L);
}

/// A method of files with upvalues the stock function, io.stdin: of other files each rank reads its own.
bool is_of_stdin(lua_State* L) { return ranks_of(L) && lua_rawequal(L, 1, upvalue(2)); }
/// A file cannot travel, but on rank 0 it is there: the place of the call is what all say.
int read_file(lua_State* L) { return is_of_stdin(L) ? call_stock_there(L) : call_stock_here(L); }

/// Upvalues: the shared io.read or file:read, a list of its arguments.
int next_line(lua_State* L) {
    lua_settop(L, 0);
    lua_pushvalue(L, upvalue(1));
    int n = int(lua_rawlen(L, upvalue(2)));
    for (int i = 1; i <= n; ++i) lua_rawgeti(L, upvalue(2), i);
    lua_call(L, n, LUA_MULTRET);
    return lua_gettop(L);
}
constexpr Binding kNextLine = {"next", next_line, "the next line of standard input."};

/// Pushes an iterator that calls the function at `read` with the values on the stack, which it takes.
int push_lines(lua_State* L, int read) {
    int n = lua_gettop(L);
    lua_createtable(L, n, 0);
    lua_insert(L, 1);
    for (int i = n; i > 0; --i) lua_rawseti(L, 1, i);
    lua_pushvalue(L, read);
    lua_insert(L, 1);
    push_function(L, kNextLine, "io.lines.next", 2);
    return 1;
}
/// io.lines: upvalue 1 the stock one, 2 the shared io.read.
int lines_of(lua_State* L) {
    if (!is_nothing(L, 1)) return call_stock_here(L);
    if (lua_gettop(L) > 0) lua_remove(L, 1);
    return push_lines(L, upvalue(2));
}
/// file:lines: upvalue 2 io.stdin, 3 the shared file:read.
int lines_of_file(lua_State* L) { return is_of_stdin(L) ? push_lines(L, upvalue(3)) : call_stock_here(L); }

/// All ranks end here, or none does. A failing one does not wait for long.
int end_program(lua_State* L) {
    if (train::Meeting* ranks = ranks_of(L); ranks && !ranks->is_broken()) {
        bool well = is_nothing(L, 1) || (lua_isboolean(L, 1) ? lua_toboolean(L, 1) : lua_tointeger(L, 1) == 0);
        train::Word mine{at_place(L, call_text(L))};
        std::optional<std::vector<train::Word>> words;
        {
            Unlocked unlocked(L);
            words = ranks->hear(mine, well ? 0 : 5);
        }
        if (words) train::judge(*words);
    }
    return call_stock_here(L);
}

constexpr Binding kTime = {"time", time_of, "os.time(table): as in Lua; without a table rank 0's time on all ranks."};
constexpr Binding kDate = {"date", date_of, "os.date(format, time): as in Lua; without a time that of rank 0 on all ranks."};
constexpr Binding kClock = {"clock", call_stock_there, "os.clock(): as in Lua; rank 0's on all ranks."};
constexpr Binding kTmpname = {"tmpname", call_stock_there, "os.tmpname(): as in Lua; the same name on all ranks."};
constexpr Binding kExit = {"exit", end_program, "os.exit(code, close): as in Lua; all ranks must call it."};
constexpr Binding kRandomseed = {"randomseed", seed_random, "math.randomseed(…): as in Lua; without a seed all ranks take the one that rank 0 draws."};
constexpr Binding kMoeClock = {"clock", call_stock_there, "moe.clock(): seconds of a clock that never goes back; for differences. Rank 0's on all ranks, so that loops until a time end together."};
constexpr Binding kIsTerminal = {"is_terminal", call_stock_there, "moe.is_terminal(): true where rank 0's standard output is a terminal."};
constexpr Binding kRead = {"read", read_input, "io.read(…): as in Lua; what rank 0 reads from standard input goes to all ranks."};
constexpr Binding kLines = {"lines", lines_of, "io.lines(file, …): as in Lua; lines of standard input go from rank 0 to all ranks."};
constexpr Binding kFileRead = {"read", read_file, "file:read(…): as in Lua; what rank 0 reads from standard input goes to all ranks."};
constexpr Binding kFileLines = {"lines", lines_of_file, "file:lines(…): as in Lua; lines of standard input go from rank 0 to all ranks."};
constexpr Binding kFileSeek = {"seek", read_file, "file:seek(whence, offset): as in Lua; standard input's is rank 0's on all ranks."};

/// Replaces table.name; the stock function becomes upvalue 1, the `more` values on the stack's top the others. The table is below these.
void replace(lua_State* L, const Binding& binding, const std::string& full_name, int more = 0) {
    lua_getfield(L, -(more + 1), binding.name);
    lua_insert(L, -(more + 1));
    push_function(L, binding, full_name, more + 1);
    lua_setfield(L, -2, binding.name);
}
}  // namespace

void share_libraries(lua_State* L) {
    lua_getglobal(L, "os");
    for (const Binding* b : {&kTime, &kDate, &kClock, &kTmpname, &kExit}) replace(L, *b, std::string("os.") + b->name);
    lua_pop(L, 1);
    lua_getglobal(L, "math");
    replace(L, kRandomseed, "math.randomseed");
    lua_pop(L, 1);
    lua_getglobal(L, "io");
    lua_getfield(L, -1, "stdin");
    luaL_getmetafield(L, -1, "__index");
    for (const Binding* b : {&kFileRead, &kFileSeek}) {
        lua_pushvalue(L, -2);
        replace(L, *b, std::string("file:") + b->name, 1);
    }
    lua_pushvalue(L, -2);
    lua_getfield(L, -2, "read");
    replace(L, kFileLines, "file:lines", 2);
    lua_pop(L, 2);
    lua_getfield(L, -1, "stdin");
    lua_getfield(L, -2, "input");
    replace(L, kRead, "io.read", 2);
    lua_getfield(L, -1, "read");
    replace(L, kLines, "io.lines", 1);
    lua_pop(L, 1);
}

void share_moe_functions(lua_State* L) {
    replace(L, kMoeClock, "moe.clock");
    replace(L, kIsTerminal, "moe.is_terminal");
}
}  // namespace moe::lua
