// Parts of a run that a script gives as functions. core/ knows them as std::function; what language they are written in is the business of whoever
// compiles them from their stored form.
#pragma once
#include "core/data/loader.h"
#include "core/routing/intervention.h"

#include <nlohmann/json.hpp>

#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace moe::train {

/// Arguments and texts of interventions: plain values.
using Values = nlohmann::ordered_json;

/// A layer's next selection bias [E] from the step's global counts int64 [E], both on the host.
using BiasRule = std::function<at::Tensor(int64_t layer, int64_t step, const at::Tensor& counts_E, const at::Tensor& bias_E)>;
/// Learning rate of a step, from 1.
using Schedule = std::function<double(int64_t step)>;
/// The sequences of a step, from 1: as Loader::next, all of them, on the host.
using BatchSource = std::function<data::Batch(int64_t step, int64_t num_sequences, int64_t seq_length)>;
/// A parameter's next value. value, grad (unscaled, clipped): in the master type, of the logical shape; state: the optimizer's tensors, to be written in place.
using OptimizerRule = std::function<at::Tensor(const std::string& name, const at::Tensor& value, const at::Tensor& grad, const std::vector<at::Tensor>& state, int64_t step, double lr)>;

/// Where ranks compute together, a hook that fails on one of them must not leave the others waiting in a collective: it is kept, the hook counts as if
/// it had changed nothing, and the step or evaluation is given up on all ranks once they can be told.
class HookFailures {
public:
    /// While it lives, failures are kept where `keeps`, which is for several ranks; with false, or without failures, hooks throw. One at a time: whoever
    /// makes one of a run's holds its step edge. What was kept and not thrown is forgotten at its end.
    class Kept {
    public:
        Kept(std::shared_ptr<HookFailures> failures, bool keeps) : failures_(std::move(failures)) {
            if (failures_) failures_->reset(keeps);
        }
        ~Kept() {
            if (failures_) failures_->reset(false);
        }
        Kept(const Kept&) = delete;
        /// Throws the first of them.
        void rethrow() const {
            if (failures_) failures_->rethrow();
        }

    private:
        std::shared_ptr<HookFailures> failures_;
    };
    /// Inside catch: true where the exception is kept, so that the caller goes on.
    bool keep() {
        std::lock_guard guard(mutex_);
        if (keeps_ && !first_) first_ = std::current_exception();
        return keeps_;
    }

private:
    void reset(bool keeps) {
        std::lock_guard guard(mutex_);
        keeps_ = keeps;
        first_ = nullptr;
    }
    void rethrow() {
        std::exception_ptr first;
        {
            std::lock_guard guard(mutex_);
            std::swap(first, first_);
        }
        if (first) std::rethrow_exception(first);
    }
    std::mutex mutex_;
    bool keeps_ = false;
    std::exception_ptr first_;
};

/// Makes functions of their stored form (JSON that only the compiler understands). Each throws moe::Error (usage, state) for what it cannot compile.
/// `run_seed` is what draws inside of a function are keyed with, besides step and layer.
struct ScriptCompiler {
    std::function<routing::ScoreFunction(const Values&)> score;
    std::function<routing::PreTopK(const Values&)> pre_topk;
    std::function<routing::PostTopK(const Values&)> post_topk;
    std::function<BiasRule(const Values&, uint64_t run_seed)> bias_rule;
    std::function<Schedule(const Values&, uint64_t run_seed)> schedule;
    std::function<BatchSource(const Values&, uint64_t run_seed)> data;
    std::function<OptimizerRule(const Values&, uint64_t run_seed)> optimizer;
    /// Whether the stored form can be compiled in another session.
    std::function<bool(const Values&)> is_stored;
    /// Of the hooks that it makes; null: they throw.
    std::shared_ptr<HookFailures> failures;
};

}  // namespace moe::train
