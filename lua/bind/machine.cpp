// The machine and its programs: what `moelab check` asks, and running of other commands.
#include "core/base/host_memory.h"
#include "core/base/log.h"
#include "core/base/version.h"
#include "core/dist/plugin.h"
#include "core/train/hardware.h"
#include "core/train/profile.h"
#include "lua/bind/bind.h"
#include "lua/bind/control.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <poll.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <filesystem>

extern char** environ;

namespace moe::lua {
namespace {
namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;
constexpr size_t kMostOutput = 1 << 20;
constexpr int kPollMillisecs = 20;

std::vector<std::string> words_of(lua_State* L, int index) {
    check_table(L, index, "words");
    std::vector<std::string> list;
    for (lua_Integer i = 1, n = lua_Integer(lua_rawlen(L, index)); i <= n; ++i) {
        lua_rawgeti(L, index, i);
        list.push_back(check_string(L, -1, "word"));
        lua_pop(L, 1);
    }
    MOE_CHECK(!list.empty(), usage, running(L) + ": words", "none", "{\"program\", \"argument\", …}", "");
    return list;
}

std::vector<char*> pointers(std::vector<std::string>& words) {
    std::vector<char*> list;
    for (auto& word : words) list.push_back(word.data());
    list.push_back(nullptr);
    return list;
}

/// A program in a process group of its own, so that it ends with all that it started; output and errors come through a pipe.
class Child {
public:
    explicit Child(std::vector<std::string> words) {
        int ends[2];
        MOE_CHECK(pipe2(ends, O_CLOEXEC) == 0, io, "moe.execute", std::strerror(errno), "a pipe", "");
        fd_ = ends[0];
        fcntl(fd_, F_SETFL, O_NONBLOCK);
        posix_spawn_file_actions_t actions;
        posix_spawn_file_actions_init(&actions);
        posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
        posix_spawn_file_actions_adddup2(&actions, ends[1], STDOUT_FILENO);
        posix_spawn_file_actions_adddup2(&actions, ends[1], STDERR_FILENO);
        posix_spawnattr_t attributes;
        posix_spawnattr_init(&attributes);
        posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETPGROUP);
        auto list = pointers(words);
        found_ = posix_spawnp(&pid_, list[0], &actions, &attributes, list.data(), environ) == 0;
        posix_spawnattr_destroy(&attributes);
        posix_spawn_file_actions_destroy(&actions);
        close(ends[1]);
    }
    ~Child() {
        stop();
        close(fd_);
    }
    Child(const Child&) = delete;

