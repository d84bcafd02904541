// A step's forward and backward recorded once as a CUDA graph: for models whose kernels are shorter than their launches.
#pragma once
#include "core/train/step_program.h"

#include <memory>

namespace moe::train {

/// Runs programs like Executor::run. The first steps of a shape run as they are, then one is recorded, then it is replayed on the next
/// steps' data. Where recording fails a warning says why, and steps go on as they are.
class StepGraph {
public:
    explicit StepGraph(Executor& executor, Model& model);
    ~StepGraph();

    /// Whether this configuration's steps can be replayed: on one GPU, without what depends on the step's number inside of kernels (dropout,
    /// noise of the router) or waits for the device (precisions whose experts go one by one, documents in sequences that are not masked);
    /// `why`, where given, gets what is in the way.
    static bool takes(const Config& config, const Model& model, std::string* why = nullptr);

    /// As Executor::execute. Other shapes than before begin anew.
    void run(const Program& program, std::vector<MicroBatch>& batches);
    /// Forgets the record: what steps compute has changed. The next steps begin anew.
    void reset();
    /// True once steps are replayed.
    bool is_recorded() const;
    /// Whether replaying is likely to pay: the kernels of a step are short.
    static bool pays(const Config& config);

private:
    struct Record;
    void refresh_copies();
    void record(const Program& program, const std::vector<MicroBatch>& batches);
    Executor& executor_;
    Model& model_;
    int seen_ = 0;
    bool failed_ = false;                 ///< recording did: steps run as they are
    std::vector<std::vector<int64_t>> shapes_;
    std::unique_ptr<Record> record_;
};

}  // namespace moe::train
