// The list of interventions: arguments checked, folded into the model's routers, logged, undone, restored.
#include "core/train/interventions.h"

#include "core/base/error.h"
#include "core/base/json.h"
#include "core/base/suggest.h"
#include "core/tensor/check.h"
#include "core/train/compiled_script.h"

#include <ATen/ATen.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>

namespace moe::train {
namespace {
/// Keys of the arguments by kind, what a script writes for it, and whether it is of layers.
struct KindOfIntervention {
    std::vector<std::string> keys;
    const char* written;
    bool of_layers = true;
};
const std::map<std::string, KindOfIntervention>& kinds() {
    static const std::map<std::string, KindOfIntervention> list = {
        {"mask", {{"experts"}, "router:mask"}}, {"unmask", {{"experts"}, "router:unmask"}}, {"ablate", {{"experts"}, "router:ablate"}}, {"override", {{"top_k", "temperature"}, "router:override"}},
        {"offset", {{"values"}, "router:offset"}}, {"freeze", {{}, "router:freeze"}}, {"force", {{"experts", "by_token"}, "router:force"}},
        {"pre_topk", {{"function"}, "router:hook"}}, {"post_topk", {{"function"}, "router:hook"}}, {"score", {{"function"}, "router.score"}}, {"bias", {{"values"}, "router:bias"}},
        {"swap", {{"experts", "gate"}, "router:swap"}}, {"duplicate", {{"from", "to", "gate"}, "router:duplicate"}}, {"reinit", {{"experts", "gate", "seed"}, "router:reinit"}},
        {"lr", {{"value"}, "run.lr", false}}, {"schedule", {{"function"}, "run.schedule", false}}, {"data", {{"function"}, "run.data", false}}, {"optimizer", {{"function"}, "run.optimizer", false}},
        {"balance", {{"kind", "alpha", "scope", "speed", "rule", "function"}, "router.balance", false}}, {"set", {{"changes"}, "run:set", false}},
        {"parameter", {{"name", "value", "hash"}, "model:set", false}},
    };
    return list;
}

std::vector<int64_t> integers(const Values& value, const std::string& op) {
    std::vector<int64_t> list;
    auto add = [&](const Values& v) {
        bool whole = v.is_number_integer() || (v.is_number_float() && std::floor(v.get<double>()) == v.get<double>());
        MOE_CHECK(whole, usage, op, brief(nlohmann::json(v)), "an integer or a list of them", "");
        list.push_back(int64_t(v.get<double>()));
    };
    if (value.is_array()) for (auto& v : value) add(v);
    else if (is_tensor_values(value)) {
        at::Tensor t = tensor_from_values(value).to(at::kLong).view({-1});
        list.assign(t.const_data_ptr<int64_t>(), t.const_data_ptr<int64_t>() + t.numel());
    } else add(value);
    return list;
}

std::vector<double> numbers(const Values& value, const std::string& op, int64_t count) {
    std::vector<double> list;
    if (value.is_number()) list.assign(size_t(count), value.get<double>());
    else if (is_tensor_values(value)) {
        at::Tensor t = tensor_from_values(value).to(at::kDouble).view({-1});
        list.assign(t.const_data_ptr<double>(), t.const_data_ptr<double>() + t.numel());
    } else {
        MOE_CHECK(value.is_array() && std::all_of(value.begin(), value.end(), [](auto& v) { return v.is_number(); }), usage, op, brief(nlohmann::json(value)), "a number, or one for each expert", "");
        list = value.get<std::vector<double>>();
    }
    MOE_CHECK(int64_t(list.size()) == count, shape, op, fmt::format("{} numbers", list.size()), fmt::format("{}, one for each expert", count), "");
    for (double x : list) MOE_CHECK(std::isfinite(x), usage, op, fmt::format("{}", x), "finite numbers", "");
    return list;
}
}  // namespace

struct Interventions::LayerState {
    std::set<int64_t> masked, ablated;
    std::optional<int64_t> top_k;
    std::optional<double> temperature;
    std::vector<double> offset;
    bool frozen = false;
    Values forced;
    at::Tensor forced_ids;
    routing::ScoreFunction score;
    std::vector<routing::PreTopK> pre_topk;
    std::vector<routing::PostTopK> post_topk;
    bool is_plain() const { return masked.empty() && ablated.empty() && !top_k && !temperature && offset.empty() && !frozen && forced.is_null() && !score && pre_topk.empty() && post_topk.empty(); }
};
struct Interventions::Folded {
    std::map<int64_t, routing::Intervention> layers;
    RunControls controls;
    Values shown = Values::object();
};

std::string Interventions::written(const std::string& what) {
    auto kind = kinds().find(what);
    return kind == kinds().end() ? what : kind->second.written;
}

std::vector<int64_t> Interventions::layers_of(const Values& args) const {
    const auto routed = routed_layers();
    MOE_CHECK(!routed.empty(), config, "router", "a model without routed layers", "one with experts", "");
    if (!args.contains("layers")) return routed;
    auto list = integers(args["layers"], "layers");
    MOE_CHECK(!list.empty(), usage, "layers", "an empty list", "at least one", "");
    for (int64_t layer : list) {
        if (std::find(routed.begin(), routed.end(), layer) != routed.end()) continue;
        std::string want;
        for (int64_t r : routed) want += (want.empty() ? "a layer with a router: one of " : ", ") + std::to_string(r);
        MOE_THROW(config, "layer", std::to_string(layer), want, "layers are counted from 0; dense layers have no router");
    }
    std::sort(list.begin(), list.end());
    list.erase(std::unique(list.begin(), list.end()), list.end());
    return list;
}

/// Known keys only, lists where one value stands for one, everything in range.
Values Interventions::canonical(const std::string& what, const Values& given) const {
    auto kind = kinds().find(what);
    std::vector<std::string> names;
    for (auto& [name, _] : kinds()) names.push_back(name);
    MOE_CHECK(kind != kinds().end(), usage, "intervention", '"' + what + '"', "a known kind", did_you_mean(what, names));
    MOE_CHECK(given.is_object() || given.is_null() || given.empty(), usage, kind->second.written, brief(nlohmann::json(given)), "a table of named values", "");
    std::vector<std::string> known = kind->second.keys;
    if (kind->second.of_layers) known.insert(known.end(), {"layer", "layers"});
    if (std::find(known.begin(), known.end(), "experts") != known.end()) known.push_back("expert");
    Values args = Values::object();
    for (auto it = given.begin(); given.is_object() && it != given.end(); ++it) {
        if (std::find(known.begin(), known.end(), it.key()) == known.end()) MOE_THROW(usage, what + ": option", it.key(), fmt::format("one of {}", fmt::join(known, ", ")), did_you_mean(it.key(), known));
        std::string key = it.key() == "layer" ? "layers" : it.key() == "expert" ? "experts" : it.key();
        MOE_CHECK(!args.contains(key), usage, what, key.substr(0, key.size() - 1) + " and " + key, "one of them", "");
        args[key] = it.value();
    }
    if (kind->second.of_layers) args["layers"] = layers_of(args);
    int64_t E = model_.config().model.moe.num_experts;
    auto expert = [&](int64_t e) { MOE_CHECK(e >= 0 && e < E, usage, what + ": expert", std::to_string(e), fmt::format("0 to {}", E - 1), "experts are counted from 0"); };
    auto need = [&](const std::string& key) {
        MOE_CHECK(args.contains(key), usage, what, "no " + key, key == "experts" ? "expert = a number, or experts = {…}" : key + " = …", key == "experts" || key == "from" || key == "to" ? "experts are counted from 0" : "");
    };
    if (args.contains("experts")) {
        args["experts"] = integers(args["experts"], what + ": experts");
        MOE_CHECK(!args["experts"].empty(), usage, what + ": experts", "an empty list", "at least one", "");
        std::set<int64_t> seen;
        for (auto& e : args["experts"]) {
            expert(e);
            MOE_CHECK(seen.insert(e.get<int64_t>()).second, usage, what + ": experts", fmt::format("{} twice", e.get<int64_t>()), "different ones", "");
        }
    } else if (what == "mask" || what == "unmask" || what == "ablate" || what == "swap" || what == "reinit") need("experts");
    if (what == "override") {
        MOE_CHECK(args.contains("top_k") || args.contains("temperature"), usage, what, "nothing", "top_k or temperature", "");
        if (args.contains("top_k")) {
            auto k = integers(args["top_k"], "override: top_k");
            auto& o = model_.router_settings().route;
            int64_t most = E / o.n_group * o.topk_group;
            MOE_CHECK(k.size() == 1 && k[0] >= 1 && k[0] <= most, usage, "override: top_k", brief(nlohmann::json(args["top_k"])), fmt::format("1 to {}", most), "");
            args["top_k"] = k[0];
        }
        if (args.contains("temperature"))
            MOE_CHECK(args["temperature"].is_number() && args["temperature"].get<double>() > 0 && std::isfinite(args["temperature"].get<double>()), usage, "override: temperature", brief(nlohmann::json(args["temperature"])), "a number above 0", "");
    }
    if (what == "offset" || what == "bias") {
        need("values");
        args["values"] = numbers(args["values"], what + ": values", E);
    }
    if (what == "force") {
        MOE_CHECK(args.contains("experts") != args.contains("by_token"), usage, what, args.contains("experts") ? "experts and by_token" : "nothing", "experts, or by_token = a tensor int64 [vocabulary, K]", "");
        if (args.contains("by_token")) {
            MOE_CHECK(is_tensor_values(args["by_token"]), usage, "force: by_token", brief(nlohmann::json(args["by_token"])), "a tensor int64 [vocabulary, K]", "");
            at::Tensor t = tensor_from_values(args["by_token"]);
            int64_t V = model_.config().model.vocab();
            MOE_CHECK(t.dim() == 2 && t.size(0) == V && t.size(1) >= 1 && t.scalar_type() == at::kLong, shape, "force: by_token", describe(t), fmt::format("int64 [{}, K]", V), "");
            expert(t.min().item<int64_t>());
            expert(t.max().item<int64_t>());
            at::Tensor sorted = std::get<0>(t.sort(-1));
            MOE_CHECK(t.size(1) == 1 || !sorted.narrow(1, 1, t.size(1) - 1).eq(sorted.narrow(1, 0, t.size(1) - 1)).any().item<bool>(), usage, "force: by_token", "an expert twice in a row", "different experts for each token", "");
        }
        auto& o = model_.router_settings().route;
        int64_t K = args.contains("experts") ? int64_t(args["experts"].size()) : args["by_token"]["shape"][1].get<int64_t>(), most = E / o.n_group * o.topk_group;
        MOE_CHECK(K <= most, usage, "force: experts", std::to_string(K), fmt::format("at most {} a token", most), "");
    }
    if (what == "swap") MOE_CHECK(args["experts"].size() == 2, usage, "swap: experts", fmt::format("{}", args["experts"].size()), "two", "");
    if (what == "duplicate") {
        need("from"), need("to");
        for (const char* key : {"from", "to"}) {
            auto e = integers(args[key], std::string("duplicate: ") + key);
            MOE_CHECK(e.size() == 1, usage, std::string("duplicate: ") + key, fmt::format("{} experts", e.size()), "one", "");
            expert(e[0]);
            args[key] = e[0];
        }
        MOE_CHECK(args["from"] != args["to"], usage, "duplicate", "from and to are the same", "two experts", "");
    }
    if (args.contains("gate")) MOE_CHECK(args["gate"].is_boolean(), usage, what + ": gate", brief(nlohmann::json(args["gate"])), "true or false", "");
    if (args.contains("seed")) MOE_CHECK(args["seed"].is_number_integer(), usage, what + ": seed", brief(nlohmann::json(args["seed"])), "an integer", "");
    if (what == "lr") {
        need("value");
        bool fine = args["value"].is_null() || (args["value"].is_number() && std::isfinite(args["value"].get<double>()) && args["value"].get<double>() >= 0);
        MOE_CHECK(fine, usage, "run.lr", brief(nlohmann::json(args["value"])), "a number of at least 0, or nil for the schedule's", "");
    }
    if (what == "pre_topk" || what == "post_topk") need("function");
    if (what == "score" || what == "schedule" || what == "data" || what == "optimizer") if (!args.contains("function")) args["function"] = nullptr;
    return args;
}

void Interventions::compile(Item& item) const {
    if (!item.args.contains("function") || item.args["function"].is_null()) return;
    const Values& f = item.args["function"];
    MOE_CHECK(compiler_.pre_topk, state, "intervention: " + item.what, "a function of a script", "a program that can compile it", "resume this run from Lua");
    auto seed = uint64_t(model_.config().seed);
    auto made = std::make_shared<CompiledScript>();
    if (item.what == "pre_topk") made->pre_topk = compiler_.pre_topk(f);
    else if (item.what == "post_topk") made->post_topk = compiler_.post_topk(f);
    else if (item.what == "score") made->score = compiler_.score(f);
    else if (item.what == "schedule") made->schedule = compiler_.schedule(f, seed);
    else if (item.what == "data") made->data = compiler_.data(f, seed);
    else if (item.what == "optimizer") made->optimizer = compiler_.optimizer(f, seed);
    else made->bias_rule = compiler_.bias_rule(f, seed);
    item.script = made;
}

Interventions::Folded Interventions::fold(const std::vector<Item>& items) const {
    std::map<int64_t, LayerState> states;
    Folded out;
    for (const Item& item : items) {
        const Values& a = item.args;
        const CompiledScript none, &script = item.script ? *item.script : none;
        if (item.what == "lr") {
            out.controls.lr = a["value"].is_null() ? std::nullopt : std::optional<double>(a["value"].get<double>());
            out.shown["lr"] = a["value"];
        } else if (item.what == "schedule") out.controls.schedule = script.schedule;
        else if (item.what == "data") out.controls.data = script.data;
        else if (item.what == "optimizer") out.controls.optimizer = script.optimizer;
        else if (item.what == "balance") {
            out.controls.bias_rule = script.bias_rule;
            out.shown["balance"] = a;
        }
        if (!kinds().at(item.what).of_layers) continue;
        for (int64_t layer : a["layers"].get<std::vector<int64_t>>()) {
            LayerState& s = states[layer];
            auto experts = a.value("experts", std::vector<int64_t>());
            if (item.what == "mask") s.masked.insert(experts.begin(), experts.end());
            else if (item.what == "unmask") for (int64_t e : experts) s.masked.erase(e);
            else if (item.what == "ablate") s.ablated.insert(experts.begin(), experts.end());
            else if (item.what == "freeze") s.frozen = true;
            else if (item.what == "score") s.score = script.score;
            else if (item.what == "pre_topk") s.pre_topk.push_back(script.pre_topk);
            else if (item.what == "post_topk") s.post_topk.push_back(script.post_topk);
            else if (item.what == "override") {
                if (a.contains("top_k")) s.top_k = a["top_k"].get<int64_t>();
                if (a.contains("temperature")) s.temperature = a["temperature"].get<double>();
            } else if (item.what == "offset") {
                auto values = a["values"].get<std::vector<double>>();
                s.offset.resize(values.size());
                for (size_t e = 0; e < values.size(); ++e) s.offset[e] += values[e];
            } else if (item.what == "force") {
                s.forced = a.contains("experts") ? a["experts"] : Values("by token");
                s.forced_ids = a.contains("experts") ? at::tensor(experts, at::kLong) : tensor_from_values(a["by_token"]);
            }
        }
    }
    int64_t E = model_.config().model.moe.num_experts;
    for (auto& [layer, s] : states) {
        if (s.is_plain()) continue;
        routing::Intervention x;
        x.settings = model_.router_settings();
        if (s.top_k) x.settings.route.top_k = *s.top_k;
        if (s.temperature) x.settings.route.temperature = *s.temperature;
        std::vector<bool> masked(static_cast<size_t>(E));
        for (int64_t e : s.masked) masked[size_t(e)] = true;
        // What is forced takes no notice of masks.
        if (!s.masked.empty() && s.forced.is_null()) routing::check_enough_experts(masked, x.settings, layer);
        if (!s.masked.empty() || !s.offset.empty()) {
            std::vector<double> bias = s.offset.empty() ? std::vector<double>(size_t(E)) : s.offset;
            for (int64_t e : s.masked) bias[size_t(e)] = -std::numeric_limits<double>::infinity();
            x.bias_E = at::tensor(bias, at::kDouble).to(model_.options().device, model_.options().precision.master);
        }
        if (!s.ablated.empty()) {
            x.kept_E = at::ones({E}, at::kDouble);
            for (int64_t e : s.ablated) x.kept_E[e] = 0;
            x.kept_E = x.kept_E.to(model_.options().device, model_.options().precision.master);
        }
        if (s.forced_ids.defined()) {
            x.forced = s.forced_ids.to(model_.options().device);
            x.settings.route.top_k = s.forced_ids.size(-1);
        }
        x.bias_frozen = s.frozen;
        x.score = s.score;
        x.pre_topk = s.pre_topk;
        if (compiler_.failures) x.keep = [failures = compiler_.failures] { return failures->keep(); };
        x.post_topk = s.post_topk;
        out.layers[layer] = std::move(x);
        std::string key = std::to_string(layer);
        auto show = [&](const char* what, const Values& value) { out.shown[what][key] = value; };
        if (!s.masked.empty()) show("mask", s.masked), show("unmask", s.masked);
        if (!s.ablated.empty()) show("ablate", s.ablated);
        if (s.top_k || s.temperature) show("override", {{"top_k", s.top_k ? Values(*s.top_k) : Values()}, {"temperature", s.temperature ? Values(*s.temperature) : Values()}});
        if (!s.offset.empty()) show("offset", s.offset);
        if (s.frozen) show("freeze", true);
        if (!s.forced.is_null()) show("force", s.forced);
        if (s.score) show("score", true);
        if (!s.pre_topk.empty()) show("pre_topk", s.pre_topk.size());
        if (!s.post_topk.empty()) show("post_topk", s.post_topk.size());
    }
    return out;
}

void Interventions::take(Folded folded) {
    model_.set_interventions(std::move(folded.layers));
    controls_ = std::move(folded.controls);
    shown_ = std::move(folded.shown);
}

void Interventions::refold() { take(fold(items_)); }

/// What is in force of a kind, in the layers that args name.
Values Interventions::shown(const std::string& what, const Values& args) const {
    if (!shown_.contains(what)) return nullptr;
    const Values& all = shown_[what];
    if (!kinds().at(what).of_layers) return all;
    Values out = Values::object();
    for (auto& layer : args["layers"])
        if (std::string key = std::to_string(layer.get<int64_t>()); all.contains(key)) out[key] = all[key];
    if (out.empty()) return nullptr;
    return out;
}

Change Interventions::apply(const std::string& what, const Values& given, int64_t step) {
    if (what == "parameter") {
        MOE_CHECK(given.contains("value"), state, "parameter " + given.value("name", "?"), "a value that was logged as its hash alone", "a stored one", "values of more than 1 MiB are not kept with the events");
        return set_parameter(given.at("name"), tensor_from_values(given.at("value")), step);
    }
    Item item{next_id_, step, what, canonical(what, given), {}};
    compile(item);
    return append(std::move(item), {});
}

Change Interventions::append(Item item, const at::Tensor& parameter) {
    Change change{item.id, item.what, shown(item.what, item.args), {}};
    auto items = items_;
    items.push_back(item);
    Folded folded = fold(items);          // throws before anything has changed
    check_act(item);
    bool is_of_keys = item.what == "set" || item.what == "balance";
    if (is_of_keys) {
        change.before = act_on_keys(item);
        folded = fold(items);             // of the new configuration
    } else {
        if (item.what == "bias") change.before = biases(item.args["layers"]);
        contents_.move(placement(items_), placement(items), item.id, maker(item, parameter));
    }
    items_ = std::move(items);
    take(std::move(folded));
    ++next_id_;
    change.after = item.what == "set" ? item.args["changes"] : item.what == "bias" ? item.args["values"] : shown(item.what, item.args);
    return change;
}

bool Interventions::is_active(int64_t id) const {
    return std::any_of(items_.begin(), items_.end(), [&](auto& item) { return item.id == id; });
}

Change Interventions::undo(int64_t id) {
    auto it = std::find_if(items_.begin(), items_.end(), [&](auto& item) { return item.id == id; });
    MOE_CHECK(it != items_.end(), state, "undo", fmt::format("intervention {}, which is not in force", id), "one that is", "it was undone before, or the run went back to a checkpoint from before it");
    Item item = *it;
    auto items = items_;
    items.erase(items.begin() + (it - items_.begin()));
    Change change{id, item.what, item.args.contains("changes") ? item.args["changes"] : shown(item.what, item.args), {}};
    Folded folded = fold(items);
    if (item.what == "set" || item.what == "balance") {
        change.after = undo_keys(item, items);
        folded = fold(items);
    } else {
        contents_.move(placement(items_), placement(items), items.empty() ? id : items.back().id);
        contents_.forget(id);
    }
    items_ = std::move(items);
    take(std::move(folded));
    if (item.what == "bias") change.after = biases(item.args["layers"]);
    else if (change.after.is_null()) change.after = shown(item.what, item.args);
    return change;
}

nlohmann::json Interventions::state() const {
    nlohmann::json list = nlohmann::json::array();
    for (const Item& item : items_) {
        Values args = item.args;
        if (item.what == "parameter") args.erase("value");             // the events have it, the weights are it
        list.push_back({{"id", item.id}, {"step", item.step}, {"what", item.what}, {"args", args}});
    }
    return {{"next_id", next_id_}, {"items", list}, {"base", base_}, {"displaced", contents_.state()}};
}

std::vector<std::string> Interventions::restore(const nlohmann::json& state) {
    std::vector<std::string> lost;
    std::vector<Item> items;
    for (const auto& saved : state.at("items")) {
        Item item{saved.at("id"), saved.at("step"), saved.at("what"), Values(saved.at("args")), {}};
        if (item.args.contains("function") && !item.args["function"].is_null() && compiler_.is_stored && !compiler_.is_stored(item.args["function"])) {
            lost.push_back(text(item.what, item.args));
            continue;
        }
        compile(item);
        items.push_back(std::move(item));
    }
    Folded folded = fold(items);
    items_ = std::move(items);
    base_ = state.value("base", Values::object());
    contents_.restore(state.value("displaced", nlohmann::json::object()));
    next_id_ = state.at("next_id");
    take(std::move(folded));
    return lost;
}

std::string Interventions::text(const std::string& what, const Values& args) {
    std::string out = what;
    for (auto it = args.begin(); it != args.end(); ++it) {
        if (it.key() == "function") {
            if (it.value().is_object() && it.value().contains("name")) out += " " + it.value()["name"].get<std::string>();
        } else if (is_tensor_values(it.value())) out += fmt::format(" {} {}{}", it.key(), it.value()["dtype"].get<std::string>(), it.value()["shape"].dump());
        else if (it.value().is_string()) out += " " + it.key() + " " + it.value().get<std::string>();
        else out += " " + it.key() + " " + brief(nlohmann::json(it.value()), 60);
    }
    return out;
}

}  // namespace moe::train
