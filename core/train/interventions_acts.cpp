// Interventions that change values once: keys of the configuration, weights of experts, biases, parameters.
#include "core/base/error.h"
#include "core/base/random.h"
#include "core/tensor/check.h"
#include "core/train/agree.h"
#include "core/train/interventions.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>

namespace moe::train {
namespace {
constexpr const char* kSpeed = "model.moe.bias_update_speed";
constexpr const char* kRule = "model.moe.bias_update_rule";

std::string prefix(int64_t layer) { return fmt::format("model.layers.{}.mlp.", layer); }

std::vector<int64_t> list_of(const Values& args, const char* key) { return args.at(key).get<std::vector<int64_t>>(); }

uint64_t hash_of(const at::Tensor& value) {
    at::Tensor t = value.detach().to(at::kCPU).contiguous();
    return hash_name(std::string_view(static_cast<const char*>(t.const_data_ptr()), size_t(t.nbytes())));
}

bool moves_weights(const std::string& what) { return what == "swap" || what == "duplicate" || what == "reinit" || what == "parameter"; }
}  // namespace

/// Of the whole model, whatever stage they are on.
std::vector<int64_t> Interventions::routed_layers() const {
    const Config& c = model_.config();
    if (model_.mesh().num_stages() == 1) return model_.routed_layers();
    std::vector<int64_t> layers;
    for (int64_t layer = 0; layer < c.model.num_layers + c.training.mtp_depth(); ++layer)
        if (c.model.is_moe_layer(layer)) layers.push_back(layer);
    return layers;
}

// ---- keys of the configuration ----
/// What an act sets, where the keys before it are `now` and those that are not there as the configuration has them.
Values Interventions::keys_of(const Item& item, const Values& now) const {
    const Values& a = item.args;
    if (item.what == "set") return a["changes"];
    if (item.what != "balance") return Values::object();
    std::string kind = a.value("kind", ""), scope = a.value("scope", "sequence");
    auto number = [&](const char* key, double fallback) {
        if (!a.contains(key)) return fallback;
        MOE_CHECK(a[key].is_number(), usage, std::string("balance: ") + key, a[key].dump(), "a number", "");
        return a[key].get<double>();
    };
    const MoeConfig& moe = model_.config().model.moe;
    double speed = now.value(kSpeed, moe.bias_update_speed);
    bool moves = kind == "aux_free" || kind == "custom";
    MOE_CHECK(moves || kind == "aux" || kind == "none", usage, "balance: kind", '"' + kind + '"', "aux, aux_free, none or custom", "moe.balance makes them");
    MOE_CHECK(kind != "aux" || scope == "sequence" || scope == "batch" || scope == "global", usage, "balance: scope", '"' + scope + '"', "sequence, batch or global", "");
    double alpha = kind == "aux" ? number("alpha", 1e-3) : 0;
    Values set = {{"model.moe.sequence_aux_loss_weight", scope == "sequence" ? alpha : 0.0}, {"model.moe.router_aux_loss_weight", scope == "batch" ? alpha : 0.0}, {"model.moe.global_aux_loss_weight", scope == "global" ? alpha : 0.0},
                  {"model.moe.balance_loss_weight", 0.0}, {kSpeed, kind == "aux_free" ? number("speed", speed > 0 ? speed : 1e-3) : 0.0}};
    if (kind == "aux_free") set[kRule] = a.value("rule", now.value(kRule, moe.bias_update_rule));
    if (moves) set["model.moe.use_aux_loss_free"] = true;
    return set;
}

Values Interventions::keys_in_force(const std::vector<Item>& items) const {
    Values keys = base_;
    for (const Item& item : items) keys.update(keys_of(item, keys));
    return keys;
}

/// The values before of the keys that it sets.
Values Interventions::act_on_keys(const Item& item) {
    MOE_CHECK(change_config_, state, item.what == "set" ? "set" : "router.balance", "a model without a run", item.what == "set" ? "a run" : "run.model.router", "training follows these keys");
    Values old = change_config_(keys_of(item, keys_in_force(items_)));
    for (auto it = old.begin(); it != old.end(); ++it)
        if (!base_.contains(it.key())) base_[it.key()] = it.value();
    return old;
}

/// What the keys of an act are without it.
Values Interventions::undo_keys(const Item& item, const std::vector<Item>& others) {
    Values now = keys_in_force(items_), next = keys_in_force(others), changes = Values::object(), left = Values::object(), own = Values::object();
    for (auto it = now.begin(); it != now.end(); ++it) {
        MOE_CHECK(next.contains(it.key()), state, "undo: " + it.key(), "a value before that is not known", "a checkpoint of this version", "");
        if (next[it.key()] != it.value()) changes[it.key()] = next[it.key()];
    }
    auto each_key = [](const Values& keys, auto&& f) {
        for (auto it = keys.begin(); it != keys.end(); ++it) f(it.key());
    };
    auto before = [&](const std::string& key) {
        MOE_CHECK(base_.contains(key), state, "undo: " + key, "a value before that is not known", "a checkpoint of this version", "");
        return base_[key];
    };
    for (const Item& other : others) each_key(keys_of(other, next), [&](const std::string& key) { left[key] = before(key); });
    each_key(keys_of(item, now), [&](const std::string& key) { own[key] = next.at(key); });
    if (!changes.empty()) change_config_(changes);
    base_ = std::move(left);
    return own;
}

// ---- weights and biases ----
/// An expert's matrices, with `gate` also its row of the router and its bias. The same order for every expert.
std::vector<Cell> Interventions::cells_of_expert(int64_t layer, int64_t expert, bool gate) const {
    std::vector<Cell> cells;
    for (const char* matrix : {"gate_proj", "up_proj", "down_proj"}) cells.push_back({fmt::format("{}experts.{}.{}.weight", prefix(layer), expert, matrix)});
    if (!gate) return cells;
    cells.push_back({prefix(layer) + "gate.weight", expert});
    cells.push_back({Model::bias_name(layer), expert, layer});
    return cells;
}

Placement Interventions::placement(const std::vector<Item>& items) const {
    Placement out;
    int64_t E = model_.config().model.moe.num_experts;
    for (const Item& item : items) {
        const Values& a = item.args;
        if (item.what == "parameter") {
            std::string name = a.at("name");
            bool is_gate = name.starts_with("model.layers.") && name.ends_with(".mlp.gate.weight");
            if (!is_gate) out.put({name}, item.id);
            for (int64_t e = 0; is_gate && e < E; ++e) out.put({name, e}, item.id);
            continue;
        }
        if (item.what != "bias" && !moves_weights(item.what)) continue;
        bool gate = a.value("gate", false);
        for (int64_t layer : list_of(a, "layers")) {
            auto cells = [&](int64_t expert) { return cells_of_expert(layer, expert, gate); };
            if (item.what == "bias") {
                for (int64_t e = 0; e < E; ++e) out.put({Model::bias_name(layer), e, layer}, item.id);
            } else if (item.what == "reinit") {
                for (int64_t expert : list_of(a, "experts"))
                    for (const Cell& cell : cells(expert)) out.put(cell, item.id);
            } else {
                bool swaps = item.what == "swap";
                auto from = cells((swaps ? a["experts"][0] : a["from"]).get<int64_t>()), to = cells((swaps ? a["experts"][1] : a["to"]).get<int64_t>());
                for (size_t i = 0; i < from.size(); ++i) {
                    if (swaps) out.exchange(from[i], to[i]);
                    else out.copy(from[i], to[i], item.id);
                }
            }
        }
    }
    return out;
}

/// The values that an act brings. `parameter` is a parameter's.
Contents::Maker Interventions::maker(const Item& item, const at::Tensor& parameter) const {
    const Values& a = item.args;
    if (item.what == "bias") return [values = a["values"].get<std::vector<double>>()](const Cell& cell) { return std::vector<Tensor>{at::scalar_tensor(values.at(size_t(cell.row)), at::kDouble)}; };
    if (item.what == "parameter") return [parameter](const Cell& cell) { return std::vector<Tensor>{cell.row < 0 ? parameter : parameter.narrow(0, cell.row, 1)}; };
    if (item.what != "reinit") return {};
    auto r = draw({uint64_t(model_.config().seed), routing::kScriptPurpose, uint32_t(item.id), 0}, uint64_t(item.step));
    uint64_t seed = a.contains("seed") ? uint64_t(a["seed"].get<int64_t>()) : uint64_t(r[0]) << 32 | r[1];
    return [this, seed](const Cell& cell) {
        if (cell.bias_of >= 0) return std::vector<Tensor>{at::zeros({}, at::kDouble)};
        const TensorSpec& spec = model_.store().spec(cell.name);
        auto shape = spec.shape;
        if (cell.row >= 0) shape[0] = 1;
        at::Tensor values = at::zeros(shape, at::kDouble);
        if (spec.init_std > 0) {
            normal(seed, cell.name, std::max<int64_t>(cell.row, 0) * values.numel(), values.numel(), values.mutable_data_ptr<double>());
            values.mul_(spec.init_std);
        }
        std::vector<Tensor> out(1 + size_t(model_.options().num_moments), at::zeros(shape, at::kDouble));
        out[0] = values;
        return out;
    };
}

void Interventions::check_act(const Item& item) const {
    if (item.what != "bias") return;
    for (int64_t layer : list_of(item.args, "layers"))
        MOE_CHECK(contents_.bias(layer).defined(), state, fmt::format("bias: layer {}", layer), "a router without a selection bias", "model.moe.use_aux_loss_free", "offset = … acts on any router");
}

/// By layer, as plain values.
Values Interventions::biases(const Values& layers) const {
    Values out = Values::object();
    for (int64_t layer : layers.get<std::vector<int64_t>>())
        if (at::Tensor bias = contents_.bias(layer); bias.defined()) out[std::to_string(layer)] = std::vector<double>(bias.const_data_ptr<double>(), bias.const_data_ptr<double>() + bias.numel());
    return out;
}

Change Interventions::set_parameter(const std::string& name, const at::Tensor& value, int64_t step) {
    at::NoGradGuard no_grad;
    ParamStore& store = model_.store();
    const auto& world = model_.mesh().world;
    at::Tensor given = value.detach();
    bool somewhere = world.all_reduce(int64_t(store.has(name)), dist::ReduceOp::max) > 0;
    agree(world, [&] {
        if (!store.has(name) && somewhere) return;
        auto shape = store.spec(name).shape;                            // throws for a name that no rank has
        MOE_CHECK(given.defined() && given.sizes() == at::IntArrayRef(shape), shape, name, describe(given), shape_text(shape), "");
        MOE_CHECK(at::isFloatingType(given.scalar_type()), dtype, name, dtype_text(given.scalar_type()), "a float dtype", "");
    });
    at::Tensor old = contents_.whole({name});
    Item item{next_id_, step, "parameter", {{"name", name}}, {}};
    if (int64_t(given.nbytes()) <= kStoredBytes) item.args["value"] = tensor_to_values(given);
    item.args["hash"] = fmt::format("{:016x}", hash_of(given));
    Change change = append(std::move(item), given);
    change.before = fmt::format("{:016x}", hash_of(old));
    change.after = items_.back().args["hash"];
    return change;
}

}  // namespace moe::train
