// Files, folders, time and units: what an experiment needs of the machine beyond Lua's own io.
#include "core/base/json.h"
#include "core/base/units.h"
#include "core/base/suggest.h"
#include "core/train/hardware.h"
#include "lua/bind/bind.h"
#include "lua/bind/bytecode.h"
#include "lua/bind/control.h"

#include <link.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <thread>

namespace moe::lua {
namespace {
namespace fs = std::filesystem;

[[noreturn]] void io_error(const std::string& op, const std::string& path, const std::error_code& e, const std::string& want) {
    MOE_THROW(io, op, path + ": " + e.message(), want, "");
}

int list(lua_State* L) {
    std::string path = check_string(L, 1, "folder");
    Options o(L, 2, {"recursive", "suffix"});
    std::string suffix = o.string("suffix", "");
    bool recursive = o.boolean("recursive", false);
    std::vector<std::string> files;
    std::error_code e;
    auto add = [&](const fs::directory_entry& entry) {
        std::error_code ignored;    // a file that vanished meanwhile is no file
        if (entry.is_regular_file(ignored) && entry.path().native().ends_with(suffix)) files.push_back(entry.path().native());
    };
    if (recursive) {
        auto it = fs::recursive_directory_iterator(path, fs::directory_options::skip_permission_denied, e);
        for (; !e && it != fs::recursive_directory_iterator(); it.increment(e)) add(*it);
    } else {
        auto it = fs::directory_iterator(path, e);
        for (; !e && it != fs::directory_iterator(); it.increment(e)) add(*it);
    }
    if (e) io_error("moe.fs.list", path, e, "a folder that can be read");
    std::sort(files.begin(), files.end());
    lua_createtable(L, int(files.size()), 0);
    for (size_t i = 0; i < files.size(); ++i) {
        push_string(L, files[i]);
        lua_rawseti(L, -2, lua_Integer(i + 1));
    }
    return 1;
}

int make_folder(lua_State* L) {
    std::string path = check_string(L, 1, "folder");
    std::error_code e;
    fs::create_directories(path, e);
    if (e) io_error("moe.fs.mkdir", path, e, "a place where a folder can be made");
    push_string(L, path);
    return 1;
}

int exists(lua_State* L) {
    std::error_code ignored;
    lua_pushboolean(L, fs::exists(check_string(L, 1, "path"), ignored));
    return 1;
}

int size(lua_State* L) {
    std::string path = check_string(L, 1, "path");
    std::error_code e;
    auto bytes = fs::file_size(path, e);
    if (e) io_error("moe.fs.size", path, e, "a file");
    lua_pushinteger(L, lua_Integer(bytes));
    return 1;
}

int remove(lua_State* L) {
    std::string path = check_string(L, 1, "path");
    Options o(L, 2, {"recursive"});
    std::error_code e;
    auto count = o.boolean("recursive", false) ? fs::remove_all(path, e) : uintmax_t(fs::remove(path, e));
    if (e) io_error("moe.fs.remove", path, e, "a file or an empty folder, or recursive = true");
    lua_pushinteger(L, lua_Integer(count));
    return 1;
}

int read(lua_State* L) {
    push_string(L, read_text(check_string(L, 1, "path")));
    return 1;
}

int write(lua_State* L) {
    write_text(check_string(L, 1, "path"), check_string(L, 2, "text"));
    return 0;
}

int torch_folder(lua_State* L) {
    std::string library;
    dl_iterate_phdr([](dl_phdr_info* info, size_t, void* out) {
        std::string_view path = info->dlpi_name ? info->dlpi_name : "";
        if (path.ends_with("/libc10.so")) *static_cast<std::string*>(out) = path;
        return 0;
    }, &library);
    MOE_CHECK(!library.empty(), state, "moe.torch_folder", "a program without libc10.so", "LibTorch as shared libraries", "");
    push_string(L, fs::weakly_canonical(library).parent_path().parent_path().native());
    return 1;
}

int now(lua_State* L) {
    lua_pushnumber(L, std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count());
    return 1;
}

int sleep(lua_State* L) {
    using Clock = std::chrono::steady_clock;
    auto end = Clock::now() + std::chrono::duration<double>(check_number(L, 1, "secs"));
    while (Clock::now() < end) {
        throw_if_interrupted(L);
        std::this_thread::sleep_for(std::min<std::chrono::duration<double>>(end - Clock::now(), std::chrono::milliseconds(20)));
    }
    return 0;
}

int is_terminal(lua_State* L) {
    lua_pushboolean(L, isatty(STDOUT_FILENO));
    return 1;
}
int print_text(lua_State* L) {
    if (auto& out = control(L).print) out(check_string(L, 1, "text"));
    std::fflush(stdout);
    return 0;
}
int format_count_of(lua_State* L) { return push_string(L, format_count(check_number(L, 1, "value"))), 1; }
int format_bytes_of(lua_State* L) { return push_string(L, format_bytes(check_number(L, 1, "bytes"))), 1; }
int format_secs_of(lua_State* L) { return push_string(L, format_secs(check_number(L, 1, "secs"))), 1; }

std::vector<std::string> texts(lua_State* L, int index, const char* name) {
    check_table(L, index, name);
    std::vector<std::string> list;
    for (lua_Integer i = 1, n = lua_Integer(lua_rawlen(L, index)); i <= n; ++i) {
        lua_rawgeti(L, index, i);
        list.push_back(check_string(L, -1, name));
        lua_pop(L, 1);
    }
    return list;
}

int default_device(lua_State* L) {
    push_string(L, train::choose_device(control(L).device).is_cuda() ? "cuda" : "cpu");
    return 1;
}

int check_keys(lua_State* L) {
    std::string op = lua_isnoneornil(L, 3) ? "options" : check_string(L, 3, "op");
    MOE_CHECK(lua_istable(L, 1), usage, op, got_text(L, 1), "a table", "");
    std::vector<std::string> known = texts(L, 2, "known");
    for (auto& key : ordered_keys(L, 1)) {
        if (std::find(known.begin(), known.end(), key) != known.end()) continue;
        std::string want;
        for (auto& k : known) want += (want.empty() ? "one of " : ", ") + k;
        MOE_THROW(usage, op, '"' + key + '"', want.empty() ? "no options" : want, did_you_mean(key, known));
    }
    lua_settop(L, 1);
    return 1;
}

int globals_of(lua_State* L) {
    if (!lua_isfunction(L, 1) || lua_iscfunction(L, 1)) bad_argument(L, 1, "f", "a Lua function");
    OuterNames names = outer_names(L, 1);
    lua_newtable(L);
    lua_Integer n = 0;
    for (auto& name : names.read) {
        if (names.written.contains(name)) continue;
        push_string(L, name);
        lua_rawseti(L, -2, ++n);
    }
    return 1;
}

int fail(lua_State* L) {
    check_table(L, 1, "error");
    Options o(L, 1, {"kind", "op", "got", "want", "hint"});
    ErrorParts parts = {ErrorKind::usage, o.string("op", ""), o.string("got", ""), o.string("want", ""), o.string("hint", ""), "", -1, ""};
    std::string kind = o.string("kind", "usage");
    push_error(L, parts);
    push_string(L, kind);
    lua_setfield(L, -2, "kind");
    throw Error(error_parts(L, -1));
}

const Binding kFiles[] = {
    {"list", list, "moe.fs.list(folder, {recursive =, suffix = \".h\"}): paths of the regular files there, sorted."},
    {"mkdir", make_folder, "moe.fs.mkdir(folder): makes a folder and those above it. Returns its path."},
    {"exists", exists, "moe.fs.exists(path): true for a file or folder.\n"
     "Example: print(moe.fs.exists \"/tmp\")"},
    {"size", size, "moe.fs.size(file): bytes."},
    {"remove", remove, "moe.fs.remove(path, {recursive =}): removes a file or folder; returns how many."},
    {"read", read, "moe.fs.read(file): its whole content."},
    {"write", write, "moe.fs.write(file, text): writes a file at once: a reader never sees half of it."},
};
const Binding kFunctions[] = {
    {"clock", now, "moe.clock(): seconds of a clock that never goes back; for differences.\n"
     "Example: local start = moe.clock(); moe.sleep(0.001); print(moe.clock() - start)"},
    {"sleep", sleep, "moe.sleep(secs): waits; an interrupt ends it.\n"
     "Example: moe.sleep(0.001)"},
    {"default_device", default_device, "moe.default_device(): \"cuda\" where models run on a GPU unless told otherwise, else \"cpu\".\n"
     "Example: print(moe.default_device())"},
    {"torch_folder", torch_folder, "moe.torch_folder(): folder of the LibTorch that this program runs with (its include/ and Python sources).\n"
     "Example: print(moe.torch_folder())"},
    {"is_terminal", is_terminal, "moe.is_terminal(): true where standard output is a terminal.\n"
     "Example: print(moe.is_terminal())"},
    {"write", print_text, "moe.write(text): prints without a line end and flushes; on several ranks only rank 0."},
    {"format_count", format_count_of, "moe.format_count(n): 97600000 → \"97.6 M\".\n"
     "Example: print(moe.format_count(97600000))"},
    {"format_bytes", format_bytes_of, "moe.format_bytes(n): 665720012 → \"0.62 GiB\".\n"
     "Example: print(moe.format_bytes(665720012))"},
    {"format_secs", format_secs_of, "moe.format_secs(n): 125 → \"2 min 05 s\".\n"
     "Example: print(moe.format_secs(125))"},
    {"globals_of", globals_of, "moe.globals_of(f): names of the globals that the Lua function f, and functions in it, read and do not change, sorted.\n"
     "Example: print(table.concat(moe.globals_of(function() return math.pi * scale end), \" \"))"},
    {"check_keys", check_keys, "moe.check_keys(options, {\"a\", \"b\"}, op): raises for a key that is not among the known, naming the nearest. Returns options.\n"
     "Example: print(pcall(moe.check_keys, { stesp = 3 }, { \"steps\", \"name\" }, \"mine\"))"},
    {"fail", fail, "moe.fail {kind =, op =, got =, want =, hint =}: raises an error object, as the bindings do.\n"
     "Example: print(pcall(moe.fail, { op = \"mine: steps\", got = \"-1\", want = \"0 or more\" }))"},
};
}  // namespace

void open_system(lua_State* L) {
    set_functions(L, "moe.", kFunctions);
    lua_newtable(L);
    set_functions(L, "moe.fs.", kFiles);
    set_help(L, -1, "moe.fs", "moe.fs: files and folders.");
    lua_setfield(L, -2, "fs");
}
}  // namespace moe::lua
