// Segments: functions from tensors to tensors over their own weights. They read as on one device and know nothing of
// schedules, recomputation or ranks. Boundaries are named slots, not a chain.
#pragma once
#include "core/dist/layout.h"
#include "core/kernels/permute/permute.h"
#include "core/routing/intervention.h"
#include "core/routing/ledger.h"
#include "core/routing/losses.h"
#include "core/routing/trace.h"
#include "core/tensor/factor.h"
#include "core/tensor/weight.h"

#include <functional>
#include <map>
#include <string>
#include <vector>

namespace moe {

using Tensors = std::vector<Tensor>;

/// What a router decided in one layer, and how its rows travel: a saved output, never computed twice.
struct Routed {
    Tensor ids_TK;                        ///< −1 where capacity dropped the pair
    Tensor chosen_TK;                     ///< before capacity: what the weights and the balance losses go by
    routing::HookResults hooked;          ///< what hooks of a script gave
    Tensor load_E;                        ///< float64: the global batch's c_i / c̄ so far, for the global-batch loss
    kernels::SortPlan by_expert;          ///< (token, choice) → rows by global expert
    dist::ExpertPlan across;              ///< rows → ranks
    kernels::SortPlan received;           ///< received rows → rows by local expert; unused on a group of one
    kernels::RowGroups groups;            ///< rows of each expert of this rank
};

/// What MTP module k (from 1) reads and predicts at each position i of this rank's tokens: the token i + k, and i + k + 1.
struct Shifted {
    Tensor ids_T, targets_T, domain_T;    ///< id 0, target and domain −1 where the document ends before
    Factor loss_scale = 0;                ///< gradient_scale · λ / (depth · valid targets of the global batch)
};

/// One micro-batch on its way through the model. Everything that segments may know besides tensors. T is this rank's tokens: all
/// B·S, or a part of them under tensor parallel (dist/layout.h).
struct MicroBatch {
    int64_t B = 0, S = 0;                 ///< of the whole micro-batch
    Tensor ids_T, targets_T;              ///< int64, compute device
    Tensor domain_T;                      ///< int32, −1 for padding
    Tensor doc_start_BS;                  ///< int32 [B, S], or undefined
    std::vector<Shifted> mtp;             ///< by module, from 1
    bool training = false;                ///< dropout, noise and balance losses are on
    int64_t first_token = 0;              ///< global index of this rank's first token in this step: key of randomness
    uint32_t step = 0;
    Factor loss_scale;                    ///< gradient_scale / valid targets of the global batch
    double gradient_scale = 1;            ///< of the whole backward, for fp16; what is noted in `losses` is without it
    Factor token_share;                   ///< 1 / tokens of the global batch that count: scale of the routers' losses
    double noise_std = 0;                 ///< of the routers' noise, annealed
    std::map<std::string, Tensor> losses; ///< "loss", "mtp", "balance", "z": 0-d float64 sums over segments, scaled, without gradient
    routing::Ledger* ledger = nullptr;    ///< counts in training only
    routing::GlobalLoad* global_load = nullptr;   ///< where the global-batch loss is on
    routing::Trace* trace = nullptr;      ///< records in evaluation only
    Tensor* token_loss = nullptr;         ///< where given: float32 [T], unscaled
    std::vector<Tensor>* predicted = nullptr;   ///< where given: int64 [T], the most likely next token; of the main head, then of each module
    std::map<int64_t, Routed> routed;     ///< by absolute layer

    /// Adds to losses[name].
    void add_loss(const std::string& name, const Tensor& value);
};

/// One run of a segment.
struct Call {
    MicroBatch& batch;
    bool again = false;                   ///< a recomputation: decisions are taken from batch.routed, nothing is counted
    bool backward_follows = false;        ///< once, and a loss gets 1 from above: a head may make its gradients at once
};

/// A named piece of the model. What it writes to the slot "loss" is a loss: it starts a backward.
struct Segment {
    std::string name;                     ///< e.g. "layers.3.attention"
    int64_t layer = -1;                   ///< absolute index, −1 outside the layers; MTP module k is num_layers + k − 1
    std::vector<std::string> reads, writes;   ///< slots; "residual" is read and written by every block
    std::vector<WeightPtr> weights;       ///< all that it reads: gathered before it runs where they are cut
    std::function<Tensors(const Tensors&, Call&)> forward;   ///< tensors in the order of reads → in the order of writes
};

/// What kind of segment a name is of: its last word.
inline std::string segment_kind(const std::string& name) { return name.substr(name.rfind('.') + 1); }

/// What the checkpoint's names of a layer's tensors begin with.
inline std::string layer_prefix(int64_t layer) { return "model.layers." + std::to_string(layer) + "."; }

/// The names of all segments of a model, in the order in which a token meets them, whatever stage has them; a stage's own are those of Model::segments().
std::vector<std::string> segment_names(const Config& config);

}  // namespace moe
