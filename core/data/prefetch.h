// Sequences prepared by threads before they are asked for.
#pragma once
#include "core/data/mixture.h"

#include <condition_variable>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

namespace moe::data {

/// One sequence on the host, as a row of Batch.
struct Row {
    std::vector<int64_t> ids, targets;
    std::vector<int32_t> domain, doc_start;
};

/// A bounded set of sequences in preparation; the caller bounds it by what it requests. Every sequence is a function of its pieces,
/// so neither their number nor their speed changes what comes out. One thread calls; the workers call `make` only.
class Prefetcher {
public:
    /// `make` fills the row of a sequence; thread safe. Throws moe::Error (memory) where no thread can be started.
    Prefetcher(int64_t num_workers, std::function<void(const std::vector<Piece>&, Row&)> make);
    /// Waits for what is being read; the rest is dropped.
    ~Prefetcher();
    /// Has sequence `index` prepared, unless it is already; lower indices come first.
    void request(int64_t index, const std::vector<Piece>& pieces);
    /// Waits for a requested sequence and removes it. Throws what its preparation threw.
    Row take(int64_t index);
    /// Drops the sequences below `index`.
    void drop_below(int64_t index);
    /// Drops all.
    void clear();

private:
    struct Job {
        std::vector<Piece> pieces;
        Row row;
        std::exception_ptr error;
        bool done = false;
    };
    void work();
    void stop();

    std::function<void(const std::vector<Piece>&, Row&)> make_;
    std::mutex mutex_;                                  // guards what follows, up to the threads
    std::condition_variable something_waits_, something_done_;
    std::map<int64_t, std::shared_ptr<Job>> jobs_;      ///< a worker keeps its own pointer: a job may be dropped while it runs
    std::set<int64_t> waiting_;                         ///< jobs that no worker has taken
    bool stop_ = false;
    std::vector<std::thread> threads_;
};

}  // namespace moe::data
