// What a session shares with the bindings of its Lua state: the interrupt, and who may print.
#pragma once
#include <lua.hpp>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

namespace moe::train {
class Meeting;
}

namespace moe::lua {

class Job;

/// The lock of a Lua state: whoever calls its API holds it. Recursive, and given in the order in which it was asked for. A session's public methods hold it while they run; a thread that trains in the
/// background takes it for callbacks and hooks alone; a binding that waits lets it go (class Unlocked).
class StateLock {
public:
    void lock();
    void unlock() { release(1); }
    /// Lets it go however often this thread has taken it, and gives how often that was; 0 where it does not hold it.
    int release_all();
    void take(int depth);
    /// Whether this thread holds it.
    bool is_mine();

private:
    void release(int depth);
    std::mutex mutex_;
    std::condition_variable free_;
    std::thread::id owner_;
    int depth_ = 0;
    uint64_t next_ticket_ = 0, serving_ = 0;
};

/// Work of a session that goes on in a thread of its own.
class Background {
public:
    virtual ~Background() = default;
    /// Ends it at the next moment where that does no harm, and waits. Without the state's lock.
    virtual void end() = 0;
};

/// A thread of a session. `ended` is set at its very end, when it has let go of all it held.
struct BackgroundThread {
    std::thread thread;
    std::shared_ptr<std::atomic<bool>> ended = std::make_shared<std::atomic<bool>>(false);
};

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
    std::shared_ptr<StateLock> lock = std::make_shared<StateLock>();
    std::shared_ptr<std::atomic<bool>> alive = std::make_shared<std::atomic<bool>>(true);   ///< false once the state is about to be closed: whoever holds a reference into it asks
    std::deque<std::pair<std::string, std::string>> chunks;         ///< name and text of what was loaded last, newest first, for the source of its functions
    std::shared_ptr<train::Meeting> ranks;               ///< where this thread meets those of the other ranks; null on one rank
    int alone = 0;                                       ///< above 0: what runs is this rank's alone
    int calls = 0;                                       ///< calls of all ranks that run now, inside each other
    std::shared_ptr<Job> job;                            ///< several ranks: the one job, until all know that it has ended
    std::vector<std::weak_ptr<Background>> background;              ///< ended before the state is closed
    std::list<BackgroundThread> threads;                            ///< joined before the state is closed: a program that ends must not have one that still frees what it worked with
    std::string last_log;                                ///< the line of the last step of what runs now, where a run has just printed it
};

/// The control of a state; it lives in the state's extra space, which coroutines copy.
inline Control*& control_slot(lua_State* L) { return *static_cast<Control**>(lua_getextraspace(L)); }
inline Control& control(lua_State* L) { return *control_slot(L); }

/// Notes the text of a chunk under the name that its functions have as their source ("=input", "@run.lua").
void remember_chunk(Control& control, const std::string& name, const std::string& text);
/// Starts a thread that belongs to the session, and joins those that have ended. With the state's lock.
void start_thread(Control& session, std::function<void()> work);
/// While a thread of the session works: lets this thread's own workers go (OpenMP's, asleep between its parallel regions; the next one makes them again). libgomp counts
/// them, and where it has more threads than there are cores its threads sleep at the end of each region: a job would train a few percent slower.
void release_workers(Control& session);
/// Ends all background work and marks the state as about to be closed. Without the lock.
void end_background(Control& control);

/// While it lives the state's lock is free: around waits of bindings. Nothing of the Lua API may be called meanwhile.
class Unlocked {
public:
    explicit Unlocked(lua_State* L);
    ~Unlocked();
    Unlocked(const Unlocked&) = delete;

private:
    lua_State* L_;
    int depth_;
};

/// The session's own control, also on a coroutine of a background thread, whose control() is that thread's.
Control& session_control(lua_State* L);

/// Throws moe::Error (interrupted) after an interrupt: long C++ calls ask between their steps.
void throw_if_interrupted(lua_State* L);

/// Replaces coroutine.resume and coroutine.wrap by versions that keep Control::running, so that an interrupt finds the coroutine
/// that runs: hooks belong to one coroutine each.
void open_coroutines(lua_State* L);

/// Where an interrupt ends the program, a script or a command ("interrupted"), or a session ends ("left"): saves the runs whose last step is not saved
/// (checkpointing.save_on_exit). On several ranks, where that does not reach all at the same step, only SIGTERM and SIGUSR1 save, and rank 0 says what is not saved. Failures are warnings.
void save_runs(const char* why);

/// From a signal handler or another thread: the running Lua code raises an error of kind `interrupted` at its next instruction.
void interrupt(Control& control) noexcept;

}  // namespace moe::lua
