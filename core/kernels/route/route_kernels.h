// Raw entry points of route: contiguous tensors of one device, outputs made by the caller.
#pragma once
#include "core/kernels/route/route.h"

namespace moe::kernels {

/// Fills scores and weights; also ids where `choose`, else reads them. bias in the logits' dtype or undefined.
void route_forward_cpu(const Tensor& logits_TE, const Tensor& bias_E, const RouteOptions& options, bool choose, Route out);
void route_forward_cuda(const Tensor& logits_TE, const Tensor& bias_E, const RouteOptions& options, bool choose, Route out);

/// dlogits [T, E] from the gradients of weights and scores, each of which may be undefined: 0.
void route_backward_cpu(const Route& saved, const Tensor& dweights_TK, const Tensor& dscores_TE, const RouteOptions& options, Tensor dlogits_TE);
void route_backward_cuda(const Route& saved, const Tensor& dweights_TK, const Tensor& dscores_TE, const RouteOptions& options, Tensor dlogits_TE);

void count_pairs_cpu(const Tensor& ids_TK, const Tensor& domain_T, const Tensor& kept_TK, Tensor counts_DE, Tensor dropped_E);
void count_pairs_cuda(const Tensor& ids_TK, const Tensor& domain_T, const Tensor& kept_TK, Tensor counts_DE, Tensor dropped_E);

}  // namespace moe::kernels
