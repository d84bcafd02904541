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

/// Tensor parallel with sequence parallel: outside of the products that are cut, each rank of the group has a part of the
/// micro-batch's tokens, the ranks' parts following one another. Letters: T all tokens, t this rank's, T / size.
struct TensorParallel {
    Group group;
    /// [t, …] → [T, …]: before a product cut by its outputs. Backward sums over the ranks and gives each its part.
    at::Tensor enter(const at::Tensor& x) const;
    /// [T, …] → [t, …]: after a product cut by its inputs, sums over the ranks and gives each its part. Backward is a gather.
    at::Tensor exit(const at::Tensor& x) const;
    /// This rank's part [t, …] of [T, …] that every rank has; a view. Throws moe::Error (shape) where T does not divide.
    at::Tensor part(const at::Tensor& x) const;
};

/// Context parallel: keys and values of the whole sequence. One rank until that axis is built.
struct ContextParallel {
    Group group;
    /// [t, …] of this rank → [T, …] of all. Throws moe::Error (internal) for more than one rank.
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
