#include "lua/bind/trace.h"

#include "core/metrics/statistics.h"
#include "core/routing/trace_analysis.h"
#include "lua/bind/array.h"
#include "lua/bind/bind.h"

#include <ATen/ATen.h>

#include <algorithm>

namespace moe::lua {
namespace {
routing::Trace& trace(lua_State* L) { return *self<TraceValue>(L).trace; }

std::span<const int64_t> values(const at::Tensor& t) { return {t.const_data_ptr<int64_t>(), size_t(t.numel())}; }

/// Text as one line can show it: "\n" for a line end, "\xE2" for bytes that are not printable ASCII.
std::string visible(const std::string& text) {
    std::string out;
    for (unsigned char c : text) {
        if (c == '\n') out += "\\n";
        else if (c == '\t') out += "\\t";
        else if (c == '\r') out += "\\r";
        else if (c < 32 || c > 126) out += fmt::format("\\x{:02X}", c);
        else out += char(c);
    }
    return out;
}
int64_t layer_option(lua_State* L, const Options& o) {
    if (!o.has("layer")) MOE_THROW(usage, running(L) + ": layer", "nothing", "a routed layer", "tr.layers lists them");
    return o.integer("layer", 0);
}
int64_t expert_option(lua_State* L, const Options& o, const routing::Trace& t) {
    if (!o.has("expert")) MOE_THROW(usage, running(L) + ": expert", "nothing", fmt::format("an expert: 0 … {}", t.num_experts() - 1), "");
    int64_t expert = o.integer("expert", 0);
    t.check_expert(expert);
    return expert;
}

std::string by_option(lua_State* L, const Options& o, std::initializer_list<const char*> known) {
    std::string by = o.string("by", ""), want;
    for (const char* k : known) {
        if (by == k) return by;
        want += '"' + std::string(k) + "\" ";
    }
    if (!by.empty()) MOE_THROW(usage, running(L) + ": by", '"' + by + '"', want + "or nothing", "");
    return by;
}

Dim layer_dim(const routing::Trace& t) { return {"layer", {}, t.layers()}; }
Dim domain_dim(const routing::Trace& t) { return {"domain", t.domains(), {}}; }

int load(lua_State* L) {
    auto& value = self<TraceValue>(L);
    auto& t = *value.trace;
    Options o(L, 2, {"layer", "by", "min_count", "relative"});
    std::string by = by_option(L, o, {"domain", "token"});
    bool relative = o.boolean("relative", false);
    auto finished = [&](at::Tensor counts) { return relative ? counts / counts.to(at::kDouble).mean(-1, true) : counts; };
    const char* name = relative ? "load over the mean" : "tokens";
    if (by == "token") {
        auto v = routing::vocabulary_load(t, layer_option(L, o), o.integer("min_count", 1));
        Dim dim{"token", {}, {}};
        for (int64_t id : v.ids) dim.texts.push_back(token_text(value, id));
        return push_array(L, finished(v.load_VE), name, {dim, {"expert", {}, {}}});
    }
    auto of = [&](int64_t layer) { return finished(by.empty() ? t.load(layer).sum(0) : t.load(layer)); };
    std::vector<Dim> dims = {{"expert", {}, {}}};
    if (!by.empty()) dims.insert(dims.begin(), domain_dim(t));
    if (o.has("layer")) return push_array(L, of(o.integer("layer", 0)), name, dims);
    std::vector<at::Tensor> all;
    for (int64_t layer : t.layers()) all.push_back(of(layer));
    MOE_CHECK(!all.empty(), state, "trace:load", "a trace without layers", "a model with routed layers", "");
    dims.insert(dims.begin(), layer_dim(t));
    return push_array(L, at::stack(all), name, dims);
}

/// Iterator over the list in upvalue 1 of {text, count, id}; upvalue 2 is the position.
int next_token(lua_State* L) {
    lua_Integer i = lua_tointeger(L, upvalue(2)) + 1;
    lua_pushinteger(L, i);
    lua_replace(L, upvalue(2));
    if (lua_rawgeti(L, upvalue(1), i) == LUA_TNIL) return 1;
    for (int k = 1; k <= 3; ++k) lua_rawgeti(L, -k, k);    // the list stays below
    return 3;
}

int tokens(lua_State* L) {
    auto& value = self<TraceValue>(L);
    Options o(L, 2, {"layer", "expert", "top"});
    int64_t layer = layer_option(L, o), expert = expert_option(L, o, *value.trace), top = o.integer("top", 20);
    lua_newtable(L);
    lua_Integer i = 0;
    for (auto [id, count] : value.trace->tokens(layer, expert, top)) {
        lua_createtable(L, 3, 0);
        push_string(L, token_text(value, id));
        lua_rawseti(L, -2, 1);
        lua_pushinteger(L, count);
        lua_rawseti(L, -2, 2);
        lua_pushinteger(L, id);
        lua_rawseti(L, -2, 3);
        lua_rawseti(L, -2, ++i);
    }
    lua_pushinteger(L, 0);
    push_function(L, {"next", next_token, "next token of tr:tokens: text, count, id."}, "trace:tokens.next", 2);
    return 1;
}

int examples(lua_State* L) {
    auto& value = self<TraceValue>(L);
    Options o(L, 2, {"layer", "expert", "count", "width"});
    int64_t layer = layer_option(L, o), expert = expert_option(L, o, *value.trace), width = o.integer("width", 24);
    at::Tensor all = value.trace->ids();
    auto ids = values(all);
    lua_newtable(L);
    lua_Integer i = 0;
    for (int64_t at : value.trace->examples(layer, expert, o.integer("count", 5))) {
        int64_t start = std::max(at - width, value.seq_length > 0 ? at - at % value.seq_length : 0);
        for (int64_t p = at - 1; p >= start; --p) {
            if (ids[size_t(p)] == value.tokenizer->end_of_document()) start = p + 1;
        }
        std::string before = value.tokenizer->decode(ids.subspan(size_t(start), size_t(at - start)));
        push_string(L, visible(before) + "[" + token_text(value, ids[size_t(at)]) + "]");
        lua_rawseti(L, -2, ++i);
    }
    return 1;
}

int mutual_information(lua_State* L) {
    at::Tensor load_DE = trace(L).load(check_integer(L, 2, "layer")).contiguous();
    lua_pushnumber(L, metrics::mutual_information(values(load_DE), load_DE.size(0)));
    return 1;
}

struct Special {
    int64_t layer, expert, domain, tokens;
    double share, lift, rate;
};

/// For each expert with at least `min_count` tokens (negative: a tenth of its layer's mean, 10 at least, but no more than the mean) its domain of highest rate: the share of the domain's choices
/// that come to the expert. The more special first, then the one with more tokens.
std::vector<Special> specialists(const routing::Trace& t, int64_t min_count) {
    std::vector<Special> all;
    for (int64_t layer : t.layers()) {
        at::Tensor load = t.load(layer), rates = load.to(at::kDouble) / load.sum(1, true).clamp_min(1);
        auto rate = rates.accessor<double, 2>();
        auto count = load.accessor<int64_t, 2>();
        double mean = double(load.sum().item<int64_t>()) / double(load.size(1)), fewest = min_count >= 0 ? double(min_count) : std::min(std::max(10.0, mean / 10), mean);
        for (int64_t e = 0; e < load.size(1); ++e) {
            Special s{layer, e, 0, 0, 0, 0, 0};
            double sum = 0;
            for (int64_t d = 0; d < load.size(0); ++d) {
                sum += rate[d][e];
                s.tokens += count[d][e];
                if (rate[d][e] > rate[s.domain][e]) s.domain = d;
            }
            s.rate = rate[s.domain][e];
            s.share = sum > 0 ? s.rate / sum : 0;
            s.lift = s.share * double(load.size(0));
            if (double(s.tokens) >= fewest) all.push_back(s);
        }
    }
    std::stable_sort(all.begin(), all.end(), [](const Special& a, const Special& b) { return a.lift != b.lift ? a.lift > b.lift : a.tokens > b.tokens; });
    return all;
}

int specialization(lua_State* L) {
    auto& t = trace(L);
    Options o(L, 2, {"layer", "relative", "min_count"});
    MOE_CHECK(!o.has("layer") || !o.has("min_count"), usage, "trace:specialization", "layer and min_count", "one of them", "with layer it is an array of all its experts");
    if (o.has("layer")) {
        int64_t layer = o.integer("layer", 0), D = int64_t(t.domains().size()), E = t.num_experts(), K = t.top_k(layer);
        at::Tensor load_DE = t.load(layer).contiguous();
        auto list = metrics::specialisation(values(load_DE), D, K);
        at::Tensor share = at::tensor(list, at::kDouble).view({D, E});
        bool relative = o.boolean("relative", false);
        return push_array(L, relative ? share * (double(E) / double(K)) : share, relative ? "share of the domain's tokens over the uniform share" : "share of the domain's tokens", {domain_dim(t), {"expert", {}, {}}});
    }
    lua_newtable(L);
    lua_Integer i = 0;
    int64_t min_count = o.integer("min_count", -1);
    MOE_CHECK(min_count >= 0 || !o.has("min_count"), usage, "trace:specialization: min_count", std::to_string(min_count), "0 or more", "");
    for (const Special& s : specialists(t, min_count)) {
        push_ordered_table(L, {"layer", "expert", "domain", "tokens", "share", "lift", "rate"});
        auto set_integer = [&](const char* name, int64_t v) { lua_pushinteger(L, v), lua_setfield(L, -2, name); };
        auto set_number = [&](const char* name, double v) { lua_pushnumber(L, v), lua_setfield(L, -2, name); };
        set_integer("layer", s.layer);
        set_integer("expert", s.expert);
        set_integer("tokens", s.tokens);
        push_string(L, t.domains()[size_t(s.domain)]);
        lua_setfield(L, -2, "domain");
        set_number("share", s.share);
        set_number("rate", s.rate);
        set_number("lift", s.lift);
        lua_rawseti(L, -2, ++i);
    }
    return as_records(L);
}

int field_layers(lua_State* L) {
    push_integers(L, trace(L).layers());
    return 1;
}
int field_domains(lua_State* L) {
    lua_newtable(L);
    lua_Integer i = 0;
    for (auto& name : trace(L).domains()) {
        push_string(L, name);
        lua_rawseti(L, -2, ++i);
    }
    return 1;
}
int field_num_tokens(lua_State* L) { return lua_pushinteger(L, trace(L).num_tokens()), 1; }
int field_num_experts(lua_State* L) { return lua_pushinteger(L, trace(L).num_experts()), 1; }
int field_is_complete(lua_State* L) { return lua_pushboolean(L, trace(L).is_complete()), 1; }
int text(lua_State* L) {
    auto* box = test_box<TraceValue>(L, 1);
    if (!box || !*box) return lua_pushliteral(L, "trace (freed)"), 1;
    auto& t = *(*box)->trace;
    int64_t asked = (*box)->tokens_asked;
    std::string of_asked = asked > 0 && asked != t.num_tokens() ? fmt::format(" in whole batches ({} asked for)", asked) : "";
    push_string(L, fmt::format("trace: {} tokens{}, {} routed layers, {} experts, {} domains", t.num_tokens(), of_asked, t.layers().size(), t.num_experts(), t.domains().size()));
    return 1;
}

int open_file(lua_State* L) {
    std::string path = check_string(L, 1, "path");
    auto t = std::make_shared<routing::Trace>(path);
    push<TraceValue>(L, {t, data::open_tokenizer(t->facts().tokenizer), t->facts().seq_length});
    return 1;
}

const Binding kFunctions[] = {
    {"trace", open_file, "moe.trace(path): a trace that tr:save, or model:trace and run:trace with file =, wrote. Of a file that is longer than memory one piece at a time is in it."},
};
const Binding kOwnMethods[] = {
    {"load", load, "tr:load {layer =, by = \"domain\" | \"token\", relative = false, min_count = 1}: a labelled array of tokens by expert: [domain, expert] or, of the token ids that occur at least min_count times, [token, expert] with by, [expert] without; "
                   "with no layer, [layer, …]. relative: over the mean of the experts, 1 is balance."},
    {"tokens", tokens, "for text, n, id in tr:tokens {layer =, expert =, top = 20} do … end: the tokens that came to an expert most often."},
    {"examples", examples, "tr:examples {layer =, expert =, count = 5, width = 24}: texts of up to `width` tokens that end with a token, in brackets, that came to the expert."},
    {"mutual_information", mutual_information, "tr:mutual_information(layer): of expert and domain, in nats; 0 where the domain says nothing about the expert."},
    {"specialization", specialization,
     "tr:specialization {layer =, relative = false, min_count =}: without layer records of the experts with at least min_count tokens (by default a tenth of the mean, 10 at least), most special first: {layer, expert, domain, tokens, share, lift, rate}. rate: the share of the domain's choices that come to the expert; "
     "share: that over the sum of all domains' rates, so the expert's share of that domain if all were equally long; lift: how many times as much as of an expert that takes all domains alike (share times their number). "
     "With a layer a labelled array [domain, expert] of N_{i,D} / N_D, the share of a domain's tokens that go to an expert (uniform: K / E; relative: over that).\n"
     "Example: print(moe.model(moe.config \"cpu_quick\":with { [\"model.num_layers\"] = 2 }):trace(moe.data(\"synthetic\", { tokens = 256, seq_length = 32, batch_size = 2 })):specialization())"},
};
const Binding kFields[] = {
    {"layers", field_layers, "tr.layers: absolute, 0-based indices of the routed layers."},
    {"domains", field_domains, "tr.domains: names of the domains, in the order of load's rows."},
    {"num_tokens", field_num_tokens, "tr.num_tokens: tokens traced, padding included."},
    {"num_experts", field_num_experts, "tr.num_experts: experts a layer."},
    {"is_complete", field_is_complete, "tr.is_complete: false for a file whose writer did not come to its end; what it wrote is there."},
};
const Binding kMeta[] = {{"__tostring", text, "tostring(tr): one line about it."}};
}  // namespace

std::string token_text(const TraceValue& t, int64_t id) {
    std::string text = t.tokenizer->decode(std::span(&id, 1));
    return text.empty() ? fmt::format("<{}>", id) : visible(text);
}

int64_t layer_argument(lua_State* L, int index, const routing::Trace& t) {
    int64_t layer = check_integer(L, index, "layer");
    t.check_layer(layer);
    return layer;
}

void open_trace(lua_State* L) {
    static const std::vector<Binding> methods = [] {
        std::vector<Binding> all(std::begin(kOwnMethods), std::end(kOwnMethods));
        auto more = trace_analysis_methods();
        all.insert(all.end(), more.begin(), more.end());
        return all;
    }();
    set_functions(L, "moe.", kFunctions);
    register_type<TraceValue>(L, {.name = nullptr, .help = "trace: what the routers did with a set of tokens. model:trace and run:trace make one, moe.trace reads one. Layers and experts are 0-based. Results are labelled arrays (moe.array) and records (moe.records).",
                                  .methods = methods, .fields = kFields, .meta = kMeta});
}
}  // namespace moe::lua
