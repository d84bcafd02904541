// The only place where routed tokens are counted for balance and monitoring: once per token and optimizer step, never in
// evaluation, recomputation or for padding.
// Letters: L layers (absolute index), E experts, D domains.
#pragma once
#include "core/dist/group.h"

namespace moe::routing {

/// Counts of one optimizer step.
class Ledger {
public:
    /// Zero counts of `num_layers` absolute layers; those without a router stay zero.
    Ledger(int64_t num_layers, int64_t num_experts, int64_t num_domains, at::Device device);
    /// Adds a layer's decision: ids int64 [T, K]; domain int32 [T], −1 for padding, which counts nowhere; kept, where given, is ids
    /// with −1 for what capacity dropped: it counts as routed (balance goes by what was wanted) and as dropped. No synchronisation.
    void count(int64_t layer, const at::Tensor& ids_TK, const at::Tensor& domain_T, const at::Tensor& kept_TK = {});
    /// Sums over the ranks of a group, once at the end of an optimizer step.
    void reduce(const dist::Group& group);
    void clear();
    /// Copies, int64 [L, E] and [L, D, E], where the counts are.
    at::Tensor counts() const;
    at::Tensor counts_by_domain() const;
    /// Of counts(), what capacity dropped: int64 [L, E].
    at::Tensor dropped() const;

private:
    at::Tensor counts_LDE_;       ///< int64, row 0 of D takes padding
    at::Tensor dropped_LE_;       ///< int64
};

}  // namespace moe::routing
