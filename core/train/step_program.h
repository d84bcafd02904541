// The step program: a list of small operations made by a schedule and run by one executor. Everything that is not
// mathematics of the model is decided here: order, what is kept, what is computed again, when weight gradients are made.
#pragma once
#include "core/model/model.h"

#include <string>
#include <vector>

namespace moe::train {

/// What one operation does with one segment and micro-batch.
enum class OpKind { forward, backward, backward_input, weight_grad };
/// backward_input is a backward whose weight gradients are put off until weight_grad of the same segment and micro-batch.
struct Op {
    OpKind kind;
    int segment = 0, micro_batch = 0;
    bool operator==(const Op&) const = default;
};
/// Operations in the order in which they run.
using Program = std::vector<Op>;

/// Micro-batch after micro-batch: all forwards, then all backwards in reverse. With `defer`, weight gradients run at the end of
/// each micro-batch instead of inside its backwards.
Program accumulate(int num_segments, int num_micro_batches, bool defer = false);
/// One word an operation, for tests and messages: "F:embed/0 … B:head/0 … W:layers.0.attention/0".
std::string describe(const Program& program, const Model& model);

/// How segments are joined.
enum class Mode { scheduled, attached };

/// Runs programs over a model's segments; the only place that keeps graphs, inputs and boundary gradients.
class Executor {
public:
    explicit Executor(Model& model) : model_(model) {}
    /// Runs a program over micro-batches; gradients are added to the main gradients. Returns the sum of the micro-batches' losses
    /// (0-d float64, on the model's device). A segment that throws leaves queue and tapes empty; main gradients then hold a part
    /// of the step, and the caller zeroes them.
    Tensor run(const Program& program, std::vector<MicroBatch>& batches);
    /// The same as one autograd graph a micro-batch.
    Tensor run_attached(std::vector<MicroBatch>& batches);
    /// Segments (by index) of which only the inputs are kept: their forward runs again in backward, with the decisions of the first.
    /// Empty (the default): none.
    void set_recompute(std::vector<bool> recompute) { recompute_ = std::move(recompute); }
    /// Forward only, nothing kept: evaluation.
    Tensor run_forward(MicroBatch& batch);

private:
    struct Tape { Tensors in, out; };
    void forward(int segment, int micro_batch);
    void backward(int segment, int micro_batch, bool defer);
    Tape& tape(int segment, int micro_batch);
    bool recomputed(int segment) const { return !recompute_.empty() && recompute_.at(size_t(segment)); }

    Model& model_;
    std::vector<bool> recompute_;
    std::vector<MicroBatch>* batches_ = nullptr;
    std::vector<Tape> tapes_;                                  ///< [micro-batch][segment]
    std::vector<std::map<std::string, Tensor>> slots_, grads_; ///< by micro-batch: what the next forward and backward read
    Tensor loss_;
};

}  // namespace moe::train
