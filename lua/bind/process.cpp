// Programs that run beside this one: moe.spawn, and waiting for several of them.
#include "core/base/interrupt.h"
#include "core/base/stop.h"
#include "lua/bind/bind.h"
#include "lua/bind/control.h"

#include <ATen/Parallel.h>

#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <limits>
#include <memory>
#include <thread>

extern char** environ;

namespace moe::lua {
/// A program in a process group of its own, so that it ends with all that it started. Ends it when it goes out of scope.
class Process {
public:
    Process(std::vector<std::string> words, const std::string& output) : name_(words[0]) {
        posix_spawn_file_actions_t actions;
        posix_spawn_file_actions_init(&actions);
        posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
        posix_spawn_file_actions_addopen(&actions, STDOUT_FILENO, output.empty() ? "/dev/null" : output.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0644);
        posix_spawn_file_actions_adddup2(&actions, STDOUT_FILENO, STDERR_FILENO);
        posix_spawnattr_t attributes;
        posix_spawnattr_init(&attributes);
        posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETPGROUP);
        std::vector<char*> list;
        for (auto& word : words) list.push_back(word.data());
        list.push_back(nullptr);
        int failed = posix_spawnp(&pid_, list[0], &actions, &attributes, list.data(), environ);
        posix_spawnattr_destroy(&attributes);
        posix_spawn_file_actions_destroy(&actions);
        if (failed) pid_ = 0;
        MOE_CHECK(!failed, io, "moe.spawn", name_ + ": " + std::strerror(failed), "a program on the PATH, and an output file that can be written", "");
    }
    Process(const Process&) = delete;
    ~Process() { kill_now(); }

    pid_t pid() const { return pid_; }
    const std::string& name() const { return name_; }
    bool ended() {
        if (ended_ || !pid_) return ended_;
        pid_t got = waitpid(pid_, &status_, WNOHANG);
        ended_ = got == pid_ || (got < 0 && errno == ECHILD);
        if (got < 0 && ended_) status_ = 255 << 8;          // somebody else has waited for it: how it ended is not known
        return ended_;
    }
    /// As a shell says it: 128 + the signal that ended it.
    int code() const { return WIFEXITED(status_) ? WEXITSTATUS(status_) : 128 + WTERMSIG(status_); }
    void signal(int number) {
        if (pid_ && !ended()) ::kill(-pid_, number);
    }
    void kill_now() {
        if (!pid_ || ended()) return;
        ::kill(-pid_, SIGKILL);
        while (waitpid(pid_, &status_, 0) < 0 && errno == EINTR) {}
        ended_ = true;
    }

private:
    pid_t pid_ = 0;
    int status_ = 0;
    bool ended_ = false;
    std::string name_;
};
/// Shared: whoever waits for one lets the state's lock go, and a callback may free it meanwhile.
using ProcessPtr = std::shared_ptr<Process>;
template <>
struct TypeName<ProcessPtr> {
    static constexpr const char* value = "process";
};

