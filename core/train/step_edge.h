// The step edge: who may touch a run now. A thread that trains holds it for a step; whoever wants to look or change takes it between two of them.
#pragma once
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

namespace moe::train {

/// A mutex that one thread may take several times, and at which a thread that trains lets everybody else go first.
class StepEdge {
public:
    void lock() { take(false, [] { return false; }); }
    /// False where `give_up`, asked every 20 ms, was true before it was free.
    template <class F>
    bool lock_unless(F give_up) { return take(false, give_up); }
    /// By the thread that trains, before each step.
    void lock_for_step() { take(true, [] { return false; }); }
    void unlock() {
        {
            std::lock_guard guard(mutex_);
            if (--depth_ > 0) return;
            owner_ = {};
        }
        free_.notify_all();
    }

private:
    template <class F>
    bool take(bool steps, F give_up) {
        std::unique_lock guard(mutex_);
        auto me = std::this_thread::get_id();
        if (depth_ > 0 && owner_ == me) {
            ++depth_;
            return true;
        }
        if (!steps) ++waiting_;
        bool got = false, ends = false;
        while (!got && !ends) {
            got = free_.wait_for(guard, std::chrono::milliseconds(20), [&] { return depth_ == 0 && (!steps || waiting_ == 0); });
            ends = !got && give_up();
        }
        if (!steps) --waiting_;
        if (got) {
            owner_ = me;
            depth_ = 1;
        }
        guard.unlock();
        if (!got) free_.notify_all();
        return got;
    }
    std::mutex mutex_;
    std::condition_variable free_;
    std::thread::id owner_;
    int64_t depth_ = 0, waiting_ = 0;
};

}  // namespace moe::train
