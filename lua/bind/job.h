// Training in a thread of its own, while the session takes other inputs.
#pragma once
#include "lua/bind/control.h"
#include "lua/bind/run.h"

#include <condition_variable>
#include <mutex>
#include <thread>

namespace moe::lua {

/// A thread that trains a run step by step. It holds the run's step edge in a step and the state's lock in callbacks and hooks.
/// On several ranks each has such a thread, and a session one job at a time. They train in step, and agree after each step on how many of the sessions' requests (the edge, pause,
/// resume, stop) all ranks have made: these are granted then, so that an input acts at the same step on all.
class Job : public Background, public std::enable_shared_from_this<Job> {
public:
    enum class Status { running, paused, done, stopped, failed };
    /// Of the run at index on L, which stays alive as long as the job; `num_steps` more.
    Job(lua_State* L, int run_index, int64_t num_steps);
    ~Job() override;
    void begin(Control& session);
    /// On several ranks these two wait for the end of the step at hand. Without the state's lock.
    void pause();
    void resume();
    /// Ends it at the next step edge, or `now` at the next segment of the step, which is undone (one rank; on several it ends first).
    void stop(bool now);
    /// At the session's end: stops after the step at hand, which is saved as an interrupt would (one rank).
    void end() override;
    /// Until it is no longer running. False where `give_up`, asked every 20 ms, was true before. Without the state's lock.
    bool wait(const std::function<bool()>& give_up);
    Status status() const;
    /// A thread is at work, or a step of it may still end.
    bool is_training() const;
    /// The same on all ranks, and the status: what rank 0 sees, once that holds here, too.
    bool is_training_anywhere(lua_State* L);
    Status common_status(lua_State* L);
    /// All ranks know that it has ended: the run needs no turns any more, and another job may begin.
    void forget_turns(lua_State* L);
    const std::shared_ptr<train::Run>& run() const { return value_.run; }
    /// Whether this thread holds the run between two steps, for which the job waits: a call of all ranks, or one that has callbacks.
    bool waits_for_this_thread() const { return value_.run->edge().is_mine(); }
    bool is_on_ranks() const { return control_.ranks != nullptr; }
    /// Its end is told by a log line of the last step, unless the steps before have told it: on the console, as text.
    bool prints_lines() const { return value_.state->console && value_.run->config().logging.console && !control_.json; }
    bool is_own_thread() const { return std::this_thread::get_id() == thread_id_; }
    int64_t step() const { return step_; }
    int64_t steps_left() const { return left_; }
    std::optional<ErrorParts> error() const;
    std::optional<train::StepMetrics> last() const;
    int interrupts = 0;                   ///< how often an interrupt ended a wait

private:
    void work();
    void train();
    void train_on_ranks();
    void one_step();
    void finish_step(const train::StepMetrics& m);
    void say_last_step();
    void call_back(const train::StepMetrics& m, bool spikes);
    void request(std::function<void()> f, bool wait);

    Control control_;                     ///< of this thread's callbacks: an interrupt of its own
    RunValue value_;
    lua_State* co_ = nullptr;             ///< index 1 the run, index 2 the function that calls back
    int threads_ = 1;
    std::atomic<std::thread::id> thread_id_{};
    std::atomic<int64_t> step_ = 0, left_ = 0;
    mutable std::mutex mutex_;            ///< of what follows
    std::condition_variable changed_;
    bool paused_ = false, stops_ = false, ended_ = false, in_step_ = false;
    Status result_ = Status::running;
    std::optional<ErrorParts> error_;
    std::optional<train::StepMetrics> last_;
};

/// Several ranks: the edge of the run that a job trains, for a call of all ranks by another thread; nothing where there is no job.
LiveRun turn_beside_job(lua_State* L);
}  // namespace moe::lua
