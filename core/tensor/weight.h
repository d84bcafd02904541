// A weight as the products see it, and where its gradient goes. Neither knows of a parameter store or of ranks.
#pragma once
#include <ATen/core/Tensor.h>
#include <torch/custom_class.h>

#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace moe {
using at::Tensor;

/// Gets every weight gradient. The step program changes it only between segment backwards, while no backward runs, so ops
/// may read it from whatever thread the autograd engine uses (thread_local would not do: CUDA nodes run elsewhere).
class GradSink {
public:
    /// Runs `make` now, or keeps it for drain() where gradients are deferred. What it captures must be detached.
    void add(std::function<void()> make);
    /// From now on gradients made in the backward of (segment, micro_batch) are put off until drain() of the same pair.
    void defer(int segment, int micro_batch);
    /// From now on gradients are made at once (the default).
    void immediate() { deferring_ = false; }
    /// Makes the deferred gradients of one segment and micro-batch, in the order in which they were put off.
    void drain(int segment, int micro_batch);
    /// Drops what is queued and goes back to immediate: a step that failed is rolled back.
    void reset();
    size_t num_queued() const { return queue_.size(); }

private:
    struct Deferred { int segment, micro_batch; std::function<void()> make; };
    bool deferring_ = false;
    int segment_ = -1, micro_batch_ = -1;
    std::vector<Deferred> queue_;
};

/// A weight's values in E4M3, straight and transposed, with their scales, and what they were made of. Products make them, and an optimizer that has the new values at hand; whoever writes
/// values raises their version, or forgets the copies.
struct Fp8Copy {
    Tensor q, transposed, scale;
    /// Whether they are those of `value` as it is now.
    bool are_of(const Tensor& value) const;
    /// They have just been made of it.
    void made_of(const Tensor& value);
    /// They are to be made again.
    void forget() { version_ = -1; }

private:
    int64_t version_ = -1;            // value's, when the copies were made
    const void* data_ = nullptr;      // value's
};

/// Float64 numbers whose sum is that of a gradient's squares, by whoever has written it last. Kernels write without raising a tensor's version, so each of them sets or clears
/// this; whoever else writes raises it.
struct GradSquares {
    Tensor parts;                     ///< undefined: not known
    int64_t version = -1;             ///< the gradient's, when they were made
};

/// value: what the product reads, in the compute dtype; may be replaced between forward and backward (gather and release).
/// grad: main gradient, same shape, fp64, fp32 or bf16, added to in place (sums are made in at least fp32, then rounded); not the .grad of an autograd leaf. It may be undefined
/// (a frozen or inference weight): then no gradient is made. A CustomClassHolder only so that autograd can hold it.
struct Weight : torch::CustomClassHolder {
    Tensor value, grad;
    /// grad holds nothing of this step and may be anything. Whoever adds to it goes through take_stale() or grad_to_add().
    bool is_grad_stale = false;
    /// True once where grad is stale: the caller overwrites all of it.
    bool take_stale() { return std::exchange(is_grad_stale, false); }
    /// grad as something to add to: zeros where it was stale.
    Tensor grad_to_add();
    GradSquares grad_squares;
    std::string name;
    GradSink* sink = nullptr;
    /// Products with it are in E4M3 where activations are bf16 (kernels/quantize), and these are the copies that they read.
    bool is_fp8 = false;
    Fp8Copy fp8;
};
using WeightPtr = c10::intrusive_ptr<Weight>;

}  // namespace moe
