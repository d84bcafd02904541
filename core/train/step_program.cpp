#include "core/train/step_program.h"

#include "core/base/error.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>

namespace moe::train {

Program accumulate(int num_segments, int num_micro_batches, bool defer) {
    Program p;
    for (int mb = 0; mb < num_micro_batches; ++mb) {
        for (int s = 0; s < num_segments; ++s) p.push_back({OpKind::forward, s, mb});
        for (int s = num_segments; s-- > 0;) p.push_back({defer ? OpKind::backward_input : OpKind::backward, s, mb});
        for (int s = num_segments; defer && s-- > 0;) p.push_back({OpKind::weight_grad, s, mb});
    }
    return p;
}

std::string describe(const Program& program, const Model& model) {
    const char* names[] = {"F", "B", "Bx", "W"};
    std::string out;
    for (auto& op : program) out += fmt::format("{}{}:{}/{}", out.empty() ? "" : " ", names[int(op.kind)], model.segments()[size_t(op.segment)].name, op.micro_batch);
    return out;
}

namespace {
/// Cuts the graph; a floating tensor becomes a leaf that wants a gradient where `leaf`. Shares storage.
Tensor cut(const Tensor& t, bool leaf) {
    if (!t.defined()) return t;
    Tensor d = t.detach();
    if (leaf && d.is_floating_point()) d.set_requires_grad(true);
    return d;
}
Tensor anchor(const ModelOptions& options) { return at::zeros({1}, at::TensorOptions().dtype(options.precision.compute).device(options.device)); }
Tensor zero_loss(const ModelOptions& options) { return at::zeros({}, at::TensorOptions().dtype(at::kDouble).device(options.device)); }
}  // namespace

Executor::Tape& Executor::tape(int segment, int micro_batch) { return tapes_[size_t(micro_batch) * model_.segments().size() + size_t(segment)]; }

Tensor Executor::run(const Program& program, std::vector<MicroBatch>& batches) {
    // Whatever throws, no tape, queue or deferred mode is left: the caller zeroes the gradients and the step is as if never begun.
    struct Rollback {
        Executor& e;
        ~Rollback() {
            e.tapes_.clear();
            e.slots_.clear();
            e.grads_.clear();
            e.model_.store().sink().reset();
        }
    } rollback{*this};
    batches_ = &batches;
    tapes_.assign(batches.size() * model_.segments().size(), {});
    slots_.assign(batches.size(), {{"anchor", anchor(model_.options())}});
    grads_.assign(batches.size(), {});
    loss_ = zero_loss(model_.options());
    for (auto& op : program) switch (op.kind) {
        case OpKind::forward: forward(op.segment, op.micro_batch); break;
        case OpKind::backward: backward(op.segment, op.micro_batch, false); break;
        case OpKind::backward_input: backward(op.segment, op.micro_batch, true); break;
        case OpKind::weight_grad: model_.store().sink().drain(op.segment, op.micro_batch); break;
    }
    return loss_;
}

void Executor::forward(int s, int mb) {
    const Segment& segment = model_.segments()[size_t(s)];
    bool keep_graph = !recomputed(s);
    Tape& t = tape(s, mb);
    auto& slots = slots_[size_t(mb)];
    for (auto& slot : segment.reads) t.in.push_back(cut(slots.at(slot), keep_graph));
    at::AutoGradMode mode(keep_graph);
    Call call{(*batches_)[size_t(mb)]};
    t.out = segment.forward(t.in, call);
    for (size_t i = 0; i < t.out.size(); ++i) slots[segment.writes[i]] = cut(t.out[i], false);
    if (s + 1 == int(model_.segments().size())) {
        loss_ = loss_ + t.out[0].detach();
        grads_[size_t(mb)]["loss"] = at::ones_like(t.out[0]);
        slots.clear();
    }
    if (!keep_graph) t.out.clear();
}

void Executor::backward(int s, int mb, bool defer) {
    const Segment& segment = model_.segments()[size_t(s)];
    Tape t = std::move(tape(s, mb));                  // the graph and its saved tensors end with this function
    auto& grads = grads_[size_t(mb)];
    if (recomputed(s)) {
        at::AutoGradMode mode(true);                  // the caller may be under NoGradGuard
        for (auto& x : t.in) x = cut(x, true);
        Call call{(*batches_)[size_t(mb)], /*again=*/true};
        t.out = segment.forward(t.in, call);
    }
    GradSink& sink = model_.store().sink();
    if (defer) sink.defer(s, mb);
    else sink.immediate();

    Tensors outs, douts, ins;
    for (size_t i = 0; i < t.out.size(); ++i) {
        auto it = grads.find(segment.writes[i]);
        if (it == grads.end()) continue;
        if (t.out[i].requires_grad() && it->second.defined()) {
            outs.push_back(t.out[i]);
            douts.push_back(it->second);
        }
        grads.erase(it);                              // this segment wrote the slot: earlier readers read another version
    }
    for (auto& x : t.in)
        if (x.defined() && x.requires_grad()) ins.push_back(x);
    if (outs.empty()) return;
    auto got = torch::autograd::grad(outs, ins, douts, /*retain_graph=*/false, /*create_graph=*/false, /*allow_unused=*/true);
    size_t k = 0;
    for (size_t i = 0; i < t.in.size(); ++i) {
        if (!t.in[i].defined() || !t.in[i].requires_grad()) continue;
        Tensor& sum = grads[segment.reads[i]];
        if (got[k].defined()) sum = sum.defined() ? sum + got[k] : got[k];
        ++k;
    }
}

Tensor Executor::run_attached(std::vector<MicroBatch>& batches) {
    at::AutoGradMode mode(true);
    model_.store().sink().immediate();
    Tensor loss = zero_loss(model_.options());
    for (auto& batch : batches) {
        Tensor l = model_.run_attached(batch);
        loss = loss + l.detach();
        torch::autograd::backward({l});
    }
    return loss;
}

Tensor Executor::run_forward(MicroBatch& batch) {
    at::NoGradGuard no_grad;
    return model_.run_attached(batch);
}

}  // namespace moe::train
