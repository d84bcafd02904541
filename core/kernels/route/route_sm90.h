// Launchers of route, see route_kernels.h. Letters as in route.h.
#pragma once
#include "core/kernels/common/sm90.h"

namespace moe::kernels::sm90 {
constexpr int kRouteMostExperts = 1024;

struct RoutePass {
    bool fp64;
    int64_t T;
    int E, K, n_group, topk_group;
    bool softmax, norm_topk, best_two, choose;
    double scale, temperature;
    const void* logits;           ///< [T, E]
    const void* bias;             ///< [E] or null
    void* scores;                 ///< [T, E]: written by forward, read by backward
    void* weights;                ///< [T, K]
    int64_t* ids;                 ///< [T, K]: written by forward where `choose`
    const void* dweights;         ///< [T, K] or null
    const void* dscores;          ///< [T, E] or null
    void* dlogits;                ///< [T, E]
};
cudaError_t route_forward(const RoutePass& p, cudaStream_t stream);
cudaError_t route_backward(const RoutePass& p, cudaStream_t stream);

struct CountPairs {
    int64_t pairs;
    int K, E, rows;               ///< rows = D + 1
    const int64_t* ids;
    const int64_t* kept;          ///< or null
    const int* domain;            ///< [T]
    int64_t* counts;              ///< [rows, E]
    int64_t* dropped;             ///< [E], used with kept
};
/// Pairs outside of counts' shape are left out.
cudaError_t count_pairs(const CountPairs& p, cudaStream_t stream);

}  // namespace moe::kernels::sm90
