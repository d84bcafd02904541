// Interventions that change values once: weights of experts, biases, parameters, keys of the configuration; and how they are undone.
#include "core/base/error.h"
#include "core/base/random.h"
#include "core/tensor/check.h"
#include "core/train/interventions.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cstring>

namespace moe::train {
namespace {
/// Acts whose tensors undo can still put back.
constexpr size_t kMaxKept = 16;

std::string prefix(int64_t layer) { return fmt::format("model.layers.{}.mlp.", layer); }

uint64_t hash_of(const at::Tensor& value) {
    at::Tensor t = value.detach().to(at::kCPU).contiguous();
    return hash_name(std::string_view(static_cast<const char*>(t.const_data_ptr()), size_t(t.nbytes())));
}
}  // namespace

/// Rows [begin, begin + count) of a tensor with its optimizer state (all of it where count is −1), or an element of a bias.
struct Interventions::Part {
    std::string name;
    Master master;                        ///< undefined data for a bias and without training
    std::vector<at::Tensor> state;
    at::Tensor plain;                     ///< a bias's element, or a view of compute weights
    double init_std = 0;
    int64_t first = 0;                    ///< element of the parameter that it starts with

    at::Tensor read() const { return (plain.defined() ? plain : master.read()).clone(); }
    void write(const at::Tensor& from) const {
        if (plain.defined()) plain.copy_(from);
        else master.write(from);
    }
};

/// Of the whole model, by name; empty without training.
std::map<std::string, OwnedPiece> Interventions::pieces() const {
    MOE_CHECK(model_.mesh().world.size() == 1, state, "weights of experts", fmt::format("{} ranks", model_.mesh().world.size()), "one rank", "masks, overrides and hooks work on any number");
    std::map<std::string, OwnedPiece> out;
    if (model_.options().training)
        for (OwnedPiece& p : model_.store().owned(false)) out.emplace(p.rectangle.name, p);
    return out;
}

/// An expert's matrices, with `gate` also its row of the router and its bias. The same order for every expert.
std::vector<Interventions::Part> Interventions::parts_of(int64_t layer, int64_t expert, bool gate, std::map<std::string, OwnedPiece>& pieces) const {
    std::vector<Part> list;
    ParamStore& store = model_.store();
    auto add = [&](const std::string& name, int64_t row) {
        Part p{name, {}, {}, {}, store.spec(name).init_std, 0};
        auto shape = store.spec(name).shape;
        if (row >= 0) p.first = row * shape[1];
        if (auto it = pieces.find(name); it != pieces.end()) {
            const OwnedPiece& piece = it->second;
            int64_t n = row >= 0 ? shape[1] : piece.master.data.numel();
            p.master = piece.master.view({-1}).narrow(p.first, n);
            for (auto& s : piece.state) p.state.push_back(s.view({-1}).narrow(0, p.first, n));
        } else {
            at::Tensor value = store.value(name).view({-1});
            p.plain = row >= 0 ? value.narrow(0, p.first, shape[1]) : value;
        }
        list.push_back(std::move(p));
    };
    for (const char* matrix : {"gate_proj", "up_proj", "down_proj"}) add(fmt::format("{}experts.{}.{}.weight", prefix(layer), expert, matrix), -1);
    if (!gate) return list;
    add(prefix(layer) + "gate.weight", expert);
    if (at::Tensor bias = model_.bias(layer); bias.defined()) list.push_back({Model::bias_name(layer), {}, {}, bias.narrow(0, expert, 1), 0, expert});
    return list;
}

void Interventions::act(Item& item) {
    at::NoGradGuard no_grad;
    const Values& a = item.args;
    bool gate = a.value("gate", false);
    auto keep = [&](const Part& p) {
        item.kept.emplace_back("", p.read());
        for (auto& s : p.state) item.kept.emplace_back("", s.clone());
    };
    if (item.what == "bias") {
        for (int64_t layer : a["layers"].get<std::vector<int64_t>>())
            MOE_CHECK(model_.bias(layer).defined() || model_.mesh().num_stages() > 1, state, fmt::format("bias: layer {}", layer), "a router without a selection bias", "model.moe.use_aux_loss_free", "offset = … acts on any router");
        item.before = Values::object();
        for (int64_t layer : a["layers"].get<std::vector<int64_t>>()) {
            at::Tensor bias = model_.bias(layer);
            if (!bias.defined()) continue;
            at::Tensor old = bias.to(at::kCPU, at::kDouble).contiguous();
            item.before[std::to_string(layer)] = std::vector<double>(old.const_data_ptr<double>(), old.const_data_ptr<double>() + old.numel());
            bias.copy_(at::tensor(a["values"].get<std::vector<double>>(), at::kDouble));
        }
    } else if (item.what == "swap") {
        auto all = pieces();
        for (int64_t layer : a["layers"].get<std::vector<int64_t>>()) {
            auto x = parts_of(layer, a["experts"][0], gate, all), y = parts_of(layer, a["experts"][1], gate, all);
            for (size_t i = 0; i < x.size(); ++i) {
                at::Tensor old = x[i].read();
                x[i].write(y[i].read());
                y[i].write(old);
                for (size_t s = 0; s < x[i].state.size(); ++s) {
                    at::Tensor moment = x[i].state[s].clone();
                    x[i].state[s].copy_(y[i].state[s]);
                    y[i].state[s].copy_(moment);
                }
            }
        }
        model_.store().gather_values();
    } else if (item.what == "duplicate") {
        auto all = pieces();
        for (int64_t layer : a["layers"].get<std::vector<int64_t>>()) {
            auto from = parts_of(layer, a["from"], gate, all), to = parts_of(layer, a["to"], gate, all);
            for (size_t i = 0; i < from.size(); ++i) {
                keep(to[i]);
                to[i].write(from[i].read());
                for (size_t s = 0; s < to[i].state.size(); ++s) to[i].state[s].copy_(from[i].state[s]);
            }
        }
        model_.store().gather_values();
    } else if (item.what == "reinit") {
        auto all = pieces();
        auto r = draw({uint64_t(model_.config().seed), routing::kScriptPurpose, uint32_t(item.id), 0}, uint64_t(item.step));
        uint64_t seed = a.contains("seed") ? uint64_t(a["seed"].get<int64_t>()) : uint64_t(r[0]) << 32 | r[1];
        for (int64_t layer : a["layers"].get<std::vector<int64_t>>())
            for (int64_t expert : a["experts"].get<std::vector<int64_t>>())
                for (Part& p : parts_of(layer, expert, gate, all)) {
                    keep(p);
                    at::Tensor values = at::zeros({p.read().numel()}, at::kDouble);
                    if (p.init_std > 0) {
                        normal(seed, p.name, p.first, values.numel(), values.mutable_data_ptr<double>());
                        values.mul_(p.init_std);
                    }
                    p.write(values);
                    for (auto& s : p.state) s.zero_();
                }
        model_.store().gather_values();
    } else if (item.what == "balance") {
        MOE_CHECK(change_config_, state, "router.balance", "a model without a run", "run.model.router", "balance happens in training");
        std::string kind = a.value("kind", ""), scope = a.value("scope", "sequence");
        auto number = [&](const char* key, double fallback) {
            if (!a.contains(key)) return fallback;
            MOE_CHECK(a[key].is_number(), usage, std::string("balance: ") + key, a[key].dump(), "a number", "");
            return a[key].get<double>();
        };
        const MoeConfig& now = model_.config().model.moe;
        bool moves = kind == "aux_free" || kind == "custom";
        MOE_CHECK(moves || kind == "aux" || kind == "none", usage, "balance: kind", '"' + kind + '"', "aux, aux_free, none or custom", "moe.balance makes them");
        MOE_CHECK(kind != "aux" || scope == "sequence" || scope == "batch" || scope == "global", usage, "balance: scope", '"' + scope + '"', "sequence, batch or global", "");
        double alpha = kind == "aux" ? number("alpha", 1e-3) : 0;
        Values set = {{"model.moe.sequence_aux_loss_weight", scope == "sequence" ? alpha : 0.0}, {"model.moe.router_aux_loss_weight", scope == "batch" ? alpha : 0.0}, {"model.moe.global_aux_loss_weight", scope == "global" ? alpha : 0.0},
                    {"model.moe.balance_loss_weight", 0.0}, {"model.moe.bias_update_speed", kind == "aux_free" ? number("speed", now.bias_update_speed > 0 ? now.bias_update_speed : 1e-3) : 0.0}};
        if (kind == "aux_free") set["model.moe.bias_update_rule"] = a.value("rule", now.bias_update_rule);
        if (moves) set["model.moe.use_aux_loss_free"] = true;
        item.before = change_config_(set);
    } else if (item.what == "set") {
        MOE_CHECK(change_config_, state, "set", "a model without a run", "a run", "");
        item.before = change_config_(a["changes"]);
    }
}

Change Interventions::set_parameter(const std::string& name, const at::Tensor& value, int64_t step) {
    at::NoGradGuard no_grad;
    Item item{next_id_, step, "parameter", {{"name", name}}, {}, {}, {}};
    at::Tensor old = model_.store().master(name), given = value.detach();
    model_.store().set(name, given);
    item.kept.emplace_back(name, old);
    if (int64_t(given.nbytes()) <= kStoredBytes) item.args["value"] = tensor_to_values(given);
    item.args["hash"] = fmt::format("{:016x}", hash_of(given));
    Change change{item.id, item.what, fmt::format("{:016x}", hash_of(old)), item.args["hash"]};
    items_.push_back(std::move(item));
    ++next_id_;
    limit_kept();
    return change;
}

/// Puts back what keep() took, in the same order.
void Interventions::put_back(const Item& item) {
    auto all = pieces();
    const Values& a = item.args;
    bool gate = a.value("gate", false);
    size_t next = 0;
    auto put = [&](const Part& p) {
        p.write(item.kept.at(next++).second);
        for (auto& s : p.state) s.copy_(item.kept.at(next++).second);
    };
    for (int64_t layer : a["layers"].get<std::vector<int64_t>>()) {
        auto experts = item.what == "duplicate" ? std::vector<int64_t>{a["to"].get<int64_t>()} : a["experts"].get<std::vector<int64_t>>();
        for (int64_t expert : experts)
            for (const Part& p : parts_of(layer, expert, gate, all)) put(p);
    }
    model_.store().gather_values();
}

void Interventions::undo_act(Item& item) {
    at::NoGradGuard no_grad;
    bool needs_kept = item.what == "duplicate" || item.what == "reinit" || item.what == "parameter";
    MOE_CHECK(!needs_kept || !item.kept.empty(), state, "undo: " + text(item.what, item.args), "values before that are gone", fmt::format("one of the last {} of this process", kMaxKept), "a checkpoint does not carry them: run:restore goes back as a whole");
    if (item.what == "bias") {
        for (auto it = item.before.begin(); it != item.before.end(); ++it)
            if (at::Tensor bias = model_.bias(std::stoll(it.key())); bias.defined()) bias.copy_(at::tensor(it.value().get<std::vector<double>>(), at::kDouble));
    } else if (item.what == "swap") {
        Item again{0, 0, "swap", item.args, {}, {}, {}};
        act(again);
    } else if (item.what == "parameter") {
        model_.store().set(item.kept[0].first, item.kept[0].second);
    } else if (needs_kept) {
        put_back(item);
    } else if (item.what == "set" || item.what == "balance") {
        change_config_(item.before);
    }
}

void Interventions::limit_kept() {
    size_t n = 0;
    for (auto it = items_.rbegin(); it != items_.rend(); ++it)
        if (!it->kept.empty() && ++n > kMaxKept) it->kept.clear();
}

}  // namespace moe::train
