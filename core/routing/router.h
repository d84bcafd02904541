// What a router decides beside the kernel (core/kernels/route): its rule from the configuration, forced balance, capacity.
// Letters: T tokens, E experts, K chosen a token.
#pragma once
#include "core/config/config.h"
#include "core/kernels/route/route.h"

#include <ATen/core/Tensor.h>

#include <optional>

namespace moe::routing {
using at::Tensor;

/// A router's rule, from model.moe.
struct RouterSettings {
    int64_t num_experts = 0;
    kernels::RouteOptions route;
    std::optional<double> capacity_factor;   ///< null: no pair is dropped
    int64_t min_capacity = 4;

    static RouterSettings from(const MoeConfig& config);
};

/// A decision that balances perfectly whatever the scores are, for benchmarks: pair (token, choice) goes to expert
/// (token · K + choice) mod E, the token counted over the whole step from first_token. int64 [T, K].
Tensor forced(int64_t num_tokens, int64_t first_token, const RouterSettings& settings, at::Device device);

/// Pairs that an expert takes of one sequence of S tokens: max(min_capacity, ceil(capacity_factor · S · K / E)).
int64_t capacity(int64_t S, const RouterSettings& settings);

/// ids with −1 for the pairs that are over an expert's capacity. The window is a sequence, so that it depends neither on the
/// micro-batch nor on the layout of ranks; an expert keeps the pairs of the largest weight, of equal ones the earlier. Pairs of
/// padding are all −1 and take no room. ids int64 [B · S, K], weights [B · S, K] (any float dtype), counted bool [B · S].
/// Source: DeepSeek-V2 technical report 2.2.4 (the lowest affinities are dropped).
Tensor drop_over_capacity(const Tensor& ids_TK, const Tensor& weights_TK, const Tensor& counted_T, int64_t S, const RouterSettings& settings);

}  // namespace moe::routing
