// The step program: a list of small operations made by a schedule and run by one executor. Everything that is not
// mathematics of the model is decided here: order, what is kept, what is computed again, when weight gradients are made.
#pragma once
#include "core/model/model.h"

#include <torch/csrc/autograd/edge.h>

#include <atomic>
#include <set>
#include <string>
#include <vector>

namespace moe::train {

/// What one operation does with one segment and micro-batch.
enum class OpKind { forward, backward, backward_input, weight_grad, receive_forward, send_forward, receive_backward, send_backward };
/// backward_input is a backward whose weight gradients are put off until weight_grad of the same segment and micro-batch. The four
/// messages between pipeline stages have no segment (−1): they move the boundary's slot, "residual", or its gradient.
struct Op {
    OpKind kind;
    int segment = 0, micro_batch = 0;
    bool operator==(const Op&) const = default;
};
/// Operations in the order in which they run.
using Program = std::vector<Op>;

/// What a schedule must know of a rank.
struct ScheduleShape {
    int num_segments = 0, num_micro_batches = 0;          ///< of this stage; of a step
    int stage = 0, num_stages = 1;
    bool defer = false;                                   ///< weight gradients at the end of each micro-batch's backward, not inside it
};
/// The program of one stage. "gpipe": all forwards, then all backwards, each in the order of the micro-batches; "1f1b": as many forwards
/// as stages follow, then a forward and a backward in turn, so that at most num_stages − stage micro-batches are kept. On one stage both
/// are plain accumulation: forward and backward, micro-batch after micro-batch. Throws moe::Error (config) for another name.
/// Source: Huang et al., "GPipe", 1811.06965; Narayanan et al., "Memory-efficient pipeline-parallel DNN training", 2006.09503.
Program schedule(const std::string& name, const ScheduleShape& shape);
/// One word an operation, for tests and messages: "F:embed/0 … B:head/0 … W:layers.0.attention/0 … <F:/0 (receive) … F>:/0 (send)".
std::string describe(const Program& program, const Model& model);

/// How segments are joined.
enum class Mode { scheduled, attached };

/// Runs programs over a model's segments; the only place that keeps graphs, inputs and boundary gradients.
class Executor {
public:
    explicit Executor(Model& model);
    /// Runs a program over micro-batches; gradients are added to the main gradients, losses to MicroBatch::losses. Returns the sum of
    /// the losses called "loss" (0-d float64, host; 0 on a stage without the head). A segment that throws leaves queue and tapes empty;
    /// main gradients then hold a part of the step, and the caller zeroes them.
    Tensor run(const Program& program, std::vector<MicroBatch>& batches);
    /// The same without the sum: nothing waits for the device.
    void execute(const Program& program, std::vector<MicroBatch>& batches);
    /// The same as one autograd graph a micro-batch. One stage only.
    Tensor run_attached(std::vector<MicroBatch>& batches);
    /// recompute_spans() of the model (train/recompute.h); all −1 at first.
    void set_recompute(std::vector<int> spans);
    /// Asked between operations: where it is true the program ends with moe::Error (interrupted). Null for never. For one rank: others would wait.
    void set_interrupt(const std::atomic<bool>* flag) { interrupt_ = flag; }
    /// Forward only, nothing kept: evaluation, or without the heads and their losses a look at what comes before. On several ranks each calls it.
    Tensor run_forward(MicroBatch& batch, bool with_losses = true);

private:
    using Slots = std::map<std::string, Tensor>;
    /// Edges into and out of a segment's graph, one a slot (none where no gradient flows): not the tensors, which live only as long as some backward reads them.
    struct Tape {
        std::vector<torch::autograd::Edge> in, out;
        Tensor loss_grad;                            ///< 1, where the segment writes a loss
    };
    void forward(int segment, int micro_batch);
    void run_segment(int segment, int micro_batch, Slots& slots, bool keep_graph, bool again);
    void compute_again(int span, int micro_batch);
    void backward(int segment, int micro_batch, bool defer);
    std::string phase_of(const Op& op) const;
    void message(const Op& op);
    void receive(Tensor& slot, int from, int64_t tokens);
    void send(const Tensor& data, int to);
    Tape& tape(int segment, int micro_batch);
    Tensor anchor() const;

    Model& model_;
    const std::atomic<bool>* interrupt_ = nullptr;
    std::vector<int> spans_;
    std::vector<MicroBatch>* batches_ = nullptr;
    std::vector<std::set<std::string>> done_;        ///< by segment: what it reads as the last one
    std::vector<Tape> tapes_;                        ///< [micro-batch][segment]
    std::vector<Slots> slots_, grads_;               ///< by micro-batch: what the next forward and backward read
    std::map<std::pair<int, int>, Slots> kept_;      ///< (span, micro-batch): what a span reads from outside
    Tensors sent_;                                   ///< alive until the next flush that succeeds, whatever failed before
};

}  // namespace moe::train