    bool found() const { return found_; }
    const std::string& output() const { return output_; }
    int code() const { return WIFEXITED(status_) ? WEXITSTATUS(status_) : 128 + WTERMSIG(status_); }
    /// Reads for a moment; true once the program has ended. What it left running in the background may hold the pipe: that is not waited for.
    bool wait_a_moment() {
        pollfd p{open_ ? fd_ : -1, POLLIN, 0};
        poll(&p, 1, kPollMillisecs);
        bool ended = ended_ || waitpid(pid_, &status_, WNOHANG) == pid_;
        ended_ = ended;
        read_all();
        return ended;
    }
    void stop() {
        if (!found_ || ended_) return;
        kill(-pid_, SIGKILL);
        waitpid(pid_, &status_, 0);
        ended_ = true;
    }

private:
    void read_all() {
        char buffer[4096];
        ssize_t n;
        while (open_ && (n = read(fd_, buffer, sizeof buffer)) >= 0) {
            if (n == 0) open_ = false;
            else if (output_.size() < kMostOutput) output_.append(buffer, size_t(n));
        }
    }
    int fd_ = -1, status_ = 0;
    pid_t pid_ = 0;
    bool found_ = false, ended_ = false, open_ = true;
    std::string output_;
};

int execute(lua_State* L) {
    auto words = words_of(L, 1);
    Options o(L, 2, {"timeout_secs"});
    auto end = Clock::now() + std::chrono::duration<double>(o.number("timeout_secs", 10));
    Child child(words);
    bool ended = !child.found();
    while (!ended && Clock::now() < end) {
        throw_if_interrupted(L);
        ended = child.wait_a_moment();
    }
    child.stop();
    push_ordered_table(L, {"found", "timed_out", "code", "output"});
    auto set = [&](const char* name, bool value) {
        lua_pushboolean(L, value);
        lua_setfield(L, -2, name);
    };
    set("found", child.found());
    set("timed_out", !ended);
    lua_pushinteger(L, child.found() ? child.code() : 127);
    lua_setfield(L, -2, "code");
    push_string(L, child.output());
    lua_setfield(L, -2, "output");
    return 1;
}

int become(lua_State* L) {
    auto words = words_of(L, 1);
    auto list = pointers(words);
    std::fflush(stdout);
    execvp(list[0], list.data());
    MOE_THROW(io, "moe.become", words[0] + ": " + std::strerror(errno), "a program on the PATH", "");
}

fs::path own_path() { return fs::read_symlink("/proc/self/exe"); }

int executable(lua_State* L) { return push_string(L, own_path().native()), 1; }

int home(lua_State* L) {
    std::error_code ignored;
    for (fs::path folder = own_path().parent_path(); folder.has_relative_path(); folder = folder.parent_path()) {
        if (!fs::is_directory(folder / "experiments", ignored) || !fs::is_directory(folder / "configs", ignored)) continue;
        push_string(L, folder.native());
        return 1;
    }
    return lua_pushnil(L), 1;
}

int memory_of_host(lua_State* L) {
    HostMemory m = host_memory();
    push_ordered_table(L, {"total", "available"});
    lua_pushinteger(L, m.total);
    lua_setfield(L, -2, "total");
    lua_pushinteger(L, m.available);
    lua_setfield(L, -2, "available");
    return 1;
}

int gpus(lua_State* L) {
    auto list = train::gpus();
    lua_createtable(L, int(list.size()), 0);
    for (size_t i = 0; i < list.size(); ++i) {
        push_ordered_table(L, {"name", "memory", "capability"});
        push_string(L, list[i].name);
        lua_setfield(L, -2, "name");
        lua_pushinteger(L, list[i].memory_bytes);
        lua_setfield(L, -2, "memory");
        push_string(L, fmt::format("{}.{}", list[i].major, list[i].minor));
        lua_setfield(L, -2, "capability");
        lua_rawseti(L, -2, lua_Integer(i + 1));
    }
    return 1;
}

/// Opened and closed: what it says about MPI is whether a run of several ranks could start.
int mpi_plugin(lua_State* L) {
    for (auto& file : dist::plugin_candidates()) {
        std::error_code ignored;
        if (!fs::exists(file, ignored)) continue;
        void* library = dlopen(file.c_str(), RTLD_LAZY | RTLD_LOCAL);
        if (!library) {
            lua_pushnil(L);
            push_string(L, dlerror());
            return 2;
        }
        dlclose(library);
        push_string(L, file);
        return 1;
    }
    lua_pushnil(L);
    push_string(L, std::string(dist::kMpiPlugin) + " was not built");
    return 2;
}

int free_space(lua_State* L) {
    // Of the nearest folder above that exists: an output folder is made later.
    std::string path = check_string(L, 1, "path");
    std::error_code e;
    fs::path folder = fs::absolute(path, e);
    while (!fs::exists(folder, e) && folder.has_relative_path()) folder = folder.parent_path();
    auto space = fs::space(folder, e);
    MOE_CHECK(!e, io, "moe.fs.free", folder.native() + ": " + e.message(), "a file system that can be asked", "");
    lua_pushinteger(L, lua_Integer(space.available));
    lua_pushboolean(L, access(folder.c_str(), W_OK) == 0);
    return 2;
}

int status(lua_State* L) {
    std::string line = check_string(L, 1, "line");
    if (control(L).print) log::status(line);
    return 0;
}

void push_rows(lua_State* L, const std::vector<train::ProfileRow>& rows) {
    lua_createtable(L, int(rows.size()), 0);
    for (size_t i = 0; i < rows.size(); ++i) {
        push_ordered_table(L, {"name", "count", "secs"});
        push_string(L, rows[i].name);
        lua_setfield(L, -2, "name");
        lua_pushinteger(L, rows[i].count);
        lua_setfield(L, -2, "count");
        lua_pushnumber(L, rows[i].secs);
        lua_setfield(L, -2, "secs");
        lua_rawseti(L, -2, lua_Integer(i + 1));
    }
}

int profile(lua_State* L) {
    check_function(L, 1, "work");
    train::Profile p = train::profile([&] {
        lua_pushvalue(L, 1);
        lua_call(L, 0, 0);
    });
    push_ordered_table(L, {"wall_secs", "busy_secs", "kernels", "phases", "calls"});
    lua_pushnumber(L, p.wall_secs);
    lua_setfield(L, -2, "wall_secs");
    lua_pushnumber(L, p.busy_secs);
    lua_setfield(L, -2, "busy_secs");
    push_rows(L, p.kernels);
    lua_setfield(L, -2, "kernels");
    push_rows(L, p.phases);
    lua_setfield(L, -2, "phases");
    push_rows(L, p.calls);
    lua_setfield(L, -2, "calls");
    return 1;
}

const Binding kFunctions[] = {
    {"profile", profile,
     "moe.profile(work): calls work() and says where its time went: {wall_secs, busy_secs (of a GPU's kernels), kernels, phases, calls (of the CUDA runtime)}, the last three lists of {name, count, secs}, most costly first. "
     "On a GPU kernels are its kernels and copies, on a CPU operators without the time of those they call; phases are the parts of a training step, \"forward attention\" and so on.\n"
     "Example: print(moe.profile(function() return moe.randn({ 64, 64 }):matmul(moe.randn { 64, 64 }) end).wall_secs)"},
    {"execute", execute,
     "moe.execute({\"program\", \"argument\", …}, {timeout_secs = 10}): runs a program without a shell: {found (is there such a program), timed_out (it was ended), code, output (with its errors)}.\n"
     "Example: print(moe.execute({ \"echo\", \"hello\" }).output)"},
    {"become", become, "moe.become {\"program\", \"argument\", …}: this process becomes that program; nothing after it runs."},
    {"executable", executable, "moe.executable(): path of this program.\n"
     "Example: print(moe.executable())"},
    {"home", home, "moe.home(): the folder around this program that has experiments/ and configs/: the source tree or the unpacked archive; nil where there is none.\n"
     "Example: print(moe.home())"},
    {"host_memory", memory_of_host, "moe.host_memory(): bytes {total, available} of this machine, or of the container or job that this is in.\n"
     "Example: print(moe.format_bytes(moe.host_memory().available))"},
    {"gpus", gpus, "moe.gpus(): the GPUs that LibTorch sees: a list of {name, memory (bytes), capability (\"9.0\")}.\n"
     "Example: print(#moe.gpus())"},
    {"mpi_plugin", mpi_plugin, "moe.mpi_plugin(): path of the MPI plugin, or nil and why it cannot be opened."},
    {"status", status, "moe.status(line): one line at the bottom of a terminal while others scroll above it; \"\" removes it."},
};
constexpr Binding kFree = {"free", free_space, "moe.fs.free(path): bytes free where path is or would be, and whether that folder can be written.\n"
     "Example: print(moe.format_bytes((moe.fs.free \"/tmp\")))"};
}  // namespace

void open_machine(lua_State* L) {
    set_functions(L, "moe.", kFunctions);
    lua_getfield(L, -1, "fs");
    push_function(L, kFree, "moe.fs.free");
    lua_setfield(L, -2, "free");
    lua_pop(L, 1);
    push_string(L, kTorchVersion);
    lua_setfield(L, -2, "torch_version");
    lua_pushboolean(L, train::built_with_cuda());
    lua_setfield(L, -2, "with_cuda");
}
}  // namespace moe::lua
