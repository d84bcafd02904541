#ifdef MOE_WITH_CUDA
#include "core/kernels/route/route_kernels.h"

#include "core/kernels/common/cuda_check.h"
#include "core/kernels/route/route_sm90.h"

namespace moe::kernels {
namespace {
sm90::RoutePass route_pass(const Route& r, const RouteOptions& o) {
    const int64_t E = r.scores_TE.size(1);
    MOE_CHECK(E <= sm90::kRouteMostExperts, shape, "route: experts on CUDA", std::to_string(E), fmt::format("at most {}", sm90::kRouteMostExperts), "");
    sm90::RoutePass p{};
    p.fp64 = r.scores_TE.scalar_type() == at::kDouble, p.T = r.scores_TE.size(0);
    p.E = int(E), p.K = int(o.top_k), p.n_group = int(o.n_group), p.topk_group = int(o.topk_group);
    p.softmax = o.softmax, p.norm_topk = o.norm_topk, p.best_two = o.best_two, p.scale = o.scale, p.temperature = o.temperature;
    p.scores = out_pointer(r.scores_TE), p.weights = out_pointer(r.weights_TK), p.ids = r.ids_TK.mutable_data_ptr<int64_t>();
    return p;
}
}  // namespace

void route_forward_cuda(const Tensor& logits_TE, const Tensor& bias_E, const RouteOptions& options, bool choose, Route out) {
    OnDevice on(logits_TE);
    auto p = route_pass(out, options);
    p.choose = choose, p.logits = in_pointer(logits_TE), p.bias = in_pointer(bias_E);
    MOE_CUDA_CHECK(sm90::route_forward(p, on.stream));
}

void route_backward_cuda(const Route& saved, const Tensor& dweights_TK, const Tensor& dscores_TE, const RouteOptions& options, Tensor dlogits_TE) {
    OnDevice on(dlogits_TE);
    auto p = route_pass(saved, options);
    p.dweights = in_pointer(dweights_TK), p.dscores = in_pointer(dscores_TE), p.dlogits = out_pointer(dlogits_TE);
    MOE_CUDA_CHECK(sm90::route_backward(p, on.stream));
}

void count_pairs_cuda(const Tensor& ids_TK, const Tensor& domain_T, const Tensor& kept_TK, Tensor counts_DE, Tensor dropped_E) {
    OnDevice on(ids_TK);
    sm90::CountPairs p{};
    p.pairs = ids_TK.numel(), p.K = int(ids_TK.size(1)), p.E = int(counts_DE.size(1)), p.rows = int(counts_DE.size(0));
    p.ids = ids_TK.const_data_ptr<int64_t>(), p.kept = kept_TK.defined() ? kept_TK.const_data_ptr<int64_t>() : nullptr, p.domain = domain_T.const_data_ptr<int>();
    p.counts = counts_DE.mutable_data_ptr<int64_t>(), p.dropped = dropped_E.defined() ? dropped_E.mutable_data_ptr<int64_t>() : nullptr;
    MOE_CUDA_CHECK(sm90::count_pairs(p, on.stream));
}
}  // namespace moe::kernels
#endif
