// Layout verbs: how model code says where a tensor crosses ranks. Identities on a group of one, collectives with their
// gradients otherwise; so a segment reads as on one device.
// Letters: T tokens, R rows sorted by expert here, Q rows received by this rank's experts, E experts, D hidden.
#pragma once
#include "core/dist/group.h"

namespace moe::dist {

/// Who gets how many of the rows of one dispatch.
struct ExpertPlan {
    std::vector<int64_t> send, recv;      ///< rows by rank of ep
    at::Tensor expert_Q;                  ///< int64 [Q, 1], host: local expert of a received row; undefined on a group of one
    at::Tensor offsets;                   ///< int64 [E + 1], host, of one rank's rows; used where the group has one rank
};

/// Expert parallel: rank r of the group holds experts r·E/size … (r + 1)·E/size − 1.
struct ExpertParallel {
    Group group;
    /// Exchanges the counts. offsets int64 [E + 1] on the host: rows by global expert.
    ExpertPlan plan(const at::Tensor& offsets_E1) const;
    /// Rows [R, …] sorted by global expert → rows [Q, …] by (source rank, local expert). Backward is combine.
    at::Tensor dispatch(const at::Tensor& rows, const ExpertPlan& plan) const;
    /// The way back: rows [Q, …] in the order in which dispatch gave them → [R, …]. Backward is dispatch.
    at::Tensor combine(const at::Tensor& rows, const ExpertPlan& plan) const;
};

/// Tensor parallel with sequence parallel: enter gathers the sequence before a product cut by columns, exit reduces and
/// scatters it after one cut by rows. Built for one rank until row D1's axis is there; config refuses others.
struct TensorParallel {
    Group group;
    at::Tensor enter(const at::Tensor& x) const;
    at::Tensor exit(const at::Tensor& x) const;
};

/// Context parallel: keys and values of the whole sequence. As TensorParallel, one rank for now.
struct ContextParallel {
    Group group;
    at::Tensor gather(const at::Tensor& x) const;
};

/// The verbs of one rank.
struct Layout {
    TensorParallel tp;
    ExpertParallel ep;
    ContextParallel cp;
    explicit Layout(const Mesh& mesh) : tp{mesh.tp}, ep{mesh.ep}, cp{mesh.cp} {}
};

}  // namespace moe::dist
