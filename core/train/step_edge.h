// The step edge: who may touch a run now. A thread that trains holds it for a step; whoever wants to look or change takes it between two of them.
#pragma once
#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>
#include <thread>

namespace moe::train {

/// A mutex that one thread may take several times, and that is given in the order in which it was asked for: who asks during a step gets it
/// before the next one, and who asks again and again does not keep steps from happening.
class StepEdge {
public:
    void lock() {
        lock_unless([] { return false; });
    }
    /// False where `give_up`, asked every 20 ms, was true before its turn came.
    template <class F>
    bool lock_unless(F give_up) {
        std::unique_lock guard(mutex_);
        auto me = std::this_thread::get_id();
        if (depth_ > 0 && owner_ == me) {
            ++depth_;
            return true;
        }
        int64_t ticket = next_++;
        queue_.push_back(ticket);
        bool got = false, ends = false;
        while (!got && !ends) {
            got = changed_.wait_for(guard, std::chrono::milliseconds(20), [&] { return depth_ == 0 && queue_.front() == ticket; });
            ends = !got && give_up();
        }
        queue_.erase(std::find(queue_.begin(), queue_.end(), ticket));
        if (got) {
            owner_ = me;
            depth_ = 1;
        }
        guard.unlock();
        if (!got) changed_.notify_all();
        return got;
    }
    void unlock() {
        {
            std::lock_guard guard(mutex_);
            if (--depth_ > 0) return;
            owner_ = {};
        }
        changed_.notify_all();
    }

private:
    std::mutex mutex_;
    std::condition_variable changed_;
    std::thread::id owner_;
    int64_t depth_ = 0, next_ = 0;
    std::deque<int64_t> queue_;
};

}  // namespace moe::train
