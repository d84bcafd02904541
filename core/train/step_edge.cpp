#include "core/train/step_edge.h"

#include <algorithm>
#include <chrono>

namespace moe::train {

void StepEdge::lock() {
    lock_unless([] { return false; });
}

bool StepEdge::lock_unless(const std::function<bool()>& give_up) {
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

void StepEdge::unlock() {
    {
        std::lock_guard guard(mutex_);
        if (--depth_ > 0) return;
        owner_ = {};
        granted_ = 0;
    }
    changed_.notify_all();
}

bool StepEdge::is_mine() {
    std::lock_guard guard(mutex_);
    return depth_ > 0 && owner_ == std::this_thread::get_id();
}

void StepEdge::begin_turns() {
    std::lock_guard guard(mutex_);
    takes_turns_ = has_turns_ = true;
    asked_ = done_ = granted_ = 0;
    requests_.clear();
    trainer_ = {};
}

void StepEdge::set_trainer() {
    std::lock_guard guard(mutex_);
    trainer_ = std::this_thread::get_id();
}

/// Takes the next request off the list; false for a lock, which is another thread's to take.
bool StepEdge::do_next_request(std::unique_lock<std::mutex>& guard) {
    std::function<void()> f = std::move(requests_.front());
    requests_.pop_front();
    if (!f) return false;
    guard.unlock();
    f();
    guard.lock();
    return true;
}

void StepEdge::end_turns() {
    std::unique_lock guard(mutex_);
    while (!requests_.empty()) do_next_request(guard);      // a lock is given to whoever waits once there are no turns
    takes_turns_ = false;
    granted_ = 0;
    done_ = asked_;
    guard.unlock();
    changed_.notify_all();
}

int64_t StepEdge::asked() {
    std::lock_guard guard(mutex_);
    return asked_;
}

void StepEdge::wait_for_more_than(int64_t n) {
    std::unique_lock guard(mutex_);
    changed_.wait(guard, [&] { return asked_ > n; });
}

void StepEdge::grant_up_to(int64_t n) {
    std::unique_lock guard(mutex_);
    while (done_ < n) {
        if (!do_next_request(guard)) {
            granted_ = done_ + 1;
            changed_.notify_all();
            changed_.wait(guard, [&] { return granted_ == 0; });
        }
        ++done_;
        changed_.notify_all();
    }
}

void StepEdge::forget_turns() {
    std::lock_guard guard(mutex_);
    if (!takes_turns_) has_turns_ = false;
}

bool StepEdge::is_trainer() {
    std::lock_guard guard(mutex_);
    return takes_turns_ && trainer_ == std::this_thread::get_id();
}

void StepEdge::ask(std::function<void()> f, bool wait) {
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

}  // namespace moe::train
