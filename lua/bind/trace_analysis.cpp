// Methods of traces that analyse: statistics, co-activation, flow, vocabulary, comparison.
#include "core/metrics/statistics.h"
#include "core/routing/trace_analysis.h"
#include "lua/bind/array.h"
#include "lua/bind/ranks.h"
#include "lua/bind/trace.h"

#include <ATen/ATen.h>

#include <algorithm>

namespace moe::lua {
namespace {
using routing::Trace;
const Trace& trace_self(lua_State* L) { return *self<TraceValue>(L).trace; }
std::span<const int64_t> span_of(const at::Tensor& t) { return {t.const_data_ptr<int64_t>(), size_t(t.numel())}; }
const Dim kExpert{"expert", {}, {}};

/// The row on the stack's top.
struct Row {
    lua_State* L;
    void integer(const char* name, int64_t v) const { lua_pushinteger(L, v), lua_setfield(L, -2, name); }
    void number(const char* name, double v) const { lua_pushnumber(L, v), lua_setfield(L, -2, name); }
    void text(const char* name, const std::string& v) const { push_string(L, v), lua_setfield(L, -2, name); }
};

int statistics(lua_State* L) {
    auto& t = trace_self(L);
    lua_newtable(L);
    lua_Integer i = 0;
    for (int64_t layer : t.layers()) {
        at::Tensor load_DE = t.load(layer).contiguous(), load_E = load_DE.sum(0).contiguous();
        auto s = metrics::load_statistics(span_of(load_E));
        auto d = routing::decision_statistics(t, layer);
        push_ordered_table(L, {"layer", "max_vio", "min_vio", "avg_vio", "normalised_entropy", "effective_experts", "variation", "num_dead", "domain_information", "token_entropy", "token_information", "groups_hit",
                               "gate_margin", "changed_by_bias", "drop_rate", "tokens"});
        Row row{L};
        row.integer("layer", layer);
        row.number("max_vio", s.max_vio);
        row.number("min_vio", s.min_vio);
        row.number("avg_vio", s.avg_vio);
        row.number("normalised_entropy", s.normalised_entropy);
        row.number("effective_experts", s.effective_experts);
        row.number("variation", s.variation);
        row.integer("num_dead", s.num_dead);
        row.number("domain_information", metrics::mutual_information(span_of(load_DE), load_DE.size(0)));
        row.number("token_entropy", d.token_entropy);
        row.number("token_information", d.token_information);
        row.number("groups_hit", d.groups_hit);
        row.number("gate_margin", d.gate_margin);
        row.number("changed_by_bias", d.changed_by_bias);
        row.number("drop_rate", d.drop_rate);
        row.integer("tokens", d.num_tokens);
        lua_rawseti(L, -2, ++i);
    }
    return as_records(L);
}

int dead(lua_State* L) {
    auto& t = trace_self(L);
    Options o(L, 2, {"window", "layer", "relative"});
    if (!o.has("window")) MOE_THROW(usage, "trace:dead: window", "nothing", "a number of tokens", "tr:statistics() counts over all of them");
    int64_t window = o.integer("window", 0), E = t.num_experts();
    std::vector<int64_t> layers = o.has("layer") ? std::vector<int64_t>{o.integer("layer", 0)} : t.layers();
    std::vector<at::Tensor> all;
    for (int64_t layer : layers) all.push_back(routing::dead_experts(t, layer, window));
    MOE_CHECK(!all.empty(), state, "trace:dead", "a trace without layers", "a model with routed layers", "");
    bool relative = o.boolean("relative", false);
    at::Tensor counts = o.has("layer") ? all[0] : at::stack(all);
    std::vector<Dim> dims = {{"window", {}, {}}};
    if (!o.has("layer")) dims.insert(dims.begin(), {"layer", {}, layers});
    return push_array(L, relative ? counts.to(at::kDouble) / double(E) : counts, relative ? "share of the experts without a token" : "experts without a token", dims);
}

int coactivation_of(lua_State* L) {
    auto& t = trace_self(L);
    at::Tensor pairs = routing::coactivation(t, layer_argument(L, 2, t)).to(at::kDouble);
    at::Tensor shares = pairs / pairs.diagonal().clamp_min(1).unsqueeze(1);
    shares.diagonal().zero_();                            // an expert is with itself always: no pair
    return push_array(L, shares, "share of the expert's tokens", {kExpert, {"other", {}, {}}});
}

int flow_of(lua_State* L) {
    auto& t = trace_self(L);
    int64_t from = layer_argument(L, 2, t), to = 0;
    if (lua_isnoneornil(L, 3)) {
        auto layers = t.layers();
        auto next = std::find(layers.begin(), layers.end(), from) + 1;
        MOE_CHECK(next != layers.end(), usage, "trace:flow: layer", std::to_string(from), "a layer with a routed one after it", "tr:flow(layer, next) names both");
        to = *next;
    } else {
        to = layer_argument(L, 3, t);
    }
    auto [pairs, tokens] = routing::flow(t, from, to);
    return push_array(L, pairs.to(at::kDouble) / tokens.to(at::kDouble).unsqueeze(1), fmt::format("share of the tokens of an expert of layer {} that go to one of layer {}", from, to), {{fmt::format("layer_{}", from), {}, {}}, {fmt::format("layer_{}{}", to, from == to ? "_again" : ""), {}, {}}});
}

int mean_weights(lua_State* L) {
    auto& t = trace_self(L);
    std::vector<at::Tensor> all;
    for (int64_t layer : t.layers()) all.push_back(routing::weight_sums(t, layer) / t.load(layer).sum(0).to(at::kDouble));
    return push_array(L, at::stack(all), "mean weight", {{"layer", {}, t.layers()}, kExpert});
}

int vocabulary(lua_State* L) {
    auto& value = self<TraceValue>(L);
    Options o(L, 2, {"layer", "top", "min_count"});
    MOE_CHECK(o.has("layer"), usage, "trace:vocabulary: layer", "nothing", "a routed layer", "tr.layers lists them");
    int64_t top = o.integer("top", 5);
    auto v = routing::vocabulary_load(*value.trace, o.integer("layer", 0), o.integer("min_count", 10));
    lua_newtable(L);
    lua_Integer i = 0;
    auto* load = v.load_VE.const_data_ptr<int64_t>();
    int64_t E = value.trace->num_experts();
    for (int64_t e = 0; e < E; ++e) {
        std::vector<size_t> order;
        auto share = [&](size_t k) { return double(load[int64_t(k) * E + e]) / double(v.counts[k]); };
        for (size_t k = 0; k < v.ids.size(); ++k)
            if (load[int64_t(k) * E + e] > 0) order.push_back(k);
        std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return share(a) > share(b); });
        if (int64_t(order.size()) > top) order.resize(size_t(std::max<int64_t>(0, top)));
        for (size_t k : order) {
            push_ordered_table(L, {"expert", "token", "share", "tokens", "id"});
            Row row{L};
            row.integer("expert", e);
            row.text("token", token_text(value, v.ids[k]));
            row.number("share", share(k));
            row.integer("tokens", v.counts[k]);
            row.integer("id", v.ids[k]);
            lua_rawseti(L, -2, ++i);
        }
    }
    return as_records(L);
}

