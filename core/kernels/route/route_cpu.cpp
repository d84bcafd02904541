#include "core/kernels/route/route_kernels.h"

#include "core/kernels/common/dtype.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

namespace moe::kernels {
namespace {
constexpr int64_t kTokensAtATime = 128;

/// Whether choice a of expert i goes before choice b of expert j: NaN, then the larger, then the lower id.
template <class T> bool before(T a, int64_t i, T b, int64_t j) {
    if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && (!std::isnan(b) || i < j);
    return a > b || (a == b && i < j);
}

template <class T> void scores_of(const T* logits, const RouteOptions& o, int64_t E, T* scores) {
    const T factor = T(1 / o.temperature);
    if (!o.softmax) {
        for (int64_t e = 0; e < E; ++e) scores[e] = T(1) / (T(1) + std::exp(-logits[e] * factor));
        return;
    }
    T largest = -std::numeric_limits<T>::infinity(), sum = 0;
    for (int64_t e = 0; e < E; ++e) largest = std::max(largest, logits[e] * factor);
    for (int64_t e = 0; e < E; ++e) sum += scores[e] = std::exp(logits[e] * factor - largest);
    for (int64_t e = 0; e < E; ++e) scores[e] /= sum;
}

/// The first K of an order over 0 … n − 1.
template <class Before> void first_of(std::vector<int64_t>& order, int64_t n, int64_t K, Before goes_before) {
    order.resize(size_t(n));
    std::iota(order.begin(), order.end(), 0);
    std::partial_sort(order.begin(), order.begin() + K, order.end(), goes_before);
}

/// One token's choice; `choice` is scores + bias and loses the experts of groups that are out.
template <class T> void choose_of(std::vector<T>& choice, const RouteOptions& o, std::vector<int64_t>& order, std::vector<T>& group, int64_t* ids) {
    int64_t E = int64_t(choice.size()), G = o.n_group, per = E / G;
    if (G > 1) {
        group.resize(size_t(G));
        for (int64_t g = 0; g < G; ++g) {
            const T* c = choice.data() + g * per;
            first_of(order, per, std::min<int64_t>(2, per), [&](int64_t i, int64_t j) { return before(c[i], i, c[j], j); });
            group[size_t(g)] = o.best_two && per > 1 ? c[order[0]] + c[order[1]] : c[order[0]];
        }
        first_of(order, G, o.topk_group, [&](int64_t i, int64_t j) { return before(group[size_t(i)], i, group[size_t(j)], j); });
        for (auto g = order.begin() + o.topk_group; g != order.end(); ++g) std::fill_n(choice.begin() + *g * per, per, -std::numeric_limits<T>::infinity());
    }
    first_of(order, E, o.top_k, [&](int64_t i, int64_t j) { return before(choice[size_t(i)], i, choice[size_t(j)], j); });
    std::copy_n(order.begin(), o.top_k, ids);
}
}  // namespace

void route_forward_cpu(const Tensor& logits_TE, const Tensor& bias_E, const RouteOptions& o, bool choose, Route out) {
    int64_t T_ = logits_TE.size(0), E = logits_TE.size(1), K = o.top_k;
    by_wide_dtype("route", logits_TE, [&](auto zero) {
        using T = decltype(zero);
        auto *logits = data<T>(logits_TE), *bias = data<T>(bias_E);
        auto *scores = mutable_data<T>(out.scores_TE), *weights = mutable_data<T>(out.weights_TK);
        auto* ids = mutable_data<int64_t>(out.ids_TK);
        at::parallel_for(0, T_, kTokensAtATime, [&](int64_t lo, int64_t hi) {
            std::vector<T> choice(static_cast<size_t>(E)), group;
            std::vector<int64_t> order;
            for (int64_t t = lo; t < hi; ++t) {
                T* s = scores + t * E;
                scores_of(logits + t * E, o, E, s);
                if (choose) {
                    for (int64_t e = 0; e < E; ++e) choice[size_t(e)] = bias ? s[e] + bias[e] : s[e];
                    choose_of(choice, o, order, group, ids + t * K);
                }
                T sum = 0, factor = T(o.scale);
                for (int64_t k = 0; k < K; ++k) sum += s[ids[t * K + k]];
                if (o.norm_topk) factor /= sum + T(1e-20);
                for (int64_t k = 0; k < K; ++k) weights[t * K + k] = s[ids[t * K + k]] * factor;
            }
        });
    });
}

/// With s the scores, n = Σ_chosen s + 1e-20: w_k = scale · s_k / n gives ds_k = scale (dw_k − Σ_j dw_j s_j / n) / n.
void route_backward_cpu(const Route& saved, const Tensor& dweights_TK, const Tensor& dscores_TE, const RouteOptions& o, Tensor dlogits_TE) {
    int64_t T_ = saved.scores_TE.size(0), E = saved.scores_TE.size(1), K = o.top_k;
    by_wide_dtype("route", saved.scores_TE, [&](auto zero) {
        using T = decltype(zero);
        auto *scores = data<T>(saved.scores_TE), *dweights = data<T>(dweights_TK), *dscores = data<T>(dscores_TE);
        auto* ids = data<int64_t>(saved.ids_TK);
        auto* dlogits = mutable_data<T>(dlogits_TE);
        const T factor = T(1 / o.temperature);
        at::parallel_for(0, T_, kTokensAtATime, [&](int64_t lo, int64_t hi) {
            std::vector<T> ds(static_cast<size_t>(E));
            for (int64_t t = lo; t < hi; ++t) {
                const T* s = scores + t * E;
                if (dscores) std::copy_n(dscores + t * E, E, ds.begin());
                else std::fill(ds.begin(), ds.end(), T(0));
                T n = T(1e-20), inner = 0;
                for (int64_t k = 0; dweights && o.norm_topk && k < K; ++k) {
                    n += s[ids[t * K + k]];
                    inner += dweights[t * K + k] * s[ids[t * K + k]];
                }
                for (int64_t k = 0; dweights && k < K; ++k) {
                    T dw = dweights[t * K + k];
                    ds[size_t(ids[t * K + k])] += T(o.scale) * (o.norm_topk ? (dw - inner / n) / n : dw);
                }
                T* dl = dlogits + t * E;
                if (!o.softmax) {
                    for (int64_t e = 0; e < E; ++e) dl[e] = ds[size_t(e)] * s[e] * (T(1) - s[e]) * factor;
                    continue;
                }
                T dot = 0;
                for (int64_t e = 0; e < E; ++e) dot += ds[size_t(e)] * s[e];
                for (int64_t e = 0; e < E; ++e) dl[e] = s[e] * (ds[size_t(e)] - dot) * factor;
            }
        });
    });
}

void count_pairs_cpu(const Tensor& ids_TK, const Tensor& domain_T, const Tensor& kept_TK, Tensor counts_DE, Tensor dropped_E) {
    int64_t K = ids_TK.size(1), E = counts_DE.size(1);
    auto *ids = data<int64_t>(ids_TK), *kept = data<int64_t>(kept_TK);
    auto* domain = data<int32_t>(domain_T);
    auto *counts = mutable_data<int64_t>(counts_DE), *dropped = mutable_data<int64_t>(dropped_E);
    for (int64_t p = 0; p < ids_TK.numel(); ++p) {
        int64_t row = domain[p / K] + 1;
        MOE_CHECK(ids[p] >= 0 && ids[p] < E && row >= 0 && row < counts_DE.size(0), shape, "count_pairs", fmt::format("expert {}, domain {}", ids[p], row - 1),
                  fmt::format("0 to {} and -1 to {}", E - 1, counts_DE.size(0) - 2), "");
        ++counts[row * E + ids[p]];
        if (kept && kept[p] < 0 && row > 0) ++dropped[ids[p]];
    }
}
}  // namespace moe::kernels
