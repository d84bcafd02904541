// A Lua session: owner of the state, with moe, viz and help preloaded. Scripts, the shell and the notebook kernel talk to it.
#pragma once
#include "core/base/error.h"
#include "lua/bind/control.h"

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
};

/// What an evaluation gave: the values as tostring shows them, or the error.
struct Result {
    std::vector<std::string> values;
    std::optional<ErrorParts> error;
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

/// Not thread safe, but for interrupt().
class Session {
public:
    explicit Session(SessionOptions options = {});
    ~Session();
    Session(const Session&) = delete;

    /// Runs an expression or statements. `name` is what errors show in place of a file.
    Result eval(const std::string& code, const std::string& name = "input");
    /// Runs a file with the global `arg`: positional arguments, arg[0] the path, arg.options the key=value ones, numbers and
    /// true/false converted.
    Result run_file(const std::string& path, const Arguments& arguments = {});
    /// Runs the command in the embedded module moe.commands.<name>, a function of (positional, options, given, assignments): `given`
    /// and `assignments`, the key=value words as they were typed, stay texts.
    Result run_command(const std::string& name, const Arguments& arguments);
    /// Names of the embedded commands, sorted.
    static std::vector<std::string> commands();
    /// False where the code ends in the middle of something and more lines could complete it.
    bool is_complete(const std::string& code);

    /// What runs now raises an error of kind `interrupted`: Lua at its next instruction, training at its next step. May be called
    /// from a signal handler or another thread.
    void interrupt() noexcept { lua::interrupt(control_); }
    lua_State* state() { return L_; }

private:
    void open();
    bool load(const std::string& code, const std::string& chunk_name, Result& result);
    Result call(int num_arguments);
    void push_arguments(const Arguments& arguments, const std::string& script);

    Control control_;
    lua_State* L_ = nullptr;
};

/// An error as a person reads it: "error: op: got …, want … (hint)", the place, and Lua's traceback where it says more.
std::string describe(const ErrorParts& error, bool colour);
/// The same as one JSON object on a line.
std::string to_json(const ErrorParts& error);

}  // namespace moe::lua