const Trace& other_trace(lua_State* L) { return *check<TraceValue>(L, 2, "other").trace; }

int saturation(lua_State* L) {
    auto &t = trace_self(L), &other = other_trace(L);
    if (!lua_isnoneornil(L, 3)) {
        at::Tensor by_expert;
        routing::overlap(other, t, layer_argument(L, 3, t), &by_expert);
        return push_array(L, by_expert, "share of the expert's tokens that it had in the other trace", {kExpert});
    }
    std::vector<double> all;
    for (int64_t layer : t.layers()) all.push_back(routing::overlap(other, t, layer));
    return push_array(L, at::tensor(all, at::kDouble), "share of the chosen experts that are the same", {{"layer", {}, t.layers()}});
}

int compare(lua_State* L) {
    auto &t = trace_self(L), &other = other_trace(L);
    MOE_CHECK(t.num_experts() == other.num_experts(), data, "trace:compare: experts", fmt::format("{} and {}", t.num_experts(), other.num_experts()), "as many in both", "");
    bool same_tokens = t.num_tokens() == other.num_tokens() && at::equal(t.ids(), other.ids());
    auto theirs = other.layers();
    lua_newtable(L);
    lua_Integer i = 0;
    for (int64_t layer : t.layers()) {
        if (std::find(theirs.begin(), theirs.end(), layer) == theirs.end()) continue;
        at::Tensor a = t.load(layer).sum(0).contiguous(), b = other.load(layer).sum(0).contiguous();
        push_ordered_table(L, {"layer", "js_divergence", "overlap", "max_vio", "other_max_vio"});
        Row row{L};
        row.integer("layer", layer);
        row.number("js_divergence", metrics::js_divergence(span_of(a), span_of(b)));
        if (same_tokens) row.number("overlap", routing::overlap(other, t, layer));
        row.number("max_vio", metrics::load_statistics(span_of(a)).max_vio);
        row.number("other_max_vio", metrics::load_statistics(span_of(b)).max_vio);
        lua_rawseti(L, -2, ++i);
    }
    return as_records(L);
}

