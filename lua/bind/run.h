// A run in Lua: what run.cpp, run_making.cpp, run_control.cpp, callbacks.cpp and job.cpp share.
#pragma once
#include "core/train/run.h"
#include "lua/bind/model.h"

#include <atomic>
#include <deque>
#include <initializer_list>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

namespace moe::lua {

class Job;

/// What the Lua side keeps of a run besides the callbacks, which are in the userdata's user value.
struct RunState {
    std::atomic<int> num_callbacks = 0;   ///< none: a background thread need not take the state's lock
    int64_t last_callback = 0;            ///< number of the one that was made last
    std::list<std::pair<std::thread::id, std::string>> firing;      ///< threads and events whose callbacks run
    std::deque<double> losses;            ///< of the last steps, for "spike"
    bool console = true;                  ///< its log lines are printed
    std::mutex mutex;                     ///< of `last`: a job writes it, too
    std::optional<train::StepMetrics> last;
    std::weak_ptr<Job> job;               ///< the latest
};
struct RunValue {
    std::shared_ptr<train::Run> run;
    std::shared_ptr<RunState> state = std::make_shared<RunState>();
};
template <>
struct TypeName<RunValue> {
    static constexpr const char* value = "run";
};

/// The run at index 1 between two steps: no other thread touches it while this lives.
struct LiveRun {
    std::shared_ptr<train::Run> run;
    HeldEdge edge;
    train::Run* operator->() const { return run.get(); }
    train::Run& operator*() const { return *run; }
};
LiveRun live_run(lua_State* L);
/// The same without the edge, for what may be asked during a step.
std::shared_ptr<train::Run> run_of(lua_State* L);

/// Steps that spike: the loss is above mean + sigma · deviation of up to 50 steps before it, 10 at least. Remembers the loss.
bool is_spike(RunState& state, double loss, double sigma);

void push_metrics(lua_State* L, const train::StepMetrics& m);
/// A step of the run is over: run.last.
void remember_step(RunState& state, const train::StepMetrics& m);
/// After the first step beyond the schedule: says that it has ended.
void say_schedule_ended(train::Run& run, const RunState& state);
/// Calls an event's functions with the value on the stack's top, which is popped; those of run:every where it divides `step`. An error says whose it is.
void fire(lua_State* L, int run_index, const std::string& event, int64_t step);
/// The same of the run at index 1, where a function's error on one rank is raised on all.
void fire_on_all(lua_State* L, const std::string& event, int64_t step);
/// Throws (state) where callbacks of these events run on this thread: what fires them again would never end.
void check_not_firing(const RunState& state, const std::string& op, std::initializer_list<const char*> events);
/// The callbacks of a step: step, skip, spike.
void fire_step(lua_State* L, int run_index, const train::StepMetrics& m, bool spikes);
/// The same for the run's own spikes; on several ranks, whoever has callbacks, an error of one rank is raised on all.
void call_back_step(lua_State* L, int run_index, train::Run& run, RunState& state, const train::StepMetrics& m);
/// "\ncallback 1: every 10 steps, run.lua:12" for each callback of the run at index, "" for none.
std::string callbacks_text(lua_State* L, int run_index);
/// run:on, run:every, run:off (callbacks.cpp).
std::span<const Binding> callback_methods();
void open_callbacks(lua_State* L);
/// Throws moe::Error (state) while a job trains the run.
void check_no_job(lua_State* L, const RunValue& value, const std::string& op);

/// run:start(n).
int start_job(lua_State* L);
void open_job(lua_State* L);

/// Methods and fields that change a run (run_control.cpp).
std::span<const Binding> control_methods();
std::span<const Binding> control_fields();
int assign_to_run(lua_State* L);
int replay_run(lua_State* L);

/// moe.run, moe.resume, moe.replay.
std::span<const Binding> run_functions();
/// Makes a run and pushes it.
int push_run(lua_State* L, const Config& config, const train::RunOptions& options);
/// The options that every new run has: name, console, log.
class Options;
train::RunOptions run_options(lua_State* L, const Options& o);
/// Saves a run that nothing goes on with where its last step is not saved (checkpointing.save_on_exit), and says so: "{why} after step 3, which is saved". A failure is a warning.
void save_left(train::Run& run, std::string_view why);
/// The checkpoint that a name means: of this session's runs first.
std::string find_saved(const std::string& what);

}  // namespace moe::lua
