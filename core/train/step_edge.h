// The step edge: who may touch a run now. A thread that trains holds it for a step; whoever wants to look or change takes it between two of them.
#pragma once
#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>

namespace moe::train {

/// A mutex that one thread may take several times, and that is given in the order in which it was asked for: who asks during a step gets it
/// before the next one, and who asks again and again does not keep steps from happening.
///
/// Turns: where a thread trains on several ranks, what others ask for is numbered, and the thread grants after a step what all ranks had asked for
/// by then (it finds out how much that is). Every rank must ask for the same in the same order: then all of it happens at the same step everywhere.
class StepEdge {
public:
    void lock() {
        lock_unless([] { return false; });
    }
    /// False where `give_up`, asked every 20 ms, was true before its turn came. Not asked where there are turns: other ranks count on this one.
    template <class F>
    bool lock_unless(F give_up) {
        std::unique_lock guard(mutex_);
        auto me = std::this_thread::get_id();
        if (depth_ > 0 && owner_ == me) {
            ++depth_;
            return true;
        }
        if (takes_turns_ && me != trainer_) {
            int64_t mine = ++asked_;
            requests_.emplace_back();
            changed_.notify_all();
            changed_.wait(guard, [&] { return granted_ == mine || !takes_turns_; });
            if (takes_turns_) {
                owner_ = me;
                depth_ = 1;
                return true;
            }
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
            granted_ = 0;
        }
        changed_.notify_all();
    }

    // --- turns: by the thread that trains ---

    /// From now on; before that thread starts.
    void begin_turns() {
        std::lock_guard guard(mutex_);
        takes_turns_ = has_turns_ = true;
        asked_ = done_ = granted_ = 0;
        requests_.clear();
        trainer_ = {};
    }
    void set_trainer() {
        std::lock_guard guard(mutex_);
        trainer_ = std::this_thread::get_id();
    }
    /// What is left is granted at once.
    void end_turns() {
        std::unique_lock guard(mutex_);
        while (!requests_.empty()) {
            std::function<void()> f = std::move(requests_.front());
            requests_.pop_front();
            if (!f) continue;                                // a lock: given to whoever waits once there are no turns
            guard.unlock();
            f();
            guard.lock();
        }
        takes_turns_ = false;
        granted_ = 0;
        done_ = asked_;
        guard.unlock();
        changed_.notify_all();
    }
    /// How much was asked for so far.
    int64_t asked() {
        std::lock_guard guard(mutex_);
        return asked_;
    }
    /// Until more than `n` was asked for.
    void wait_for_more_than(int64_t n) {
        std::unique_lock guard(mutex_);
        changed_.wait(guard, [&] { return asked_ > n; });
    }
    /// One after the other, each until it is over, up to the request of number `n`.
    void grant_up_to(int64_t n) {
        std::unique_lock guard(mutex_);
        while (done_ < n) {
            std::function<void()> f = std::move(requests_.front());
            requests_.pop_front();
            if (f) {
                guard.unlock();
                f();
                guard.lock();
            } else {
                granted_ = done_ + 1;
                changed_.notify_all();
                changed_.wait(guard, [&] { return granted_ == 0; });
            }
            ++done_;
            changed_.notify_all();
        }
    }

    // --- turns: by others ---

    /// From begin_turns() to forget_turns(), also after they have ended: alike on all ranks.
    bool has_turns() const { return has_turns_; }
    /// Once all ranks know that they have ended; nothing while there are some.
    void forget_turns() {
        std::lock_guard guard(mutex_);
        if (!takes_turns_) has_turns_ = false;
    }
    bool is_trainer() {
        std::lock_guard guard(mutex_);
        return takes_turns_ && trainer_ == std::this_thread::get_id();
    }
    /// A request that the training thread does itself; `wait`: until it is done.
    void ask(std::function<void()> f, bool wait) {
        std::unique_lock guard(mutex_);
        if (!takes_turns_) {
            guard.unlock();
            return f();
        }
        int64_t mine = ++asked_;
        requests_.push_back(std::move(f));
        changed_.notify_all();
        if (wait) changed_.wait(guard, [&] { return done_ >= mine || !takes_turns_; });
    }

private:
    std::mutex mutex_;
    std::condition_variable changed_;
    std::thread::id owner_;
    int64_t depth_ = 0, next_ = 0;
    std::deque<int64_t> queue_;
    bool takes_turns_ = false;
    std::atomic<bool> has_turns_ = false;
    std::thread::id trainer_;
    int64_t asked_ = 0, done_ = 0, granted_ = 0;             ///< numbers of requests; granted_: of the lock that is out, 0 for none
    std::deque<std::function<void()>> requests_;            ///< not done yet; empty ones: the lock
};

}  // namespace moe::train
