#include "core/train/step_graph.h"

#include "core/base/error.h"
#include "core/base/log.h"
#include "core/kernels/linear/linear.h"
#include "core/kernels/mla/attention.h"

#include <ATen/ATen.h>
#ifdef MOE_WITH_CUDA
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGuard.h>
#endif

#include <cstring>
#include <string_view>

namespace moe::train {
namespace {
/// Steps that run as they are: libraries choose their kernels and make their workspaces then.
[[maybe_unused]] constexpr int kWarmUpSteps = 3;

/// The tensors of a micro-batch that change from step to step, but for its factors.
std::vector<Tensor*> tensors_of(MicroBatch& b) {
    std::vector<Tensor*> list = {&b.ids_T, &b.targets_T, &b.domain_T, &b.doc_start_BS};
    for (auto& m : b.mtp) list.insert(list.end(), {&m.ids_T, &m.targets_T, &m.domain_T});
    return list;
}

/// Its factors, in an order.
std::vector<Factor*> factors_of(MicroBatch& b) {
    std::vector<Factor*> list = {&b.loss_scale, &b.token_share};
    for (auto& m : b.mtp) list.push_back(&m.loss_scale);
    return list;
}

/// What must be as it was for a record to be of use.
std::vector<std::vector<int64_t>> shapes_of(std::vector<MicroBatch>& batches) {
    std::vector<std::vector<int64_t>> list;
    for (auto& b : batches) {
        int64_t scale = 0;
        std::memcpy(&scale, &b.gradient_scale, sizeof scale);
        list.push_back({b.B, b.S, int64_t(b.training), scale, int64_t(b.mtp.size())});
        for (Tensor* t : tensors_of(b)) list.push_back(t->defined() ? t->sizes().vec() : std::vector<int64_t>{-1});
    }
    return list;
}
}  // namespace

bool StepGraph::takes(const Config& c, const Model& model, std::string* why) {
    std::string reason;
    auto refuse = [&](bool condition, const char* text) {
        if (condition && reason.empty()) reason = text;
    };
    auto compute = model.options().precision.compute;
    refuse(!model.options().device.is_cuda(), "the model is not on a GPU");
    refuse(model.mesh().world.size() > 1, "several ranks");
    refuse(compute != at::kBFloat16, "experts go one by one in this precision");
    refuse(c.deterministic, "deterministic runs take attention kernels that wait for the number of documents");
    refuse(c.model.mla.attn_dropout > 0 || c.model.moe.dropout > 0, "dropout");
    refuse(c.model.moe.router_noise_std > 0, "noise of the router");
    refuse(c.model.mla.d_model % 8 || c.model.moe.expert_intermediate_size % 8, "widths of experts that are no multiples of 8");
    bool documents = c.data.packing && c.data.document_mask;
    refuse(documents && (!kernels::masks_documents(c.training.seq_length) || c.model.num_kv_heads() != c.model.mla.num_heads || c.model.mla.sliding_window), "packed documents whose number is waited for");
    if (why) *why = reason;
    return reason.empty();
}

/// Up to this many numbers of a micro-batch's residual: 16 thousand tokens of width 1024.
bool StepGraph::pays(const Config& c) { return c.training.micro_batch_size * c.training.seq_length * c.model.mla.d_model <= int64_t(1) << 24; }

#ifdef MOE_WITH_CUDA
/// A recorded step and the tensors that it reads.
struct StepGraph::Record {
    at::cuda::CUDAGraph graph;
    std::vector<MicroBatch> batches;
    std::vector<Tensor> factors;          ///< float64 on the device, by micro-batch: what its factors' tensors are views of
};

StepGraph::StepGraph(Executor& executor, Model& model) : executor_(executor), model_(model) {}
StepGraph::~StepGraph() = default;
bool StepGraph::is_recorded() const { return record_ != nullptr; }

namespace {
void fill_factors(std::vector<MicroBatch>& from, std::vector<Tensor>& to) {
    for (size_t i = 0; i < from.size(); ++i) {
        auto list = factors_of(from[i]);
        Tensor host = at::empty({int64_t(list.size())}, at::TensorOptions().dtype(at::kDouble).pinned_memory(true));
        for (size_t k = 0; k < list.size(); ++k) host.mutable_data_ptr<double>()[k] = list[k]->number;
        to[i].copy_(host, /*non_blocking=*/true);
    }
}
void copy_tensors(std::vector<MicroBatch>& from, std::vector<MicroBatch>& to) {
    for (size_t i = 0; i < from.size(); ++i) {
        auto a = tensors_of(from[i]), b = tensors_of(to[i]);
        for (size_t k = 0; k < a.size(); ++k)
            if (a[k]->defined()) b[k]->copy_(*a[k]);
    }
}
}  // namespace

/// A record reads the weights' E4M3 copies and makes none: an optimizer may have left them, and then there is nothing to do.
void StepGraph::refresh_copies() {
    for (auto& w : model_.weights()) kernels::refresh_fp8(w);
}

void StepGraph::record(const Program& program, const std::vector<MicroBatch>& batches) {
    auto made = std::make_unique<Record>();
    made->batches = batches;
    for (auto& b : made->batches) {
        b.routed.clear();
        b.losses.clear();
        for (Tensor* t : tensors_of(b))
            if (t->defined()) *t = t->clone();
        auto list = factors_of(b);
        made->factors.push_back(at::zeros({int64_t(list.size())}, at::TensorOptions().dtype(at::kDouble).device(model_.options().device)));
        for (size_t k = 0; k < list.size(); ++k) *list[k] = Factor(made->factors.back()[int64_t(k)]);
    }
    std::vector<MicroBatch> now = batches;
    fill_factors(now, made->factors);
    copy_tensors(now, made->batches);                      // also tells whoever keeps what follows from doc_start that it has changed
    refresh_copies();
    c10::cuda::device_synchronize();
    c10::cuda::CUDACachingAllocator::emptyCache();         // a record's memory is its own: the steps before must not keep theirs beside it
    auto stream = c10::cuda::getStreamFromPool(/*isHighPriority=*/false, model_.options().device.index());
    {
        c10::cuda::CUDAStreamGuard guard(stream);
        made->graph.capture_begin();
        try {
            executor_.execute(program, made->batches);
        } catch (...) {
            try {
                made->graph.capture_end();
            } catch (...) {                                // what broke the capture is what is thrown
            }
            throw;
        }
        made->graph.capture_end();
    }
    model_.store().settle_grads();                         // gradients that a step never writes stay zero from now on
    for (auto& b : made->batches) b.routed.clear();
    record_ = std::move(made);
}

void StepGraph::run(const Program& program, std::vector<MicroBatch>& batches) {
    if (failed_) return executor_.execute(program, batches);
    auto shapes = shapes_of(batches);
    if (shapes != shapes_) {
        record_.reset();
        seen_ = 0;
        shapes_ = shapes;
    }
    if (!record_ && seen_++ < kWarmUpSteps) return executor_.execute(program, batches);
    try {
        if (!record_) record(program, batches);
    } catch (const std::exception& e) {
        failed_ = true;
        log::warn(fmt::format("training.compile_graphs: the step could not be recorded and goes on without: {}", std::string_view(e.what()).substr(0, std::string_view(e.what()).find('\n'))));
        return executor_.execute(program, batches);
    }
    fill_factors(batches, record_->factors);
    copy_tensors(batches, record_->batches);
    refresh_copies();
    record_->graph.replay();
    model_.store().mark_grads_written();
    for (size_t i = 0; i < batches.size(); ++i) batches[i].losses = record_->batches[i].losses;
}
void StepGraph::reset() {
    record_.reset();
    seen_ = 0;
}
#else
struct StepGraph::Record {};
void StepGraph::reset() {}
StepGraph::StepGraph(Executor& executor, Model& model) : executor_(executor), model_(model) {}
StepGraph::~StepGraph() = default;
bool StepGraph::is_recorded() const { return false; }
void StepGraph::record(const Program&, const std::vector<MicroBatch>&) {}
void StepGraph::run(const Program& program, std::vector<MicroBatch>& batches) { executor_.execute(program, batches); }
#endif
}  // namespace moe::train
