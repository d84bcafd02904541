// Several ranks run the same inputs. What Lua does must then be the same on all: bindings that need all ranks meet first, an error of one rank is
// raised on all, and what could differ (the time, what a person types) comes from rank 0. On one rank all of this does nothing.
#pragma once
#include "core/train/meeting.h"
#include "lua/bind/lua.h"

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace moe::lua {

/// Where the running thread meets those of the other ranks; null on one rank, and while this rank runs something alone.
train::Meeting* ranks_of(lua_State* L);

/// While it lives, what runs is this rank's alone: a function of moe.on, a hook, completion.
class Alone {
public:
    explicit Alone(lua_State* L);
    ~Alone();
    Alone(const Alone&) = delete;

private:
    int& depth_;
};

/// Whether tensors among a call's arguments are compared: those of one value, such as a parameter's, or are each rank's own, such as the tokens that it computes with.
enum class Tensors { same, own };
/// Every rank has come to the running binding at the same line with the same arguments (numbers, texts, tables of them, tensors): else throws moe::Error
/// (dist) on all, with each rank's place. Throws (state) where this rank runs alone. Lets the state's lock go while it waits.
void meet(lua_State* L, Tensors tensors = Tensors::same);
/// f(L), a binding that all ranks call: they meet first, and what is thrown on one is thrown on all, as soon as these come to a meeting. While a job trains
/// whatever run, f has its turn between two of the job's steps: a collective of this thread and one of the job's callbacks, each under the state's lock of
/// another rank, would wait for each other for ever.
int call_on_all_ranks(lua_State* L, const std::function<int(lua_State*)>& f, Tensors tensors = Tensors::same);
template <Function f>
int on_all_ranks(lua_State* L) {
    return call_on_all_ranks(L, f);
}
/// Calls f with the top `num_arguments` values, popped, as its stack. What it raises is thrown as moe::Error, on all ranks. `what` names it.
void settle(lua_State* L, int num_arguments, const std::string& what, const std::function<void(lua_State*)>& f);
/// What f gives, or throws, on rank 0: on all ranks.
std::string from_rank_0(lua_State* L, const std::string& what, const std::function<std::string()>& f);
/// All ranks know that one was interrupted: each is, so that no pcall holds it up, and throws moe::Error (interrupted).
[[noreturn]] void throw_interrupted_on_all(lua_State* L);

// --- for sessions ---

/// Where a session meets those of the other ranks, over a communicator of its own; null on one rank.
std::shared_ptr<train::Meeting> open_meeting();
/// What each rank says between evaluations, in rank order. Nothing where one has not come after `limit_secs` (0: no limit).
std::vector<std::string> exchange(train::Meeting& ranks, const std::string& place, const std::string& mine, double limit_secs = 0);
/// The ranks wait for each other at an evaluation's end: an error of one becomes that of all. Those that are elsewhere, in a call that wants all ranks,
/// hear of it there and come. False where one has not come after `limit_secs`, which counts where this rank failed (0: no limit).
bool end_on_all_ranks(lua_State* L, const std::string& what, std::optional<ErrorParts>& error, double limit_secs);

/// Functions of Lua's libraries whose results differ between processes give rank 0's; for a fresh state of one of several ranks.
void share_libraries(lua_State* L);

}  // namespace moe::lua
