#include "core/routing/ledger.h"

#include "core/base/error.h"
#include "core/kernels/route/route.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

namespace moe::routing {

Ledger::Ledger(int64_t num_layers, int64_t num_experts, int64_t num_domains, at::Device device)
    : counts_LDE_(at::zeros({num_layers, num_domains + 1, num_experts}, at::TensorOptions().dtype(at::kLong).device(device))),
      dropped_LE_(at::zeros({num_layers, num_experts}, counts_LDE_.options())) {}

void Ledger::count(int64_t layer, const at::Tensor& ids_TK, const at::Tensor& domain_T, const at::Tensor& kept_TK) {
    at::NoGradGuard no_grad;
    MOE_CHECK(layer >= 0 && layer < counts_LDE_.size(0), internal, "ledger: layer", std::to_string(layer), fmt::format("0 to {}", counts_LDE_.size(0) - 1), "");
    kernels::count_pairs(ids_TK, domain_T, kept_TK, counts_LDE_[layer], dropped_LE_[layer]);
}

void Ledger::reduce(const dist::Group& group) {
    group.all_reduce(counts_LDE_);
    group.all_reduce(dropped_LE_);
}
void Ledger::clear() {
    counts_LDE_.zero_();
    dropped_LE_.zero_();
}
at::Tensor Ledger::dropped() const { return dropped_LE_.clone(); }
at::Tensor Ledger::counts_by_domain() const { return counts_LDE_.narrow(1, 1, counts_LDE_.size(1) - 1).clone(at::MemoryFormat::Contiguous); }
at::Tensor Ledger::counts() const { return counts_by_domain().sum(1); }

}  // namespace moe::routing