namespace {
using Clock = std::chrono::steady_clock;
constexpr auto kPoll = std::chrono::milliseconds(5);
constexpr auto kGrace = std::chrono::seconds(20);    // for training to reach its step's edge and save

int spawn(lua_State* L) {
    check_table(L, 1, "words");
    std::vector<std::string> words;
    for (lua_Integer i = 1, n = lua_Integer(lua_rawlen(L, 1)); i <= n; ++i) {
        lua_rawgeti(L, 1, i);
        words.push_back(check_string(L, -1, "word"));
        lua_pop(L, 1);
    }
    MOE_CHECK(!words.empty(), usage, "moe.spawn: words", "none", "{\"program\", \"argument\", …}", "");
    Options o(L, 2, {"output"});
    push<ProcessPtr>(L, std::make_shared<Process>(words, o.string("output", "")));
    return 1;
}

void push_code(lua_State* L, Process& p) {
    if (p.ended()) lua_pushinteger(L, p.code());
    else lua_pushnil(L);
}

/// A moment in which others may use the state: callbacks of a job are not kept waiting.
void nap(lua_State* L) {
    Unlocked unlocked(L);
    std::this_thread::sleep_for(kPoll);
}

/// Asks them to save and end, and ends those that do not.
void stop_all(lua_State* L, const std::vector<ProcessPtr>& list) {
    for (auto& p : list) p->signal(SIGTERM);
    auto end = Clock::now() + kGrace;
    auto all_ended = [&] {
        bool all = true;
        for (auto& p : list) all &= p->ended();
        return all;
    };
    while (!all_ended() && Clock::now() < end) nap(L);
    for (auto& p : list) p->kill_now();
}

/// Place in the list of one that has ended, −1 after the time. An interrupt, or the wish that this program stops, stops all of them.
int wait_for(lua_State* L, const std::vector<ProcessPtr>& list, double timeout_secs) {
    auto start = Clock::now();
    for (;;) {
        for (size_t i = 0; i < list.size(); ++i)
            if (list[i]->ended()) return int(i);
        if (control(L).interrupted || stop_requested()) {
            stop_all(L, list);
            throw_if_interrupted(L);
            throw Error(interruption());
        }
        if (std::chrono::duration<double>(Clock::now() - start).count() >= timeout_secs) return -1;
        nap(L);
    }
}

int wait(lua_State* L) {
    ProcessPtr p = self<ProcessPtr>(L);
    Options o(L, 2, {"timeout_secs"});
    StopListener listener;
    wait_for(L, {p}, o.number("timeout_secs", std::numeric_limits<double>::infinity()));
    push_code(L, *p);
    return 1;
}

int wait_any(lua_State* L) {
    check_table(L, 1, "processes");
    std::vector<ProcessPtr> list;
    for (lua_Integer i = 1, n = lua_Integer(lua_rawlen(L, 1)); i <= n; ++i) {
        lua_rawgeti(L, 1, i);
        list.push_back(check<ProcessPtr>(L, -1, fmt::format("processes[{}]", i).c_str()));
        lua_pop(L, 1);
    }
    Options o(L, 2, {"timeout_secs"});
    MOE_CHECK(!list.empty(), usage, "moe.wait_any: processes", "none", "a list of what moe.spawn gave", "");
    StopListener listener;
    int i = wait_for(L, list, o.number("timeout_secs", std::numeric_limits<double>::infinity()));
    if (i < 0) return lua_pushnil(L), 1;
    lua_pushinteger(L, i + 1);
    lua_pushinteger(L, list[size_t(i)]->code());
    return 2;
}

int poll(lua_State* L) { return push_code(L, *self<ProcessPtr>(L)), 1; }
int stop(lua_State* L) {
    ProcessPtr p = self<ProcessPtr>(L);
    stop_all(L, {p});
    push_code(L, *p);
    return 1;
}
int kill_process(lua_State* L) {
    ProcessPtr p = self<ProcessPtr>(L);
    p->kill_now();
    push_code(L, *p);
    return 1;
}
int pid(lua_State* L) { return lua_pushinteger(L, self<ProcessPtr>(L)->pid()), 1; }
int text(lua_State* L) {
    auto* box = test_box<ProcessPtr>(L, 1);
    if (!box || !*box) return lua_pushliteral(L, "process (freed)"), 1;
    Process& p = ***box;
    push_string(L, fmt::format("process {}: {}, {}", p.pid(), std::filesystem::path(p.name()).filename().native(), p.ended() ? fmt::format("ended with {}", p.code()) : "runs"));
    return 1;
}

int stopping(lua_State* L) { return lua_pushboolean(L, stop_requested()), 1; }
int threads(lua_State* L) { return lua_pushinteger(L, at::get_num_threads()), 1; }

const Binding kFunctions[] = {
    {"spawn", spawn,
     "moe.spawn({\"program\", \"argument\", …}, {output = file}): starts a program beside this one, without a shell and without input; what it prints goes to the file, or nowhere. It ends when the process object is collected, freed or closed.\n"
     "Example: print(moe.spawn({ \"true\" }):wait())"},
    {"wait_any", wait_any,
     "moe.wait_any({process, …}, {timeout_secs =}): waits until one of them has ended: its place in the list and its exit code; nil after the time. An interrupt asks all of them to stop, as process:stop does.\n"
     "Example: print(moe.wait_any { moe.spawn { \"false\" } })"},
    {"stopping", stopping, "moe.stopping(): true once this program was asked to save and end soon (SIGTERM, SIGUSR1, or the stop file of a run)."},
    {"num_threads", threads, "moe.num_threads(): threads that this process computes with.\nExample: print(moe.num_threads())"},
};
const Binding kMethods[] = {
    {"poll", poll, "process:poll(): its exit code (128 + the signal that ended it), nil while it runs."},
    {"wait", wait, "process:wait {timeout_secs =}: waits for its end and gives its exit code; nil after the time. An interrupt stops it."},
    {"stop", stop, "process:stop(): asks it to save and end (SIGTERM), ends it after 20 s; gives its exit code."},
    {"kill", kill_process, "process:kill(): ends it at once, with all that it started."},
};
const Binding kFields[] = {{"pid", pid, "process.pid: its process id."}};
const Binding kMeta[] = {{"__tostring", text, "tostring(process): one line about it."}};
}  // namespace

void open_process(lua_State* L) {
    set_functions(L, "moe.", kFunctions);
    register_type<ProcessPtr>(L, {.name = nullptr, .help = "process: a program that moe.spawn started.", .methods = kMethods, .fields = kFields, .meta = kMeta});
}
}  // namespace moe::lua
