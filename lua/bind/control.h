// What a session shares with the bindings of its Lua state: the interrupt, and who may print.
#pragma once
#include <lua.hpp>

#include <atomic>
#include <functional>
#include <string>
#include <string_view>

namespace moe::lua {

struct Control {
    std::atomic<bool> interrupted = false;
    std::atomic<lua_State*> running = nullptr;           ///< the coroutine that runs now: the one whose hook an interrupt arms
    std::function<void(std::string_view)> print;         ///< where print and help write; unset on ranks that stay quiet
    std::string script;                                  ///< path of the script that runs, "" for none
    std::string command;                                 ///< the command line, for a run's env.json
    std::string device;                                  ///< "cpu", "cuda", or "" for what the configuration says
    bool ends_with_program = false;                      ///< what runs is a script or a command: an interrupt ends the process, not only it
    bool json = false;                                   ///< runs log one JSON object a line
    std::function<void(std::string_view)> page;          ///< where long texts go that are there at once; unset: print
};

/// The control of a state; it lives in the state's extra space, which coroutines copy.
inline Control*& control_slot(lua_State* L) { return *static_cast<Control**>(lua_getextraspace(L)); }
inline Control& control(lua_State* L) { return *control_slot(L); }

/// Throws moe::Error (interrupted) after an interrupt: long C++ calls ask between their steps.
void throw_if_interrupted(lua_State* L);

/// Replaces coroutine.resume and coroutine.wrap by versions that keep Control::running, so that an interrupt finds the coroutine
/// that runs: hooks belong to one coroutine each.
void open_coroutines(lua_State* L);

/// Where an interrupt ends the program, a script or a command: saves the runs whose last step is not saved (checkpointing.save_on_exit).
/// On several ranks, where an interrupt does not reach all at the same step, only SIGTERM and SIGUSR1 save. Failures are warnings.
void save_runs_on_interrupt();

/// From a signal handler or another thread: the running Lua code raises an error of kind `interrupted` at its next instruction.
void interrupt(Control& control) noexcept;

}  // namespace moe::lua
