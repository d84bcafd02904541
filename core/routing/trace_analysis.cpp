#include "core/routing/trace_analysis.h"

#include "core/base/error.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <span>

namespace moe::routing {
namespace {
constexpr double kNoValue = std::numeric_limits<double>::quiet_NaN();

/// Calls f(place in the chunk, its K experts) for every token that counts.
template <class F> void each_decision(const TraceView& v, int64_t layer, F f) {
    const at::Tensor& experts = v.chunk.layers.at(layer).experts;
    auto* chosen = experts.const_data_ptr<int16_t>();
    size_t K = size_t(experts.size(1));
    for (int64_t n = 0; n < v.size(); ++n)
        if (v.domain()[n] >= 0) f(n, std::span(chosen + size_t(n) * K, K));
}
}  // namespace

DecisionStatistics decision_statistics(const Trace& trace, int64_t layer) {
    trace.check_layer(layer);
    DecisionStatistics s;
    int64_t E = trace.num_experts(), per_group = std::max<int64_t>(1, E / trace.facts().num_groups), num_chosen = 0, num_margins = 0;
    double groups = 0, entropy = 0, margin = 0, changed = 0, dropped = 0;
    at::Tensor probability = at::zeros({E}, at::kDouble);
    bool details = true;
    trace.each([&](const TraceView& v) {
        auto& l = v.chunk.layers.at(layer);
        details = details && l.margin.defined();
        at::Tensor entropies = details ? l.entropy.to(at::kDouble) : at::Tensor(), margins = details ? l.margin.to(at::kDouble) : at::Tensor();
        if (details) probability += l.probability.sum(0);
        std::vector<int64_t> hit;
        each_decision(v, layer, [&](int64_t n, auto chosen) {
            hit.clear();
            for (int16_t e : chosen)
                if (std::find(hit.begin(), hit.end(), e / per_group) == hit.end()) hit.push_back(e / per_group);
            ++s.num_tokens;
            groups += double(hit.size());
            num_chosen += int64_t(chosen.size());
            if (l.dropped.defined()) dropped += l.dropped.template const_data_ptr<uint8_t>()[n];
            if (!details) return;
            entropy += entropies.const_data_ptr<double>()[n];
            changed += l.changed.template const_data_ptr<uint8_t>()[n];
            if (double m = margins.const_data_ptr<double>()[n]; std::isfinite(m)) margin += m, ++num_margins;
        });
        return true;
    });
    double N = double(s.num_tokens);
    details = details && s.num_tokens > 0;
    s.groups_hit = s.num_tokens > 0 ? groups / N : kNoValue;
    s.drop_rate = num_chosen > 0 ? dropped / double(num_chosen) : kNoValue;
    s.token_entropy = details ? entropy / N : kNoValue;
    s.changed_by_bias = details ? changed / double(num_chosen) : kNoValue;
    s.gate_margin = details && num_margins > 0 ? margin / double(num_margins) : kNoValue;
    s.token_information = kNoValue;
    if (details) {
        at::Tensor mean = probability / probability.sum();
        s.token_information = std::max(0.0, at::special_entr(mean).sum().item<double>() - s.token_entropy * std::log(double(E)));
    }
    return s;
}

at::Tensor dead_experts(const Trace& trace, int64_t layer, int64_t window) {
    trace.check_layer(layer);
    std::vector<int64_t> dead;
    std::vector<bool> met(size_t(trace.num_experts()));
    int64_t tokens = 0;
    auto read = [&](const TraceView& v) {
        each_decision(v, layer, [&](int64_t, auto chosen) {
            for (int16_t e : chosen) met[size_t(e)] = true;
            if (++tokens % std::max<int64_t>(1, window)) return;
            dead.push_back(std::count(met.begin(), met.end(), false));
            met.assign(met.size(), false);
        });
        return true;
    };
    trace.each(read);
    MOE_CHECK(window >= 1 && window <= tokens, usage, "trace: window", std::to_string(window), fmt::format("1 to {}, the trace's tokens without padding", tokens), "");
    return at::tensor(dead, at::kLong);
}

at::Tensor coactivation(const Trace& trace, int64_t layer) {
    trace.check_layer(layer);
    int64_t E = trace.num_experts();
    at::Tensor out = at::zeros({E, E}, at::kLong);
    auto* count = out.data_ptr<int64_t>();
    trace.each([&](const TraceView& v) {
        each_decision(v, layer, [&](int64_t, auto chosen) {
            for (int64_t i : chosen)
                for (int64_t j : chosen) ++count[i * E + j];
        });
        return true;
    });
    return out;
}

std::pair<at::Tensor, at::Tensor> flow(const Trace& trace, int64_t from, int64_t to) {
    trace.check_layer(from);
    trace.check_layer(to);
    int64_t E = trace.num_experts();
    at::Tensor out = at::zeros({E, E}, at::kLong), tokens = at::zeros({E}, at::kLong);
    trace.each([&](const TraceView& v) {
        const at::Tensor& next = v.chunk.layers.at(to).experts;
        int64_t K = next.size(1);
        each_decision(v, from, [&](int64_t n, auto chosen) {
            auto* j = next.const_data_ptr<int16_t>() + n * K;
            for (int64_t i : chosen) {
                ++tokens.data_ptr<int64_t>()[i];
                for (int64_t k = 0; k < K; ++k) ++out.data_ptr<int64_t>()[i * E + j[k]];
            }
        });
        return true;
    });
    return {out, tokens};
}

at::Tensor weight_sums(const Trace& trace, int64_t layer) {
    trace.check_layer(layer);
    at::Tensor out = at::zeros({trace.num_experts()}, at::kDouble);
    trace.each([&](const TraceView& v) {
        const at::Tensor& half = v.chunk.layers.at(layer).weights;
        MOE_CHECK(half.defined(), state, "trace: weights", "a trace without them", "one made with weights = true", "");
        at::Tensor weights = half.to(at::kDouble);
        each_decision(v, layer, [&](int64_t n, auto chosen) {
            for (size_t k = 0; k < chosen.size(); ++k) out.data_ptr<double>()[chosen[k]] += weights.const_data_ptr<double>()[size_t(n) * chosen.size() + k];
        });
        return true;
    });
    return out;
}

VocabularyLoad vocabulary_load(const Trace& trace, int64_t layer, int64_t min_count) {
    trace.check_layer(layer);
    std::map<int32_t, std::vector<int64_t>> load;      // the tokens of the id come last
    size_t E = size_t(trace.num_experts());
    trace.each([&](const TraceView& v) {
        each_decision(v, layer, [&](int64_t n, auto chosen) {
            auto& row = load[v.ids()[n]];
            row.resize(E + 1);
            ++row[E];
            for (int16_t e : chosen) ++row[size_t(e)];
        });
        return true;
    });
    VocabularyLoad out;
    std::vector<int64_t> flat;
    for (auto& [id, row] : load) {
        if (row[E] < min_count) continue;
        out.ids.push_back(id);
        out.counts.push_back(row[E]);
        flat.insert(flat.end(), row.begin(), row.end() - 1);
    }
    out.load_VE = at::tensor(flat, at::kLong).view({int64_t(out.ids.size()), int64_t(E)});
    return out;
}

double overlap(const Trace& a, const Trace& b, int64_t layer, at::Tensor* by_expert) {
    MOE_CHECK(a.num_experts() == b.num_experts(), data, "trace: experts of two traces", fmt::format("{} and {}", a.num_experts(), b.num_experts()), "as many in both", "");
    MOE_CHECK(a.num_tokens() == b.num_tokens() && at::equal(a.ids(), b.ids()), data, "trace: tokens of two traces", fmt::format("{} and {} tokens, not the same ids", a.num_tokens(), b.num_tokens()), "the same tokens in the same order",
              "trace both models on the same data");
    at::Tensor of_a = a.experts(layer), of_b = b.experts(layer), domain = b.domain();
    int64_t E = b.num_experts(), Ka = of_a.size(1), Kb = of_b.size(1), tokens = 0, common = 0;
    std::vector<int64_t> mine(static_cast<size_t>(E)), kept(static_cast<size_t>(E));
    for (int64_t n = 0; n < of_b.size(0); ++n) {
        if (domain.const_data_ptr<int32_t>()[n] < 0) continue;
        ++tokens;
        auto *x = of_a.const_data_ptr<int16_t>() + n * Ka, *y = of_b.const_data_ptr<int16_t>() + n * Kb;
        for (int64_t k = 0; k < Kb; ++k) {
            bool same = std::find(x, x + Ka, y[k]) != x + Ka;
            common += same;
            ++mine[size_t(y[k])];
            kept[size_t(y[k])] += same;
        }
    }
    if (by_expert) *by_expert = at::tensor(kept, at::kDouble) / at::tensor(mine, at::kDouble);
    return tokens > 0 ? double(common) / double(tokens * Kb) : kNoValue;
}

}  // namespace moe::routing
