// Micro-batches, and segments run one after the other. Letters: B sequences, S positions of each, T tokens, V vocabulary.
#include "core/model/model.h"

#include "core/base/error.h"
#include "core/kernels/head/head_loss.h"
#include "core/kernels/linear/linear.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/zeros.h>

#include <map>
#include <string>

namespace moe {
void MicroBatch::add_loss(const std::string& name, const Tensor& value) {
    Tensor& sum = losses[name];
    sum = sum.defined() ? sum + value.detach() : value.detach();
}

namespace {
/// x [B, S] moved k to the left: what stands k positions on, `fill` past the end.
Tensor ahead_of(const Tensor& x_BS, int64_t k, int64_t fill = kernels::kIgnore) {
    int64_t S = x_BS.size(1);
    Tensor out = at::full_like(x_BS, fill);
    if (k < S) out.narrow(1, 0, S - k).copy_(x_BS.narrow(1, k, S - k));
    return out;
}
/// Where the token k ahead is of the same piece of a document: positions 0 … k − 1 on are in the piece, and each has a target. A valid
/// target alone does not say so: a piece that was cut ends with one.
Tensor reaches(const Tensor& targets_BS, const Tensor& doc_start_BS, int64_t k) {
    Tensor all = at::ones_like(targets_BS, at::kBool);
    for (int64_t j = 0; j < k; ++j) {
        all = all.logical_and(ahead_of(targets_BS, j).ge(0));
        if (j > 0 && doc_start_BS.defined()) all = all.logical_and(ahead_of(doc_start_BS, j, -1).eq(doc_start_BS));
    }
    return all;
}
}  // namespace

int64_t Model::num_mtp_targets(const Tensor& targets_BS, const Tensor& doc_start_BS, int64_t k) { return reaches(targets_BS, doc_start_BS, k + 1).sum().item<int64_t>(); }

MicroBatch Model::micro_batch(const Tensor& ids, const Tensor& targets, const Tensor& domain, const Tensor& doc_start, bool mask_documents) const {
    MOE_CHECK(ids.dim() == 2 && ids.scalar_type() == at::kLong && ids.numel() > 0, shape, "model: ids", fmt::format("{} dims of {}", ids.dim(), c10::toString(ids.scalar_type())), "int64 [batch, time], not empty", "");
    MOE_CHECK(ids.size(1) <= config_.model.mla.max_context_length, shape, "model: sequence length", std::to_string(ids.size(1)),
              fmt::format("at most {}", config_.model.mla.max_context_length), "raise model.mla.max_context_length");
    int64_t low = ids.min().item<int64_t>(), high = ids.max().item<int64_t>(), V = config_.model.vocab();
    MOE_CHECK(low >= 0 && high < V, data, "model: token ids", fmt::format("{} to {}", low, high), fmt::format("0 to {}", V - 1), "the tokenizer and model.vocab_size must agree");
    MicroBatch b;
    b.B = ids.size(0);
    b.S = ids.size(1);
    // From pinned memory, so that the host need not wait for what the device is doing.
    auto copy = [&](const Tensor& t) { return options_.device.is_cuda() && t.is_cpu() ? t.contiguous().pin_memory().to(options_.device, /*non_blocking=*/true) : t.to(options_.device).contiguous(); };
    auto move = [&](const Tensor& t) { return copy(layout_.tp.part(t.reshape({-1}))); };
    Tensor target = targets.defined() ? targets : at::full_like(ids, kernels::kIgnore), label = domain.defined() ? domain : at::zeros(ids.sizes(), at::kInt);
    b.ids_T = move(ids);
    b.targets_T = move(target);
    b.domain_T = move(label);
    if (doc_start.defined() && mask_documents) b.doc_start_BS = copy(doc_start);
    b.first_token = layout_.tp.group.rank() * b.ids_T.numel();
    Tensor host = target.to(at::kCPU), starts = doc_start.defined() ? doc_start.to(at::kCPU) : doc_start, domains = label.to(at::kCPU);
    for (int64_t k = 1; k <= config_.training.mtp_depth() && mesh_.is_last(); ++k) {
        Tensor no_token = reaches(host, starts, k).logical_not(), no_target = reaches(host, starts, k + 1).logical_not();
        b.mtp.push_back({move(ahead_of(host, k - 1).masked_fill(no_token, 0)), move(ahead_of(host, k).masked_fill(no_target, kernels::kIgnore)), move(domains.masked_fill(no_token, -1)), 0});
    }
    return b;
}

Tensor Model::run_segments(MicroBatch& batch, size_t begin, size_t end, std::map<std::string, Tensor>& slots) {
    bool gather = !at::GradMode::is_enabled();
    Call call{batch};
    Tensor loss;
    for (size_t s = begin; s < end; ++s) {
        const Segment& segment = segments_[s];
        Tensors in;
        for (auto& slot : segment.reads) in.push_back(slots.at(slot));
        if (gather) store_.gather(segment.weights, false);
        Tensors out = segment.forward(in, call);
        if (gather) store_.release(segment.weights, false);
        for (size_t i = 0; i < out.size(); ++i) {
            if (segment.writes[i] == "loss") loss = loss.defined() ? loss + out[i] : out[i];
            else slots[segment.writes[i]] = out[i];
        }
    }
    return loss;
}

Tensor Model::run_attached(MicroBatch& batch) {
    MOE_CHECK(mesh_.num_stages() == 1, config, "model", fmt::format("{} pipeline stages", mesh_.num_stages()), "1 for a graph of the whole model", "train and evaluate through a run");
    std::map<std::string, Tensor> slots;
    slots["anchor"] = at::zeros({1}, at::TensorOptions().dtype(options_.precision.compute).device(options_.device)).set_requires_grad(at::GradMode::is_enabled());
    return run_segments(batch, 0, segments_.size(), slots);
}

Tensor Model::logits(const Tensor& ids_BS) {
    MOE_CHECK(mesh_.num_stages() == 1 && mesh_.tp.size() == 1, state, "model:logits", fmt::format("{} stages, {} tensor-parallel ranks", mesh_.num_stages(), mesh_.tp.size()), "a model that is whole on this rank", "");
    at::NoGradGuard no_grad;
    MicroBatch batch = micro_batch(ids_BS, {}, {}, {});
    std::map<std::string, Tensor> slots = {{"anchor", at::zeros({1}, at::TensorOptions().dtype(options_.precision.compute).device(options_.device))}};
    size_t head = 0;
    while (segments_[head].name != "head") ++head;
    run_segments(batch, 0, head, slots);
    store_.gather({head_}, false);
    Tensor logits_TV = kernels::linear(slots.at("final"), head_);
    store_.release({head_}, false);
    if (logits_TV.scalar_type() != at::kDouble) logits_TV = logits_TV.to(at::kFloat);
    return logits_TV.view({batch.B, batch.S, -1});
}

}  // namespace moe
