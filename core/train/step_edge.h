// The step edge: who may touch a run now. A thread that trains holds it for a step; whoever wants to look or change takes it between two of them.
#pragma once
#include <atomic>
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
    void lock();
    /// False where `give_up`, asked every 20 ms, was true before its turn came. Not asked where there are turns: other ranks count on this one.
    bool lock_unless(const std::function<bool()>& give_up);
    void unlock();
    /// Whether this thread holds it.
    bool is_mine();

    // --- turns: by the thread that trains ---

    /// From now on; before that thread starts.
    void begin_turns();
    void set_trainer();
    /// What is left is granted at once.
    void end_turns();
    /// How much was asked for so far.
    int64_t asked();
    /// Until more than `n` was asked for.
    void wait_for_more_than(int64_t n);
    /// One after the other, each until it is over, up to the request of number `n`.
    void grant_up_to(int64_t n);

    // --- turns: by others ---

    /// From begin_turns() to forget_turns(), also after they have ended: alike on all ranks.
    bool has_turns() const { return has_turns_; }
    /// Once all ranks know that they have ended; nothing while there are some.
    void forget_turns();
    bool is_trainer();
    /// A request that the training thread does itself; `wait`: until it is done.
    void ask(std::function<void()> f, bool wait);

private:
    bool do_next_request(std::unique_lock<std::mutex>& guard);
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