int ids(lua_State* L) { return push_tensor(L, trace_self(L).ids()); }
int domain(lua_State* L) { return push_tensor(L, trace_self(L).domain()); }
int position(lua_State* L) { return push_tensor(L, trace_self(L).position()); }
int experts(lua_State* L) { return push_tensor(L, trace_self(L).experts(layer_argument(L, 2, trace_self(L))).to(at::kLong)); }
int weights(lua_State* L) { return push_tensor(L, trace_self(L).weights(layer_argument(L, 2, trace_self(L)))); }
int margin(lua_State* L) { return push_tensor(L, trace_self(L).margin(layer_argument(L, 2, trace_self(L)))); }

int dropped(lua_State* L) { return push_tensor(L, trace_self(L).dropped(layer_argument(L, 2, trace_self(L))).to(at::kLong)); }

int save_trace(lua_State* L) {
    std::string path = check_string(L, 2, "path");
    // Through the session's meeting: the world may be busy with a job's training.
    from_rank_0(L, running(L), [&] { return trace_self(L).save(path), std::string(); });
    lua_settop(L, 1);
    return 1;
}

const Binding kAnalyses[] = {
    {"statistics", statistics,
     "tr:statistics(): records, one a layer, over all traced tokens: max_vio, min_vio, avg_vio (load against its mean), normalised_entropy, effective_experts, variation, num_dead; domain_information (of expert and domain, nats); token_entropy (mean of H(p_t) / ln E), "
     "token_information (H(mean p) − mean H(p), nats), groups_hit (groups a token), gate_margin (mean score of the K-th expert minus the next one's), changed_by_bias (share of the chosen that the bias brought), drop_rate (share of the chosen that capacity dropped)."},
    {"dead", dead, "tr:dead {window =, layer =, relative = false}: a labelled array [layer, window], with a layer [window], of how many experts got nothing (relative: their share) in each run of `window` tokens, one after the other; padding does not count, and tokens after the last whole window are left out."},
    {"coactivation", coactivation_of, "tr:coactivation(layer): a labelled array [expert, other] of N_ij / N_i, over all pairs of a token's experts: the share of the expert's tokens that the other one has, too. 0 on the diagonal, since an expert is no pair, and in the row of an expert without tokens; the other rows add up to K − 1."},
    {"flow", flow_of, "tr:flow(layer, next): a labelled array of P(j in next | i in layer): the share of the tokens of expert i that go to expert j of the next routed layer, or of `next`; a row adds up to K."},
    {"mean_weights", mean_weights, "tr:mean_weights(): a labelled array [layer, expert] of the mean gate weight of an expert's tokens."},
    {"vocabulary", vocabulary, "tr:vocabulary {layer =, top = 5, min_count = 10}: records {expert, token, share, tokens, id}: for each expert the token ids of which it gets the largest share (N_{i,x} / N_x), among those that occur min_count times."},
    {"saturation", saturation, "tr:saturation(other, layer): of two traces of the same tokens, say of two checkpoints, the share |E_t ∩ E_t'| / K of a token's experts that are the same: a labelled array [layer], or with a layer [expert]."},
    {"compare", compare, "tr:compare(other): records, one a layer: js_divergence of the loads (nats, 0 to ln 2), overlap (of the chosen experts, where the tokens are the same), max_vio and other_max_vio."},
    {"ids", ids, "tr:ids(): token ids, int64 [token]."},
    {"domain", domain, "tr:domain(): index into tr.domains, int32 [token]; −1 is padding, which counts nowhere."},
    {"position", position, "tr:position(): place in the sequence, int32 [token]."},
    {"experts", experts, "tr:experts(layer): chosen experts, int64 [token, choice]."},
    {"weights", weights, "tr:weights(layer): gate weights of the chosen, kept in fp16, float32 [token, choice]."},
    {"margin", margin, "tr:margin(layer): selection score of the K-th expert minus the next one's, kept in fp16, float32 [token]."},
    {"dropped", dropped, "tr:dropped(layer): how many of a token's experts were over their capacity and dropped it, int64 [token]; 0 without model.moe.capacity_factor."},
    {"save", on_all_ranks<save_trace>, "tr:save(path): writes everything to a file that moe.trace reads; of several ranks, which all call it, rank 0 does. Returns tr."},
};
}  // namespace

std::span<const Binding> trace_analysis_methods() { return kAnalyses; }

}  // namespace moe::lua
