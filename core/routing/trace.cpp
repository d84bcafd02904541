#include "core/routing/trace.h"

#include "core/base/error.h"

#include <fmt/ranges.h>

#include <ATen/ATen.h>

#include <algorithm>

namespace moe::routing {

void Trace::begin(const at::Tensor& ids_T, const at::Tensor& domain_T) {
    int64_t highest = domain_T.numel() ? domain_T.max().item<int32_t>() : -1;
    MOE_CHECK(highest < int64_t(domains_.size()), data, "trace: domain", std::to_string(highest), fmt::format("a label below {}", domains_.size()), "");
    ids_.push_back(ids_T.to(at::kCPU));
    domain_.push_back(domain_T.to(at::kCPU));
}

void Trace::add(int64_t layer, const at::Tensor& ids_TK) {
    MOE_CHECK(!ids_.empty() && ids_.back().size(0) == ids_TK.size(0), internal, "trace: tokens", std::to_string(ids_TK.size(0)), "as many as the last begin()", "");
    experts_[layer].push_back(ids_TK.to(at::kCPU, at::kShort));
}

/// Parts become one tensor when somebody looks.
const at::Tensor& Trace::joined(std::vector<at::Tensor>& parts) const {
    MOE_CHECK(!parts.empty(), state, "trace", "no tokens", "a trace with tokens", "evaluate with this trace first");
    if (parts.size() > 1) parts = {at::cat(parts)};
    return parts[0];
}

int64_t Trace::num_tokens() const { return ids_.empty() ? 0 : ids().size(0); }
at::Tensor Trace::ids() const { return joined(ids_); }
at::Tensor Trace::domain() const { return joined(domain_); }

std::vector<int64_t> Trace::layers() const {
    std::vector<int64_t> out;
    for (auto& [layer, parts] : experts_) out.push_back(layer);
    return out;
}

at::Tensor Trace::experts(int64_t layer) const {
    auto it = experts_.find(layer);
    MOE_CHECK(it != experts_.end(), config, "trace: layer", std::to_string(layer), fmt::format("a routed layer: one of {}", fmt::join(layers(), ", ")), "layers are counted from 0; dense layers have no router");
    return joined(it->second);
}

at::Tensor Trace::load(int64_t layer) const {
    at::Tensor experts_NK = experts(layer), domain_N = domain(), out = at::zeros({int64_t(domains_.size()), num_experts_}, at::kLong);
    auto* expert = experts_NK.const_data_ptr<int16_t>();
    auto* domain = domain_N.const_data_ptr<int32_t>();
    auto* count = out.data_ptr<int64_t>();
    int64_t K = experts_NK.size(1);
    for (int64_t n = 0; n < domain_N.size(0); ++n)
        for (int64_t k = 0; domain[n] >= 0 && k < K; ++k) ++count[domain[n] * num_experts_ + expert[n * K + k]];
    return out;
}

namespace {
/// Calls f with the position of every token that counts and came to the expert.
template <class F> void each_position(const at::Tensor& experts_NK, const at::Tensor& domain_N, int64_t expert, F f) {
    auto* chosen = experts_NK.const_data_ptr<int16_t>();
    auto* domain = domain_N.const_data_ptr<int32_t>();
    int64_t K = experts_NK.size(1);
    for (int64_t n = 0; n < domain_N.size(0); ++n)
        if (domain[n] >= 0 && std::find(chosen + n * K, chosen + (n + 1) * K, int16_t(expert)) != chosen + (n + 1) * K) f(n);
}
}  // namespace

std::vector<std::pair<int64_t, int64_t>> Trace::tokens(int64_t layer, int64_t expert, int64_t top) const {
    MOE_CHECK(expert >= 0 && expert < num_experts_, config, "trace: expert", std::to_string(expert), fmt::format("0 to {}", num_experts_ - 1), "experts are counted from 0");
    std::map<int64_t, int64_t> count;
    at::Tensor all = ids();
    auto* id = all.const_data_ptr<int64_t>();
    each_position(experts(layer), domain(), expert, [&](int64_t n) { ++count[id[n]]; });
    std::vector<std::pair<int64_t, int64_t>> out(count.begin(), count.end());
    std::stable_sort(out.begin(), out.end(), [](auto& a, auto& b) { return a.second > b.second; });
    if (int64_t(out.size()) > top) out.resize(size_t(top));
    return out;
}

std::vector<int64_t> Trace::examples(int64_t layer, int64_t expert, int64_t count) const {
    std::vector<int64_t> all, out;
    each_position(experts(layer), domain(), expert, [&](int64_t n) { all.push_back(n); });
    int64_t n = std::min<int64_t>(count, int64_t(all.size()));
    for (int64_t i = 0; i < n; ++i) out.push_back(all[size_t((2 * i + 1) * int64_t(all.size()) / (2 * n))]);
    return out;
}

}  // namespace moe::routing
