#include "core/train/step_program.h"

#include "core/base/error.h"
#include "core/base/interrupt.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <ATen/record_function.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/functions/basic_ops.h>

#include <algorithm>
#include <set>

namespace moe::train {
using torch::autograd::Edge;
namespace {
constexpr const char* kBoundary = "residual";        ///< the slot that crosses from stage to stage
constexpr const char* kLoss = "loss";

/// Programs of one stage, appended to.
struct Builder {
    ScheduleShape shape;
    Program program;
    bool first() const { return shape.stage == 0; }
    bool last() const { return shape.stage + 1 == shape.num_stages; }
    void forward(int mb) {
        if (!first()) program.push_back({OpKind::receive_forward, -1, mb});
        for (int s = 0; s < shape.num_segments; ++s) program.push_back({OpKind::forward, s, mb});
        if (!last()) program.push_back({OpKind::send_forward, -1, mb});
    }
    void backward(int mb) {
        if (!last()) program.push_back({OpKind::receive_backward, -1, mb});
        for (int s = shape.num_segments; s-- > 0;) program.push_back({shape.defer ? OpKind::backward_input : OpKind::backward, s, mb});
        if (!first()) program.push_back({OpKind::send_backward, -1, mb});
        for (int s = shape.num_segments; shape.defer && s-- > 0;) program.push_back({OpKind::weight_grad, s, mb});
    }
};

/// What a new graph starts from: shares t's storage, not its history. A floating tensor that wants a gradient hangs on a node of its own and not on one that
/// autograd makes for a leaf, which would keep the storage.
Tensor start(const Tensor& t, bool wants_grad, Edge& edge) {
    if (!t.defined()) return t;
    Tensor fresh = t.detach();
    if (wants_grad && fresh.is_floating_point()) {
        torch::autograd::create_gradient_edge(fresh, std::make_shared<torch::autograd::Identity>());
        edge = torch::autograd::impl::gradient_edge(fresh);
    }
    return fresh;
}

/// By segment: the slots that nobody reads after it before they are written again.
std::vector<std::set<std::string>> last_reads(const Model& model) {
    auto& segments = model.segments();
    std::vector<std::set<std::string>> out(segments.size());
    std::set<std::string> wanted;
    if (!model.mesh().is_last()) wanted.insert(kBoundary);
    for (size_t s = segments.size(); s-- > 0;) {
        for (auto& slot : segments[s].writes) wanted.erase(slot);
        for (auto& slot : segments[s].reads)
            if (wanted.insert(slot).second && std::find(segments[s].writes.begin(), segments[s].writes.end(), slot) == segments[s].writes.end()) out[s].insert(slot);
    }
    return out;
}

/// Whether nobody else holds the tensor or its memory: no graph, slot, queue or message. Counts are of this moment, on the one thread that runs a step.
bool is_owned(const Tensor& t) { return t.use_count() == 1 && t.has_storage() && t.storage().use_count() == 1 && t.is_non_overlapping_and_dense(); }

/// sum += more, in the memory of whichever of the two is nobody else's; `more` is given up.
void accumulate(Tensor& sum, Tensor more) {
    if (!more.defined()) return;
    if (!sum.defined()) sum = std::move(more);
    else if (is_owned(sum)) sum.add_(more);
    else if (is_owned(more)) sum = more.add_(sum);
    else sum = sum + more;
}

/// Sum of the main losses of some micro-batches.
Tensor main_loss(const MicroBatch* begin, size_t count) {
    Tensor sum = at::zeros({}, at::kDouble);
    for (size_t i = 0; i < count; ++i)
        if (auto it = begin[i].losses.find(kLoss); it != begin[i].losses.end()) sum = sum + it->second.to(at::kCPU);
    return sum;
}
}  // namespace

Program schedule(const std::string& name, const ScheduleShape& shape) {
    MOE_CHECK(name == "gpipe" || name == "1f1b", config, "distributed.pipeline_schedule", name, "gpipe or 1f1b", "the others are not built yet");
    Builder b{shape, {}};
    int all = shape.num_micro_batches;
    int ahead = shape.num_stages == 1 ? 0 : name == "gpipe" ? all : std::min(all, shape.num_stages - 1 - shape.stage);
    for (int mb = 0; mb < ahead; ++mb) b.forward(mb);
    for (int mb = 0; mb < all; ++mb) {
        if (mb + ahead < all) b.forward(mb + ahead);
        b.backward(mb);
    }
    return b.program;
}

std::string describe(const Program& program, const Model& model) {
    const char* names[] = {"F", "B", "Bx", "W", "<F", "F>", "<B", "B>"};
    std::string out;
    for (auto& op : program)
        out += fmt::format("{}{}:{}/{}", out.empty() ? "" : " ", names[int(op.kind)], op.segment < 0 ? "" : model.segments()[size_t(op.segment)].name, op.micro_batch);
    return out;
}

Executor::Executor(Model& model) : model_(model), spans_(model.segments().size(), -1), done_(last_reads(model)) {}

void Executor::set_recompute(std::vector<int> spans) {
    MOE_CHECK(spans.size() == model_.segments().size(), internal, "recompute", fmt::format("{} entries", spans.size()), fmt::format("{}", model_.segments().size()), "");
    spans_ = std::move(spans);
}

Executor::Tape& Executor::tape(int segment, int micro_batch) { return tapes_[size_t(micro_batch) * model_.segments().size() + size_t(segment)]; }
Tensor Executor::anchor() const { return at::zeros({1}, at::TensorOptions().dtype(model_.options().precision.compute).device(model_.options().device)); }

Tensor Executor::run(const Program& program, std::vector<MicroBatch>& batches) {
    execute(program, batches);
    return main_loss(batches.data(), batches.size());
}

void Executor::execute(const Program& program, std::vector<MicroBatch>& batches) {
    // Whatever throws, no tape, queue or deferred mode is left: the caller zeroes the gradients and the step is as if never begun.
    struct Rollback {
        Executor& e;
        ~Rollback() {
            e.tapes_.clear();
            e.slots_.clear();
            e.grads_.clear();
            e.kept_.clear();
            e.model_.store().sink().reset();
            for (auto& s : e.model_.segments()) e.model_.store().drop(s.weights);
        }
    } rollback{*this};
    batches_ = &batches;
    tapes_.assign(batches.size() * model_.segments().size(), {});
    slots_.assign(batches.size(), {{"anchor", anchor()}});
    grads_.assign(batches.size(), {});
    for (auto& op : program) {
        if (interrupt_ && *interrupt_) throw Error(interruption());
        RECORD_USER_SCOPE(phase_of(op));              // names a phase of moe.profile; nothing where no profile is being recorded
        switch (op.kind) {
            case OpKind::forward: forward(op.segment, op.micro_batch); break;
            case OpKind::backward: backward(op.segment, op.micro_batch, false); break;
            case OpKind::backward_input: backward(op.segment, op.micro_batch, true); break;
            case OpKind::weight_grad: model_.store().sink().drain(op.segment, op.micro_batch); break;
            default: message(op);
        }
    }
    model_.mesh().pp.flush();
    sent_.clear();
}

/// "forward attention", "backward experts", "weights experts", "message".
std::string Executor::phase_of(const Op& op) const {
    const char* names[] = {"forward", "backward", "backward", "weights"};
    if (op.kind >= OpKind::receive_forward) return "message";
    return fmt::format("{} {}", names[int(op.kind)], segment_kind(model_.segments()[size_t(op.segment)].name));
}

// ---- messages between stages ----
void Executor::send(const Tensor& data, int to) {
    sent_.push_back(data.contiguous());
    model_.mesh().pp.send(sent_.back(), to);
}

void Executor::receive(Tensor& slot, int from, int64_t tokens) {
    slot = at::empty({tokens, model_.config().model.mla.d_model}, at::TensorOptions().dtype(model_.options().precision.compute).device(model_.options().device));
    model_.mesh().pp.receive(slot, from);
}

void Executor::message(const Op& op) {
    int stage = model_.mesh().pp.rank();
    auto mb = size_t(op.micro_batch);
    int64_t tokens = (*batches_)[mb].ids_T.numel();
    switch (op.kind) {
        case OpKind::receive_forward: receive(slots_[mb][kBoundary], stage - 1, tokens); break;
        case OpKind::send_forward: send(slots_[mb].at(kBoundary), stage + 1); slots_[mb].clear(); break;
        case OpKind::receive_backward: receive(grads_[mb][kBoundary], stage + 1, tokens); break;
        default: send(grads_[mb].at(kBoundary), stage - 1); grads_[mb].clear();
    }
}

// ---- segments ----
/// Runs a segment on slots; its tape is kept where a graph is wanted.
void Executor::run_segment(int s, int mb, Slots& slots, bool keep_graph, bool again) {
    const Segment& segment = model_.segments()[size_t(s)];
    Tape t;
    Tensors in;
    for (auto& slot : segment.reads) in.push_back(start(slots.at(slot), keep_graph, t.in.emplace_back()));
    for (auto& slot : done_[size_t(s)]) slots.erase(slot);
    at::AutoGradMode mode(keep_graph);                // the caller may be under NoGradGuard
    Call call{(*batches_)[size_t(mb)], again, keep_graph && !model_.store().is_cut()};      // a cut gradient has room in backward only
    model_.store().gather(segment.weights, false);
    Tensors out = segment.forward(in, call);
    model_.store().release(segment.weights, false);
    for (size_t i = 0; i < out.size(); ++i) {
        slots[segment.writes[i]] = out[i].defined() ? out[i].detach() : out[i];
        t.out.push_back(out[i].defined() && out[i].requires_grad() ? torch::autograd::impl::gradient_edge(out[i]) : Edge());
        if (keep_graph && segment.writes[i] == kLoss) t.loss_grad = at::ones_like(out[i]);
    }
    if (keep_graph) tape(s, mb) = std::move(t);
}

void Executor::forward(int s, int mb) {
    const Segment& segment = model_.segments()[size_t(s)];
    auto& slots = slots_[size_t(mb)];
    int span = spans_[size_t(s)];
    if (span >= 0) {
        bool first = s == 0 || spans_[size_t(s) - 1] != span;
        auto& kept = kept_[{span, mb}];
        std::set<std::string> written;
        for (int k = s; first && k < int(spans_.size()) && spans_[size_t(k)] == span; ++k) {
            for (auto& slot : model_.segments()[size_t(k)].reads)
                if (!written.contains(slot)) kept[slot] = slots.at(slot);
            for (auto& slot : model_.segments()[size_t(k)].writes) written.insert(slot);
        }
    }
    run_segment(s, mb, slots, span < 0, false);
    for (size_t i = 0; i < segment.writes.size(); ++i)
        if (segment.writes[i] == kLoss) slots.erase(kLoss);
    if (s + 1 == int(model_.segments().size()) && model_.mesh().is_last()) slots.clear();
}

/// A span's forward once more, with the decisions of the first time; its tapes are then as if they had been kept.
void Executor::compute_again(int span, int mb) {
    auto node = kept_.extract({span, mb});
    for (size_t s = 0; s < spans_.size(); ++s)
        if (spans_[s] == span) run_segment(int(s), mb, node.mapped(), true, true);
}

void Executor::backward(int s, int mb, bool defer) {
    const Segment& segment = model_.segments()[size_t(s)];
    if (int span = spans_[size_t(s)]; span >= 0 && kept_.contains({span, mb})) compute_again(span, mb);
    Tape t = std::move(tape(s, mb));                  // the graph and its saved tensors end with this function
    auto& grads = grads_[size_t(mb)];
    ParamStore& store = model_.store();
    MOE_CHECK(!defer || !store.is_cut(), config, "deferred weight gradients", fmt::format("zero_stage {}", store.options().zero_stage), "zero_stage 0 or 1", "a cut gradient has no room to wait in");
    if (defer) store.sink().defer(s, mb);
    else store.sink().immediate();

    std::vector<Edge> outs, ins;
    Tensors douts;
    for (size_t i = 0; i < t.out.size(); ++i) {
        const std::string& slot = segment.writes[i];
        Tensor dout = slot == kLoss ? t.loss_grad : Tensor();
        if (auto it = grads.find(slot); it != grads.end()) {
            dout = it->second;
            grads.erase(it);                          // this segment wrote the slot: earlier readers read another version
        }
        if (!t.out[i].is_valid() || !dout.defined()) continue;
        outs.push_back(t.out[i]);
        douts.push_back(dout);
    }
    for (auto& edge : t.in)
        if (edge.is_valid()) ins.push_back(edge);
    // Every rank of a group gathers and releases, also where its own tokens give no gradient.
    store.gather(segment.weights, true);
    Tensors got(ins.size());
    if (!outs.empty()) got = torch::autograd::Engine::get_default_engine().execute(outs, douts, /*keep_graph=*/false, /*create_graph=*/false, /*accumulate_grad=*/false, ins);
    store.release(segment.weights, true);
    size_t k = 0;
    // What came from above and what is left of this segment's graph must not count as holders of these gradients.
    douts.clear();
    outs.clear();
    t.out.clear();
    for (size_t i = 0; i < t.in.size(); ++i)
        if (t.in[i].is_valid()) accumulate(grads[segment.reads[i]], std::move(got[k++]));
}

Tensor Executor::run_attached(std::vector<MicroBatch>& batches) {
    MOE_CHECK(model_.mesh().num_stages() == 1, config, "attached mode", fmt::format("{} pipeline stages", model_.mesh().num_stages()), "1", "one graph cannot cross ranks: scheduled mode does");
    at::AutoGradMode mode(true);
    ParamStore& store = model_.store();
    store.sink().immediate();
    std::vector<WeightPtr> all = model_.weights();
    for (auto& batch : batches) {
        store.gather(all, true);
        torch::autograd::backward({model_.run_attached(batch)});
        store.release(all, true);
    }
    return main_loss(batches.data(), batches.size());
}

Tensor Executor::run_forward(MicroBatch& batch, bool with_losses) {
    at::NoGradGuard no_grad;
    auto& mesh = model_.mesh();
    struct Rollback {
        Model& model;
        ~Rollback() {
            for (auto& s : model.segments()) model.store().drop(s.weights);
        }
    } rollback{model_};
    Slots slots = {{"anchor", anchor()}};
    if (!mesh.is_first()) receive(slots[kBoundary], mesh.pp.rank() - 1, batch.ids_T.numel());
    for (size_t s = 0; s < model_.segments().size(); ++s) {
        if (interrupt_ && *interrupt_) throw Error(interruption());
        const Segment& segment = model_.segments()[s];
        bool is_loss = segment.writes.size() == 1 && segment.writes[0] == kLoss;
        if (with_losses || !is_loss) model_.run_segments(batch, s, s + 1, slots);
    }
    if (!mesh.is_last()) send(slots.at(kBoundary), mesh.pp.rank() + 1);
    mesh.pp.flush();
    sent_.clear();
    return main_loss(&batch, 1);
}

}  // namespace moe::train
