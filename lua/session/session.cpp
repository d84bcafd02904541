#include "lua/session/session.h"

#include "core/base/json.h"
#include "core/base/log.h"
#include "lua/bind/lua.h"
#include "lua/bind/ranks.h"
#include "lua/session/echo.h"
#include "lua/session/lexer.h"
#include "lua/session/modules.h"


#include <pthread.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <filesystem>
#include <fstream>

namespace moe::lua {
namespace {
/// Message handler of every evaluation: makes the error object while the stack that raised it is still there.
int on_error(lua_State* L) {
    if (control(L).ends_with_program && error_parts(L, 1).kind == ErrorKind::interrupted) save_runs("interrupted");
    add_traceback_to_error(L);
    return 1;
}

void push_converted(lua_State* L, const std::string& text) {
    if (text == "true" || text == "false") {
        lua_pushboolean(L, text == "true");
    } else if (text.empty() || lua_stringtonumber(L, text.c_str()) != text.size() + 1) {
        push_string(L, text);
    }
}

/// The most bytes that were resident since the last forget_peak().
int64_t peak_bytes() {
    rusage usage{};
    getrusage(RUSAGE_SELF, &usage);
    return int64_t(usage.ru_maxrss) * 1024;
}
/// Where the kernel does not do it, the peak is that of the whole process.
void forget_peak() { std::ofstream("/proc/self/clear_refs") << "5"; }

const char kExitKey = 0;                    ///< its address: where the registry has our global exit

/// What the results of a call are needed for, and the texts that they gave.
struct Results {
    bool echo;
    std::vector<std::string> texts, json;
    bool all_nil = true;
};

/// A lightuserdata Results, values → nothing. Runs protected and interruptible: a __tostring may raise, or never end.
int show_results(lua_State* L) {
    auto& results = *static_cast<Results*>(lua_touserdata(L, 1));
    for (int i = 2, n = lua_gettop(L); i <= n; ++i) {
        results.all_nil &= lua_isnil(L, i);
        std::string text = results.echo ? echo_text(L, i) : to_string(L, i);
        if (results.echo && n == 2 && !text.empty() && text == control(L).last_log) continue;         // a step's metrics, which stand there already
        if (control(L).json) results.json.push_back(echo_json(L, i));
        results.texts.push_back(std::move(text));
    }
    if (results.echo && lua_gettop(L) >= 2 && !lua_isnil(L, 2)) {
        lua_pushvalue(L, 2);
        lua_setglobal(L, "_");
    }
    return 0;
}

/// The signal of Session::interrupt needs a handler, or it would end the program; a program's own is left.
void handle_wake_signal() {
    struct sigaction action = {};
    if (sigaction(SIGUSR2, nullptr, &action) != 0 || action.sa_handler != SIG_DFL) return;
    action = {};
    action.sa_handler = [](int) {};
    sigaction(SIGUSR2, &action, nullptr);
}

/// Lua's own globals are not replaced by a local of the same name: modules need them.
bool is_global_of_lua(const void* names, std::string_view name) {
    auto& list = *static_cast<const std::vector<std::string>*>(names);
    return std::find(list.begin(), list.end(), name) != list.end();
}

// --- several ranks ---

constexpr const char* kPrompt = "the prompt";
constexpr double kInputSecs = 60;           // an input of a prompt that fails on one rank: the others may be in a long step
constexpr double kLastSecs = 5;             // a script that fails is over: whoever does not come then is ended with it

std::string host_and_process() {
    char host[256] = "";
    gethostname(host, sizeof host - 1);
    return fmt::format("{} {}", getpid(), host);
}

/// An input for the other ranks: "1 input 3\n1 + 1"; "0 4": the end, with an exit code.
std::string packed_input(const std::string& name, const std::string& code) { return "1 " + name + "\n" + code; }

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

Session::Session(SessionOptions options) : interactive_(options.interactive), give_up_(std::move(options.give_up)) {
    control_.command = std::move(options.command);
    control_.device = std::move(options.device);
    control_.json = options.json;
    if (!options.quiet) {
        control_.print = options.print ? std::move(options.print) : [](std::string_view text) { log::print(text); };
        control_.page = std::move(options.page);
    }
    handle_wake_signal();
    control_.ranks = open_meeting();
    if (control_.ranks) {
        std::string own = host_and_process(), host = own.substr(own.find(' '));
        auto processes = exchange(*control_.ranks, "the start", own);
        for (size_t r = 1; !follows() && r < processes.size(); ++r)
            if (processes[r].ends_with(host)) followers_.push_back(pid_t(std::atoi(processes[r].c_str())));
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
    if (interactive_) save_runs("left");
    lua_close(L_);
}

void Session::open() {
    open_globals(L_);
    if (!interactive_) return;
    lua_pushglobaltable(L_);
    lua_globals_ = ordered_keys(L_, -1);
    static constexpr Binding kHistory = {"history", history_of, "moe.history(): the inputs of this session so far, a list of texts, the running one last."};
    static constexpr Binding kExit = {"exit", exit_of, "exit(code): ends the interactive session; code is the program's exit code, default 0. Ctrl-D does it, too. Runs of one rank whose last step is not saved are saved (checkpointing.save_on_exit)."};
    lua_getfield(L_, -1, "moe");
    lua_pushlightuserdata(L_, this);
    push_function(L_, kHistory, "moe.history", 1);
    lua_setfield(L_, -2, "history");
    lua_pushlightuserdata(L_, this);
    push_function(L_, kExit, "exit", 1);
    lua_pushvalue(L_, -1);
    lua_rawsetp(L_, LUA_REGISTRYINDEX, &kExitKey);
    lua_setfield(L_, -3, "exit");
    lua_pop(L_, 2);
}

int Session::history_of(lua_State* L) {
    auto& self = *static_cast<Session*>(lua_touserdata(L, upvalue(1)));
    lua_createtable(L, int(self.history_.size()), 0);
    for (size_t i = 0; i < self.history_.size(); ++i) {
        push_string(L, self.history_[i].code);
        lua_rawseti(L, -2, lua_Integer(i + 1));
    }
    return 1;
}

int Session::exit_of(lua_State* L) {
    auto& self = *static_cast<Session*>(lua_touserdata(L, upvalue(1)));
    int code = is_nothing(L, 1) ? 0 : lua_isboolean(L, 1) ? !lua_toboolean(L, 1) : int(check_integer(L, 1, "code"));
    self.exit_code_ = code;
    lua::interrupt(self.control_);      // so that no pcall around it holds it up
    throw Error({ErrorKind::interrupted, "exit", "", "", "", "", -1, ""});
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
Result Session::call(int num_arguments, bool echo) {
    Result result;
    int base = lua_gettop(L_) - num_arguments;
    lua_pushcfunction(L_, on_error);
    lua_insert(L_, base);
    auto start = std::chrono::steady_clock::now();
    if (interactive_) forget_peak();
    thread_ = pthread_self();
    running_ = true;
    control_.running = L_;
    control_.last_log.clear();
    int status = lua_pcall(L_, num_arguments, LUA_MULTRET, base);
    if (status == LUA_OK) {
        Results results{echo, {}};
        lua_pushcfunction(L_, show_results);
        lua_insert(L_, base + 1);
        lua_pushlightuserdata(L_, &results);
        lua_insert(L_, base + 2);
        status = lua_pcall(L_, lua_gettop(L_) - base - 1, 0, base);
        if (status == LUA_OK && !(echo && results.all_nil && interactive_)) result.values = std::move(results.texts), result.json = std::move(results.json);
    }
    running_ = false;
    control_.interrupted = false;
    lua_sethook(L_, nullptr, 0, 0);
    if (status != LUA_OK) {
        result.error = error_parts(L_, -1);
        if (status == LUA_ERRMEM) result.error->kind = ErrorKind::memory;
    }
    lua_settop(L_, base - 1);
    release_workers(control_);
    result.secs = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    result.peak_bytes = peak_bytes();
    return result;
}

bool Session::follows() const { return control_.ranks && control_.ranks->rank() > 0; }

int Session::follow(const std::function<void(bool)>& evaluating) {
    for (;;) {
        std::string input = exchange(*control_.ranks, kPrompt, "")[0];
        if (input.starts_with("0")) return std::atoi(input.c_str() + 1);
        size_t line = input.find('\n');
        if (evaluating) evaluating(true);
        control_.interrupted = false;
        eval(input.substr(line + 1), input.substr(2, line - 2));
        if (evaluating) evaluating(false);
    }
}

void Session::lead_out(int exit_code) {
    if (control_.ranks && !follows()) exchange(*control_.ranks, kPrompt, fmt::format("0 {}", exit_code));
}

void Session::leave() {
    if (control_.ranks) exchange(*control_.ranks, "the way out", "", kLastSecs);
}

Result Session::ended_by_all(Result result, const std::string& what) {
    if (!control_.ranks || depth_ > 0) return result;
    bool together = end_on_all_ranks(L_, what, result.error, interactive_ ? kInputSecs : kLastSecs);
    if (interactive_ && !together) {            // the others wait in a call that this rank has left: no further input could be given to them
        fmt::print(stderr, "{}\n", describe(*result.error, false));
        std::fflush(nullptr);
        if (give_up_) give_up_(result.exit_code());
    }
    control_.interrupted = false;               // one that came while this waited
    lua_sethook(L_, nullptr, 0, 0);
    result.on_all_ranks = together && result.error;
    if (result.error) result.values.clear();
    return result;
}

namespace {
struct Deeper {
    int& depth;
    explicit Deeper(int& d) : depth(d) { ++depth; }
    ~Deeper() { --depth; }
};
}  // namespace

Result Session::eval(const std::string& code, const std::string& name) {
    bool leads = interactive_ && control_.ranks && !follows() && depth_ == 0;
    if (leads) exchange(*control_.ranks, kPrompt, packed_input(name, code));
    return ended_by_all(eval_here(code, name), name);
}
Result Session::run_file(const std::string& path, const Arguments& arguments) { return ended_by_all(file_here(path, arguments), path); }
Result Session::run_command(const std::string& name, const Arguments& arguments) { return ended_by_all(command_here(name, arguments), "moelab " + name); }

Result Session::eval_here(const std::string& code, const std::string& name) {
    std::lock_guard guard(*control_.lock);
    Deeper deeper(depth_);
    Result result;
    std::string chunk = "=" + name, kept = code;
    if (interactive_) {
        kept = with_locals_kept(code, is_global_of_lua, &lua_globals_);
        history_.push_back({code, name, 0, true});
    }
    if (!load("return " + kept, chunk, result)) {
        std::optional<ErrorParts> of_expression = std::exchange(result.error, std::nullopt);
        if (!load(kept, chunk, result)) {
            // Of "1 +* 2" the statement says that it cannot begin with 1: the expression got further.
            std::string_view begin(kept);
            begin.remove_prefix(std::min(begin.find_first_not_of(" \t\r\n"), begin.size()));
            size_t quote = result.error->op.rfind("near '");
            if (quote != std::string::npos && begin.starts_with(std::string_view(result.error->op).substr(quote + 6, result.error->op.size() - quote - 7))) result.error = of_expression;
            if (interactive_) history_.back().ok = false;
            return result;
        }
    }
    size_t entry = history_.size();             // an input may evaluate others
    result = call(0, true);
    if (interactive_) {
        history_[entry - 1].secs = result.secs;
        history_[entry - 1].ok = result.ok();
    }
    return result;
}

void Session::interrupt() noexcept {
    lua::interrupt(control_);
    for (pid_t process : followers_) kill(process, SIGINT);
    // From another thread: a read that blocks comes back, because a signal with a handler and without SA_RESTART arrived.
    if (running_ && !pthread_equal(thread_, pthread_self())) pthread_kill(thread_, SIGUSR2);
}

Completion Session::complete(const std::string& code, size_t cursor) {
    std::lock_guard guard(*control_.lock);
    Alone alone(L_);                            // other ranks know nothing of what is typed
    Completion out{cursor, cursor, {}};
    protect([&] { out = lua::complete(L_, code, cursor); });
    return out;
}

Inspection Session::inspect(const std::string& code, size_t cursor, bool detail) {
    std::lock_guard guard(*control_.lock);
    Alone alone(L_);
    Inspection out;
    protect([&] { out = lua::inspect(L_, code, cursor, detail, [this](const std::string& chunk) { return source_of(chunk); }); });
    return out;
}

std::string Session::source_of(const std::string& chunk) const {
    std::string name = chunk.substr(std::min<size_t>(1, chunk.size()));
    if (chunk.starts_with("=")) {
        for (auto entry = history_.rbegin(); entry != history_.rend(); ++entry)
            if (entry->name == name) return entry->code;
        return {};
    }
    if (!chunk.starts_with("@")) return chunk;              // of load(text)
    if (std::string text = module_text(name); !text.empty()) return text;
    try {
        return read_text(name);
    } catch (const Error&) {
        return {};
    }
}

/// Runs what may raise Lua's errors; they end it, and the stack is as it was.
void Session::protect(const std::function<void()>& f) {
    int top = lua_gettop(L_);
    lua_pushcfunction(L_, [](lua_State* L) {
        (*static_cast<const std::function<void()>*>(lua_touserdata(L, 1)))();
        return 0;
    });
    lua_pushlightuserdata(L_, const_cast<std::function<void()>*>(&f));
    lua_pcall(L_, 1, 0, 0);
    lua_settop(L_, top);
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

Result Session::file_here(const std::string& path, const Arguments& arguments) {
    std::lock_guard guard(*control_.lock);
    Deeper deeper(depth_);
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

Result Session::command_here(const std::string& name, const Arguments& arguments) {
    std::lock_guard guard(*control_.lock);
    Deeper deeper(depth_);
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

std::vector<std::string> Session::commands() { return command_names(); }

bool Session::ends(const std::string& input) {
    if (input != "exit" && input != "quit" && input != "quit()") return false;
    std::lock_guard guard(*control_.lock);
    lua_rawgetp(L_, LUA_REGISTRYINDEX, &kExitKey);
    lua_pushglobaltable(L_);
    lua_pushstring(L_, input == "exit" ? "exit" : "quit");
    lua_rawget(L_, -2);
    bool is_theirs = !lua_isnil(L_, -1) && !lua_rawequal(L_, -1, -3);
    lua_pop(L_, 3);
    return !is_theirs;
}

bool Session::is_complete(const std::string& code) {
    std::lock_guard guard(*control_.lock);
    for (const char* start : {"return ", ""}) {
        // A line end is appended: an open quoted string cannot be completed by more lines, an open long one can.
        std::string text = start + code + "\n";
        bool loads = luaL_loadbufferx(L_, text.data(), text.size(), "=input", "t") == LUA_OK;
        std::string message = loads ? "" : error_parts(L_, -1).op;
        lua_pop(L_, 1);
        if (loads) return true;
        if (!*start) return !message.ends_with("<eof>");
    }
    return true;
}
}  // namespace moe::lua
