// A Lua session: owner of the state, with moe, viz and help preloaded. Scripts, the shell and the notebook kernel talk to it.
#pragma once
#include "core/base/error.h"
#include "lua/bind/control.h"
#include "lua/session/complete.h"

#include <pthread.h>

#include <atomic>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace moe::lua {

struct SessionOptions {
    std::function<void(std::string_view)> print;   ///< gets what print and help write; unset: standard output
    bool quiet = false;                            ///< nothing is printed: ranks other than 0
    std::string command;                           ///< command line, for env.json of runs
    std::string device;                            ///< cpu, cuda; "": what the configuration says
    bool json = false;                             ///< runs log JSON lines
    bool interactive = false;                      ///< inputs follow each other: exit() is there, history is kept, an input's locals stay for the next
    std::function<void(std::string_view)> page;    ///< gets long texts that are there at once, such as help; unset: as print
    std::function<void(int)> give_up;              ///< ends the program at once with this code: of a prompt on several ranks that have lost each other
};

/// What an evaluation gave: the values as texts, or the error.
struct Result {
    std::vector<std::string> values;               ///< eval: as echo_text shows them, in an interactive session none where all are nil
    std::vector<std::string> json;                 ///< with SessionOptions::json: the same as echo_json shows them
    std::optional<ErrorParts> error;
    double secs = 0;
    bool on_all_ranks = false;                     ///< the error is that of all ranks, wherever it came from: one of them shows it
    int64_t peak_bytes = 0;                        ///< the most that was resident; in an interactive session since the start of the input
    bool ok() const { return !error; }
    /// Process exit code: 0, or that of the error's kind.
    int exit_code() const { return error ? Error(*error).exit_code() : 0; }
};

/// Arguments of a script or command: positional ones, and key=value pairs.
struct Arguments {
    std::vector<std::string> positional;
    std::vector<std::pair<std::string, std::string>> options;
    std::vector<std::pair<std::string, std::string>> given;    ///< a command's own options, "steps" of --steps; flags are "true"
    /// "a.b=1" is an option where the part before the first "=" is a name (letters, digits, "_", "."), --help and -h are help = true, else positional.
    static Arguments parse(const std::vector<std::string>& words);
};

/// An input of an interactive session; `name` is what its errors and functions show as their file.
struct HistoryEntry {
    std::string code, name;
    double secs = 0;
    bool ok = true;
};

/// Not thread safe, but for interrupt(). On several ranks each has one, and all run the same: what they evaluate ends on all before it ends on one,
/// with the error of any. Inputs of an interactive session are given to rank 0, and the others follow.
class Session {
public:
    explicit Session(SessionOptions options = {});
    ~Session();
    Session(const Session&) = delete;

    /// Runs an expression or statements. `name` is what errors show in place of a file. The first result is also the global `_`.
    Result eval(const std::string& code, const std::string& name = "input");
    /// Runs a file with the global `arg`: positional arguments, arg[0] the path, arg.options the key=value ones, numbers and
    /// true/false converted.
    Result run_file(const std::string& path, const Arguments& arguments = {});
    /// Runs the command in the embedded module moe.commands.<name>, a function of (positional, options, given, assignments): `given`
    /// and `assignments`, the key=value words as they were typed, stay texts.
    Result run_command(const std::string& name, const Arguments& arguments);
    /// Names of the embedded commands, sorted.
    static std::vector<std::string> commands();
    /// One of several ranks.
    bool is_of_several() const { return control_.ranks != nullptr; }
    /// Several ranks, and not the one that gets the inputs.
    bool follows() const;
    /// Evaluates what rank 0 evaluates until its lead_out(), and gives the exit code. `evaluating` is told before and after each input.
    int follow(const std::function<void(bool)>& evaluating = {});
    /// Rank 0: there are no further inputs.
    void lead_out(int exit_code);
    /// Where all fail alike: returns once all ranks are here, so that none ends the others before rank 0 has shown why. A few seconds at most.
    void leave();
    /// What ends an interactive session besides Lua's exit(): the words exit, quit and quit(), where no global of the user has that name.
    bool ends(const std::string& input);
    /// False where the code ends in the middle of something and more lines could complete it.
    bool is_complete(const std::string& code);

    /// What TAB offers at byte `cursor`. Runs no Lua function.
    Completion complete(const std::string& code, size_t cursor);
    /// Explains the name at byte `cursor`, or the function whose arguments the cursor is in; with `detail` a Lua function's source, too.
    Inspection inspect(const std::string& code, size_t cursor, bool detail);
    /// The inputs so far; none where the session is not interactive.
    const std::vector<HistoryEntry>& history() const { return history_; }
    /// Set once exit() was called.
    std::optional<int> exit_code() const { return exit_code_; }

    /// What runs now raises an error of kind `interrupted`: Lua at its next instruction, training at its next step, a read that waits
    /// for input at once. May be called from a signal handler or another thread (which sends SIGUSR2 to the one that evaluates).
    void interrupt() noexcept;
    lua_State* state() { return L_; }

private:
    void open();
    bool load(const std::string& code, const std::string& chunk_name, Result& result);
    Result call(int num_arguments, bool echo = false);
    void push_arguments(const Arguments& arguments, const std::string& script);
    Result eval_here(const std::string& code, const std::string& name);
    Result file_here(const std::string& path, const Arguments& arguments);
    Result command_here(const std::string& name, const Arguments& arguments);
    Result ended_by_all(Result result, const std::string& what);
    void protect(const std::function<void()>& f);
    std::string source_of(const std::string& chunk) const;
    static int history_of(lua_State* L);
    static int exit_of(lua_State* L);

    Control control_;
    lua_State* L_ = nullptr;
    bool interactive_;
    std::function<void(int)> give_up_;
    std::atomic<bool> running_ = false;
    std::atomic<pthread_t> thread_{};               ///< the one that evaluates
    int depth_ = 0;                                 ///< evaluations inside each other
    std::vector<pid_t> followers_;                  ///< rank 0's: processes of this machine that an interrupt reaches
    std::vector<std::string> lua_globals_;          ///< names that a fresh state has
    std::vector<HistoryEntry> history_;
    std::optional<int> exit_code_;
};

/// An error as a person reads it: "error: op: got …, want … (hint)", the place, and Lua's traceback where it says more.
std::string describe(const ErrorParts& error, bool colour);
/// The same as one JSON object on a line.
std::string to_json(const ErrorParts& error);

}  // namespace moe::lua
