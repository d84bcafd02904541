// Functions of a script that C++ calls: hooks, rules, schedules. Each runs on a coroutine of its own, under the state's lock, whichever thread calls.
#pragma once
#include "core/train/script.h"
#include "lua/bind/control.h"
#include "lua/bind/lua.h"

#include <functional>
#include <memory>
#include <string>

namespace moe::lua {

/// A Lua function that any thread may call.
class Callable {
public:
    /// Of the function on L's top, which is popped.
    explicit Callable(lua_State* L);
    ~Callable();
    Callable(const Callable&) = delete;
    /// Calls it: `push` pushes arguments onto the coroutine and gives their number, `take` reads `num_results` results from stack index 1 on. Draws of moe's and
    /// Lua's generators inside follow from `seed` alone, and those outside do not notice. What it raises is thrown as moe::Error with its traceback, and with `place` in front.
    void call(const std::function<std::string()>& place, uint64_t seed, const std::function<int(lua_State*)>& push, int num_results, const std::function<void(lua_State*)>& take);

private:
    void call_function(uint64_t seed, const std::function<int(lua_State*)>& push, int num_results, const std::function<void(lua_State*)>& take);

    Control* control_;
    std::shared_ptr<std::atomic<bool>> alive_;
    std::shared_ptr<StateLock> lock_;
    lua_State* co_ = nullptr;
    bool is_called_ = false;
};

/// While it lives, this thread is a background one whose control, with an interrupt of its own, this is.
class InBackground {
public:
    explicit InBackground(Control& control);
    ~InBackground();
};

/// The control of the background thread that this is, null for another thread.
Control* background_control();

/// A protected call on a coroutine: function and arguments are on its stack. Throws what it raised as moe::Error with its traceback.
void call_protected(lua_State* co, int num_arguments, int num_results);

/// lua_pcall where what is raised arrives as the error object, with the traceback of where it was raised; a script's own object as it is.
int call_with_traceback(lua_State* L, int num_arguments, int num_results);

/// Compiles what script_of() stored; made for the state's main thread.
train::ScriptCompiler script_compiler(lua_State* L);
/// The function at index as an intervention's argument: its source, or with replay = false a reference into this state.
train::Values script_of(lua_State* L, int index, bool replay);

}  // namespace moe::lua
