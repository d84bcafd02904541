// Segments: functions from tensors to tensors over their own weights. They read as on one device and know nothing of
// schedules, recomputation or ranks. Boundaries are named slots, not a chain.
#pragma once
#include "core/dist/layout.h"
#include "core/kernels/permute/permute.h"
#include "core/routing/ledger.h"
#include "core/routing/trace.h"
#include "core/tensor/weight.h"

#include <functional>
#include <map>
#include <string>
#include <vector>

namespace moe {

using Tensors = std::vector<Tensor>;

/// What a router decided in one layer, and how its rows travel: a saved output, never computed twice.
struct Routed {
    Tensor ids_TK;
    kernels::SortPlan by_expert;          ///< (token, choice) → rows by global expert
    dist::ExpertPlan across;              ///< rows → ranks
    kernels::SortPlan received;           ///< received rows → rows by local expert; unused on a group of one
    Tensor offsets;                       ///< int64 [E_local + 1], host: rows of each local expert
};

/// One micro-batch on its way through the model. Everything that segments may know besides tensors.
struct MicroBatch {
    int64_t B = 0, S = 0;
    Tensor ids_T, targets_T;              ///< int64 [B·S], compute device
    Tensor domain_T;                      ///< int32 [B·S], −1 for padding
    Tensor doc_start_BS;                  ///< int32 [B, S], or undefined
    int64_t first_token = 0;              ///< global index of the first token in this step: key of randomness
    uint32_t step = 0;
    double loss_scale = 1;                ///< 1 / valid targets of the global batch
    routing::Ledger* ledger = nullptr;    ///< counts in training only
    routing::Trace* trace = nullptr;      ///< records in evaluation only
    Tensor* token_loss = nullptr;         ///< where given: float32 [T], unscaled
    std::map<int64_t, Routed> routed;     ///< by absolute layer
};

/// One run of a segment.
struct Call {
    MicroBatch& batch;
    bool again = false;                   ///< a recomputation: decisions are taken from batch.routed, nothing is counted
};

/// A named piece of the model.
struct Segment {
    std::string name;                     ///< e.g. "layers.3.attention"
    int64_t layer = -1;                   ///< absolute index, −1 outside the layers
    std::vector<std::string> reads, writes;   ///< slots; "residual" is read and written by every block
    std::function<Tensors(const Tensors&, Call&)> forward;   ///< tensors in the order of reads → in the order of writes
};

}  // namespace moe
