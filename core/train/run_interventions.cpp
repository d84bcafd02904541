// What is changed about a run while it lives: interventions and their events, keys of the configuration, parts that a script gives.
#include "core/base/error.h"
#include "core/base/interrupt.h"
#include "core/base/json.h"
#include "core/base/random.h"
#include "core/base/suggest.h"
#include "core/config/load.h"
#include "core/plan/count.h"
#include "core/tensor/check.h"
#include "core/train/agree.h"
#include "core/train/optimizer.h"
#include "core/train/resume.h"
#include "core/train/run.h"
#include "core/train/schedule.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>

namespace moe::train {
namespace {
/// {"a.b": 1} as {"a": {"b": 1}}.
nlohmann::json nested(const Values& flat) {
    nlohmann::json out = nlohmann::json::object();
    for (auto it = flat.begin(); it != flat.end(); ++it) {
        nlohmann::json* at = &out;
        const std::string& key = it.key();
        for (size_t begin = 0, end; begin != std::string::npos; begin = end == std::string::npos ? end : end + 1) {
            end = key.find('.', begin);
            at = &(*at)[key.substr(begin, end == std::string::npos ? end : end - begin)];
        }
        *at = nlohmann::json(it.value());
    }
    return out;
}

bool is_of(const std::string& key, const std::vector<std::string>& known) {
    return std::any_of(known.begin(), known.end(), [&](auto& k) { return key == k || key.starts_with(k + ".") || key.starts_with(k + "["); });
}
}  // namespace

const std::vector<std::string>& Run::live_keys() {
    static const std::vector<std::string> keys = {
        "training.learning_rate", "training.min_learning_rate", "training.lr_warmup_steps", "training.lr_decay_style", "training.lr_decay_ratio", "training.weight_decay", "training.grad_clip",
        "training.adam_beta1", "training.adam_beta2", "training.adam_eps", "training.mtp_loss_weight", "training.max_skipped_steps", "training.train_steps",
        "training.global_batch_size", "training.micro_batch_size", "training.eval_interval", "training.save_interval", "training.log_interval", "data.sources", "validation",
        "model.moe.router_temperature", "model.moe.routed_scaling_factor", "model.moe.router_noise_std", "model.moe.router_noise_anneal_steps", "model.moe.capacity_factor", "model.moe.min_expert_capacity",
        "model.moe.bias_update_speed", "model.moe.bias_update_rule", "model.moe.bias_freeze_step",
        "model.moe.router_aux_loss_weight", "model.moe.sequence_aux_loss_weight", "model.moe.global_aux_loss_weight", "model.moe.router_z_loss_weight", "model.moe.balance_loss_type", "model.moe.balance_loss_weight",
    };
    return keys;
}

void Run::open_global_load() {
    int64_t layers = config_.model.num_layers + config_.training.mtp_depth();
    if (config_.model.moe.global_aux_loss_weight == 0) global_load_.reset();
    else if (!global_load_) global_load_ = std::make_unique<routing::GlobalLoad>(layers, config_.model.moe.num_experts, mesh_.stage, model_->options().device);
}

int64_t Run::num_steps_of_config() const { return train::num_steps(config_, plan::count(config_.model).total, mesh_.dp.size()).value_or(num_steps_); }

double Run::next_learning_rate() const {
    auto& controls = interventions_->controls();
    double lr = controls.lr ? *controls.lr : controls.schedule ? controls.schedule(step_ + 1) : learning_rate(config_.training, step_, num_steps_);
    MOE_CHECK(std::isfinite(lr) && lr >= 0, usage, "run.schedule", fmt::format("{}", lr), "a number of at least 0", "");
    return lr;
}

void Run::set_interrupt(const std::atomic<bool>* flag) {
    interrupt_ = mesh_.world.size() == 1 ? flag : nullptr;
    edge_interrupt_ = flag;
    executor_->set_interrupt(interrupt_);
}

void Run::throw_if_interrupted() const {
    if (interrupt_ && *interrupt_) throw Error(interruption());
}

void Run::check_between_steps(const std::string& op) const {
    check_open(op);
    MOE_CHECK(!is_in_step_, state, op, "inside of a step", "between two steps", "hooks only give values; run:on(\"step\", f) is called between steps");
}

/// Takes other values of keys, and gives the old ones. Everything that follows from them follows.
Values Run::change_config(const Values& flat) {
    MOE_CHECK(flat.is_object() && !flat.empty(), usage, "run:set", "nothing", "keys with values, such as { learning_rate = 1e-4 }", "");
    nlohmann::json now = nlohmann::json(to_json(config_)), first = nlohmann::json(to_json(first_config_));
    auto pointer = [](std::string key) {
        std::replace(key.begin(), key.end(), '.', '/');
        return nlohmann::json::json_pointer("/" + key);
    };
    Values old = Values::object();
    for (auto it = flat.begin(); it != flat.end(); ++it) {
        MOE_CHECK(now.contains(pointer(it.key())), usage, "run:set", it.key(), "a key of the configuration", did_you_mean(it.key(), live_keys()));
        MOE_CHECK(is_of(it.key(), live_keys()) || it.key() == "model.moe.use_aux_loss_free", usage, "run:set", it.key(), "a key that may change between steps", did_you_mean(it.key(), live_keys()));
        old[it.key()] = Values(now.at(pointer(it.key())));
    }
    Config next = with_overrides(config_, nested(flat));
    validate(next);
    require_built(next);
    if (!next.training.dynamic_batch_tokens) next.training.micro_batches(mesh_.dp.size());
    if (!(next.data == config_.data)) {
        // The new shares hold from here on: what was read before does not count.
        nlohmann::json position = loader_->state();
        for (auto& domain : position.at("domains")) domain["tokens"] = 0;
        auto loader = data::open_loader(next, /*validation=*/false);
        MOE_CHECK(loader->domains() == loader_->domains(), usage, "run:set: data.sources", fmt::format("{} other sources", loader->domains().size()), "the same sources with other weights", "");
        loader->restore(position);
        loader_ = std::move(loader);
    }
    config_ = next;
    for (auto it = flat.begin(); it != flat.end(); ++it)
        if (!live_changes_.contains(it.key())) live_changes_[it.key()] = Values(first.at(pointer(it.key())));
    model_->adopt(config_);
    open_global_load();
    num_steps_ = num_steps_of_config();
    if (graph_) graph_->reset();
    return old;
}

void Run::log_change(const std::string& event, const Change& change, const Values& args) {
    Values facts = {{"id", change.id}, {"what", change.what}};
    if (!args.is_null()) facts["args"] = args;
    facts["old"] = change.before;
    facts["new"] = change.after;
    add_event(event, facts);
    if (graph_) graph_->reset();
    settle_writes();
}

Change Run::intervene(const std::string& what, const Values& args) {
    std::string op = Interventions::written(what);
    check_between_steps(op);
    check_whole(op);
    Change change;
    on_all([&] {
        change = interventions_->apply(what, args, step_);
        reached_ = Reached::end;
        log_change("intervention", change, interventions_->items().back().args);
    });
    return change;
}

Change Run::set_parameter(const std::string& name, const Tensor& value) {
    check_between_steps("model:set");
    check_whole("model:set");
    Change change;
    on_all([&] {
        change = interventions_->set_parameter(name, value, step_);
        reached_ = Reached::end;
        log_change("intervention", change, interventions_->items().back().args);
    });
    return change;
}

Change Run::undo(int64_t id) {
    check_between_steps("undo");
    check_whole("undo");
    if (id == 0) {
        MOE_CHECK(!interventions_->items().empty(), state, "run:undo", "no intervention in force", "one to undo", "");
        id = interventions_->items().back().id;
    }
    Change change;
    on_all([&] {
        change = interventions_->undo(id);
        reached_ = Reached::end;
        log_change("undo", change, nullptr);
    });
    return change;
}

void Run::check_replayable(const Values& event, const ScriptCompiler& compiler) {
    std::string kind = event.value("event", "");
    if (kind == "resume")
        for (auto& change : event.value("changes", Values::array())) {
            std::string key = change.at("key");
            MOE_CHECK(key != "training.use_bf16" && key != "training.use_fp8", state, "moe.replay", fmt::format("a run that was resumed with {} = {}", key, change.at("new").dump()), "products in one precision from step 0 on",
                      "moe.resume goes on from a checkpoint of it");
        }
    if (kind != "intervention") return;
    const Values& args = event.at("args");
    bool lost = args.contains("function") && !args["function"].is_null() && compiler.is_stored && !compiler.is_stored(args["function"]);
    MOE_CHECK(!lost, state, "moe.replay", fmt::format("step {}: {} with replay = false", event.at("step").get<int64_t>(), event.at("what").get<std::string>()), "a function that was stored", "make the run with hooks whose upvalues are plain values");
}

void Run::replay(const Values& event) {
    check_replayable(event, options_.compiler);
    std::string kind = event.value("event", "");
    if (kind == "resume") {
        Values live = Values::object();
        for (auto& change : event.value("changes", Values::array())) {
            std::string key = change.at("key");
            if (is_of(key, live_keys())) live[key] = change.at("new");
        }
        if (!live.empty()) change_config(live);        // no intervention: it has no number and nobody can take it back
        add_event("resume", {{"from", event.value("from", "")}, {"changes", event.value("changes", Values::array())}});
        return;
    }
    if (kind == "undo") {
        undo(event.at("id").get<int64_t>());
        return;
    }
    if (kind != "intervention") return;
    Change change = intervene(event.at("what"), event.at("args"));
    MOE_CHECK(change.id == event.at("id").get<int64_t>(), state, "moe.replay", fmt::format("intervention {}", change.id), fmt::format("{}", event.at("id").get<int64_t>()), "the events are not those of one run from its beginning");
}

/// A step's sequences from a script: this rank's part of them.
data::Batch Run::scripted_batch(int64_t sequences, int64_t first, int64_t count) const {
    int64_t S = config_.training.seq_length;
    data::Batch all = interventions_->controls().data(step_ + 1, sequences, S);
    MOE_CHECK(all.ids.dim() == 2 && all.ids.size(0) == sequences && all.ids.size(1) == S, shape, fmt::format("run.data: ids, at step {}", step_ + 1), shape_text(all.ids.sizes()), fmt::format("[{}, {}]: the sequences of a step", sequences, S), "");
    auto part = [&](const Tensor& t) { return t.narrow(0, first, count).contiguous(); };
    int64_t D = int64_t(loader_->domains().size());
    MOE_CHECK(all.domain.lt(D).all().item<bool>() && all.domain.ge(-1).all().item<bool>(), data, fmt::format("run.data: domain, at step {}", step_ + 1), fmt::format("{} to {}", all.domain.min().item<int64_t>(), all.domain.max().item<int64_t>()),
              fmt::format("-1 (padding) to {}", D - 1), "domains are those of the configuration's data, counted from 0");
    data::Batch out{part(all.ids), part(all.targets), part(all.domain), part(all.doc_start), all.first_sequence + first};
    return out;
}

/// The biases that a script gives for this step's counts: before anything has changed, so that it may fail.
void Run::make_scripted_biases() {
    scripted_biases_.clear();
    const BiasRule& rule = interventions_->controls().bias_rule;
    if (!rule || !config_.model.moe.use_aux_loss_free) return;
    for (int64_t layer : model_->routed_layers()) {
        Tensor bias = model_->bias(layer), next = rule(layer, step_ + 1, last_counts_[layer].clone(), bias.to(at::kCPU, at::kDouble, false, true));
        MOE_CHECK(next.defined() && next.sizes() == bias.sizes(), shape, fmt::format("router.balance: bias, layer {}, at step {}", layer, step_ + 1), next.defined() ? shape_text(next.sizes()) : "nothing", shape_text(bias.sizes()),
                  "the function gives the next bias, one number for each expert");
        scripted_biases_[layer] = next.to(bias.options());
    }
}

/// The optimizer's step by a script, parameter after parameter. Every rank that has a part of one calls it with the whole.
void Run::update_by_script(double lr, double norm, double scale) {
    at::NoGradGuard no_grad;
    ParamStore& store = model_->store();
    double clip = config_.training.grad_clip > 0 && norm > config_.training.grad_clip ? config_.training.grad_clip / norm : 1;
    // All of them first: a script that fails leaves every weight and moment as it was.
    struct Next {
        OwnedPiece piece;
        Tensor value;
        std::vector<Tensor> state;
    };
    std::map<std::string, std::vector<OwnedPiece>> pieces;
    for (OwnedPiece& p : store.owned(false)) pieces[p.rectangle.name].push_back(std::move(p));
    std::vector<Next> next;
    std::exception_ptr failure;                        // the others still wait for this rank's parts
    for (const std::string& name : store.names()) {
        if (store.spec(name).frozen) continue;
        Tensor value = store.master(name), grad = store.whole_grad(name).to(value.scalar_type()) * (clip / scale), got;
        std::vector<Tensor> state = store.whole_state(name);
        if (failure || !pieces.contains(name)) continue;
        try {
            auto shape = value.sizes().vec();
            got = interventions_->controls().optimizer(name, value, grad, state, updates_ + 1, lr);
            MOE_CHECK(got.defined() && got.sizes() == at::IntArrayRef(shape), shape, "run.optimizer: " + name, got.defined() ? shape_text(got.sizes()) : "nothing", shape_text(shape), "the function gives the parameter's next value");
        } catch (const std::exception&) {
            failure = std::current_exception();
            continue;
        }
        for (OwnedPiece& p : pieces[name]) {
            auto part = [&](Tensor t) {
                for (size_t d = 0; d < p.rectangle.shape.size(); ++d) t = t.narrow(int64_t(d), p.rectangle.offset[d], p.rectangle.shape[d]);
                return mesh_.world.size() == 1 ? t : t.clone();                                   // a view would keep all of it
            };
            Next n{p, part(got), {}};
            for (auto& s : state) n.state.push_back(part(s));
            next.push_back(std::move(n));
        }
    }
    agree(mesh_.world, [&] {
        if (failure) std::rethrow_exception(failure);
    });
    reached_ = Reached::changing;
    for (Next& n : next) {
        n.piece.master.write(n.value);
        for (size_t i = 0; i < n.state.size(); ++i) n.piece.state[i].copy_(n.state[i]);
    }
    store.gather_values();
    store.begin_grads();
}

}  // namespace moe::train
