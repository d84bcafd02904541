#include "core/data/prefetch.h"

#include "core/base/error.h"

#include <system_error>

namespace moe::data {

Prefetcher::Prefetcher(int64_t num_workers, std::function<void(const std::vector<Piece>&, Row&)> make) : make_(std::move(make)) {
    try {
        for (int64_t i = 0; i < num_workers; ++i) threads_.emplace_back([this] { work(); });
    } catch (const std::system_error& e) {
        size_t started = threads_.size();
        stop();
        MOE_THROW(memory, "data.preprocessing.num_workers", fmt::format("{} threads, then: {}", started, e.what()), fmt::format("{} threads", num_workers), "set fewer");
    }
}

Prefetcher::~Prefetcher() { stop(); }

void Prefetcher::stop() {
    {
        std::lock_guard lock(mutex_);
        stop_ = true;
        waiting_.clear();
    }
    something_waits_.notify_all();
    for (auto& thread : threads_) thread.join();
    threads_.clear();
}

void Prefetcher::request(int64_t index, const std::vector<Piece>& pieces) {
    {
        std::lock_guard lock(mutex_);
        auto& job = jobs_[index];
        if (job) return;
        job = std::make_shared<Job>();
        job->pieces = pieces;
        waiting_.insert(index);
    }
    something_waits_.notify_one();
}

Row Prefetcher::take(int64_t index) {
    std::unique_lock lock(mutex_);
    auto it = jobs_.find(index);
    MOE_CHECK(it != jobs_.end(), internal, "loader.next", fmt::format("sequence {}", index), "one that was requested", "");
    auto job = it->second;
    something_done_.wait(lock, [&] { return job->done; });
    jobs_.erase(index);
    if (job->error) std::rethrow_exception(job->error);
    return std::move(job->row);
}

void Prefetcher::drop_below(int64_t index) {
    std::lock_guard lock(mutex_);
    jobs_.erase(jobs_.begin(), jobs_.lower_bound(index));
    waiting_.erase(waiting_.begin(), waiting_.lower_bound(index));
}

void Prefetcher::clear() {
    std::lock_guard lock(mutex_);
    jobs_.clear();
    waiting_.clear();
}

void Prefetcher::work() {
    std::unique_lock lock(mutex_);
    for (;;) {
        something_waits_.wait(lock, [&] { return stop_ || !waiting_.empty(); });
        if (stop_) return;
        auto job = jobs_.at(*waiting_.begin());
        waiting_.erase(waiting_.begin());
        lock.unlock();
        try {
            make_(job->pieces, job->row);
        } catch (...) {
            job->error = std::current_exception();
        }
        lock.lock();
        job->done = true;
        something_done_.notify_all();
    }
}

}  // namespace moe::data
