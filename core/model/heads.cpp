// The main head and the MTP modules. Letters: T tokens, D hidden, V vocabulary.
#include "core/model/model.h"

#include "core/kernels/embed/embed.h"
#include "core/kernels/head/head_loss.h"
#include "core/kernels/linear/linear.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>

#include <algorithm>

namespace moe {
namespace {
constexpr int64_t kMaxLogitRows = 1024;              // rows whose logits exist at a time where the head predicts

/// The most likely token of each row, int64 [T], in pieces.
Tensor most_likely(const Tensor& final_TD, const WeightPtr& head) {
    at::NoGradGuard no_grad;
    Tensors parts;
    for (int64_t lo = 0; lo < final_TD.size(0); lo += kMaxLogitRows)
        parts.push_back(kernels::linear(final_TD.narrow(0, lo, std::min(kMaxLogitRows, final_TD.size(0) - lo)), head).argmax(-1));
    return at::cat(parts);
}
}  // namespace

Tensor Model::head_loss(const Tensor& final_TD, const Tensor& targets_T, const Factor& scale, Call& call, bool main) const {
    kernels::HeadLossOptions options;
    options.scale = scale;
    options.gradients_in_forward = call.backward_follows;
    Tensor loss = kernels::head_loss(final_TD, head_, targets_T, options, main ? call.batch.token_loss : nullptr);
    if (!call.again) call.batch.add_loss(main ? "loss" : "mtp", loss / call.batch.gradient_scale);
    if (call.batch.predicted) call.batch.predicted->push_back(most_likely(final_TD, head_));
    return loss;
}

void Model::add_head() {
    int64_t D = config_.model.mla.d_model;
    auto final_norm = norm("model.norm", D);
    head_ = config_.model.tie_word_embeddings ? embedding_ : weight("lm_head", {config_.model.vocab(), D});
    const int below = residual_products_;
    add("final_norm", -1, {"residual"}, {"final"}, {final_norm.gamma, final_norm.beta}, [=, this](const Tensors& in, Call&) -> Tensors { return {normalized(in[0], final_norm, below)}; });
    add("head", -1, {"final"}, {"loss"}, {head_}, [this](const Tensors& in, Call& call) -> Tensors {
        return {head_loss(in[0], call.batch.targets_T, call.batch.loss_scale, call, true)};
    });
}

/// MTP module k: what the head of depth k − 1 read and the embedding of the token k ahead, joined; a layer with experts; the shared
/// head. Source: DeepSeek-V3 technical report 2.2; names and the order in eh_proj as in its checkpoints.
void Model::add_mtp(int64_t k) {
    int64_t layer = config_.model.num_layers + k - 1, D = config_.model.mla.d_model;
    std::string p = layer_prefix(layer), name = fmt::format("mtp.{}.", k);
    auto enorm = norm(p + "enorm", D), hnorm = norm(p + "hnorm", D);
    auto join = projection(p + "eh_proj", D, 2 * D);
    add(name + "join", -1, {"final", "anchor"}, {"residual"}, {enorm.gamma, enorm.beta, hnorm.gamma, hnorm.beta, join, embedding_}, [=, this](const Tensors& in, Call& call) -> Tensors {
        Tensor ahead_TD = kernels::embed(in[1], call.batch.mtp.at(size_t(k - 1)).ids_T, embedding_);
        return {kernels::linear(at::cat({normalized(ahead_TD, enorm), normalized(in[0], hnorm)}, -1), join)};
    });
    residual_products_ = 1;
    add_attention(layer);
    add_experts(layer);
    const int below = residual_products_;
    auto shared_norm = norm(p + "shared_head.norm", D);
    add(name + "norm", -1, {"residual"}, {"final"}, {shared_norm.gamma, shared_norm.beta}, [=, this](const Tensors& in, Call&) -> Tensors { return {normalized(in[0], shared_norm, below)}; });
    add(name + "head", -1, {"final"}, {"loss"}, {head_}, [=, this](const Tensors& in, Call& call) -> Tensors {
        auto& ahead = call.batch.mtp.at(size_t(k - 1));
        return {head_loss(in[0], ahead.targets_T, ahead.loss_scale, call, false)};
    });
}

}  // namespace moe
