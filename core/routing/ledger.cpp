#include "core/routing/ledger.h"

#include "core/base/error.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

namespace moe::routing {

Ledger::Ledger(int64_t num_layers, int64_t num_experts, int64_t num_domains, at::Device device)
    : counts_LDE_(at::zeros({num_layers, num_domains + 1, num_experts}, at::TensorOptions().dtype(at::kLong).device(device))),
      dropped_LE_(at::zeros({num_layers, num_experts}, counts_LDE_.options())) {}

void Ledger::count(int64_t layer, const at::Tensor& ids_TK, const at::Tensor& domain_T, const at::Tensor& kept_TK) {
    at::NoGradGuard no_grad;
    MOE_CHECK(layer >= 0 && layer < counts_LDE_.size(0), internal, "ledger: layer", std::to_string(layer), fmt::format("0 to {}", counts_LDE_.size(0) - 1), "");
    int64_t E = counts_LDE_.size(2);
    at::Tensor cell_TK = (domain_T.to(at::kLong) + 1).unsqueeze(-1) * E + ids_TK;      // row 0: padding
    at::Tensor flat = cell_TK.reshape({-1});
    counts_LDE_[layer].view({-1}).scatter_add_(0, flat, at::ones_like(flat));
    if (!kept_TK.defined()) return;
    at::Tensor lost_TK = kept_TK.lt(0).logical_and(domain_T.ge(0).unsqueeze(-1)).to(at::kLong);
    dropped_LE_[layer].scatter_add_(0, ids_TK.reshape({-1}), lost_TK.reshape({-1}));
}

void Ledger::reduce(const dist::Group& group) {
    group.all_reduce(counts_LDE_);
    group.all_reduce(dropped_LE_);
}
void Ledger::clear() {
    counts_LDE_.zero_();
    dropped_LE_.zero_();
}
at::Tensor Ledger::dropped() const { return dropped_LE_.to(at::kCPU, at::kLong, false, true); }
at::Tensor Ledger::counts_by_domain() const { return counts_LDE_.narrow(1, 1, counts_LDE_.size(1) - 1).to(at::kCPU, at::kLong, false, true).contiguous(); }
at::Tensor Ledger::counts() const { return counts_by_domain().sum(1); }

}  // namespace moe::routing
