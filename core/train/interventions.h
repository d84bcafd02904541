// The changes that somebody makes to a model or run while it lives: a list that can be logged, undone, saved and applied again.
#pragma once
#include "core/model/model.h"
#include "core/train/contents.h"
#include "core/train/script.h"

#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace moe::train {
struct CompiledScript;

/// One intervention in force. `what` and its arguments are plain values; layers and experts are absolute and 0-based.
///   mask, unmask {layers, experts}        masked experts are never chosen
///   override {layers, top_k, temperature}
///   offset {layers, values}               added to the selection scores; values: one for each expert
///   freeze {layers}                       the balance leaves the bias alone
///   force {layers, experts | by_token}    the choice of every token, or by token id: a tensor int64 [V, K]
///   ablate {layers, experts}              chosen as before, but with weight 0: the expert adds nothing and learns nothing
///   pre_topk, post_topk, score {layers, function}
///   lr {value}, schedule, data, optimizer, bias_rule {function}    of a run; the latest counts, null takes the run's own again
/// and acts, which change values once. Undoing one, in whatever order, leaves what the others in their order give: of keys, the values before the first act with the others' over them;
/// of weights and biases, which training moves, see Placement:
///   balance {kind, …, function}           keys of the configuration, and with a function the rule of the bias;
///   bias {layers, values}; swap {layers, experts = {a, b}, gate}; duplicate {layers, from, to, gate}; reinit {layers, experts, gate, seed};
///   parameter {name, value = tensor}; set {changes}   keys of the configuration (train/run.h)
struct Item {
    int64_t id = 0, step = 0;
    std::string what;
    Values args;
    std::shared_ptr<const CompiledScript> script;           ///< of a function
};

/// What the run's own parts are replaced by.
struct RunControls {
    std::optional<double> lr;
    Schedule schedule;
    BatchSource data;
    OptimizerRule optimizer;
    BiasRule bias_rule;
};

/// Before and after, for the log.
struct Change {
    int64_t id = 0;
    std::string what;
    Values before, after;
};

/// Owner of the list and of the model's interventions that follow from it.
class Interventions {
public:
    explicit Interventions(Model& model) : model_(model), contents_(model) {}
    void set_compiler(ScriptCompiler compiler) { compiler_ = std::move(compiler); }
    /// Of its hooks; null where none was compiled for.
    const std::shared_ptr<HookFailures>& failures() const { return compiler_.failures; }
    /// Where keys of the configuration can be changed: takes {"key": value, …}, gives the old values in the same form.
    void set_config_changer(std::function<Values(const Values&)> f) { change_config_ = std::move(f); }

    /// What a script writes for something of Item's list: "router:mask", "run.lr".
    static std::string written(const std::string& what);
    /// Does something of Item's list; "layer" and "expert" may stand for lists of one, and all routed layers for none. Every rank of the model makes the same calls. Where it throws
    /// nothing has changed: moe::Error (usage, shape, config, state).
    Change apply(const std::string& what, const Values& args, int64_t step);
    /// Overwrites a parameter. A value of more than kStoredBytes is logged as its hash alone, and cannot be replayed.
    Change set_parameter(const std::string& name, const at::Tensor& value, int64_t step);
    static constexpr int64_t kStoredBytes = int64_t(1) << 20;
    /// Takes one back, in whatever order. Throws moe::Error (state) for one that is not in force, or whose values before are gone.
    Change undo(int64_t id);
    /// True where an exception has ended the last of these amid its changes: an allocation that failed, another rank.
    bool is_half_done() const { return contents_.is_half_moved(); }
    bool is_active(int64_t id) const;
    /// In force, oldest first.
    const std::vector<Item>& items() const { return items_; }
    const RunControls& controls() const { return controls_; }
    /// Makes the state of model and controls from the list again: after Model::adopt.
    void refold();

    /// What a checkpoint carries, and the list from it; values that acts changed are in the checkpoint already. Functions that were not stored
    /// are left out, and named in the result.
    nlohmann::json state() const;
    std::vector<std::string> restore(const nlohmann::json& state);
    /// Text for people: "mask layers 1 experts 7".
    static std::string text(const std::string& what, const Values& args);

private:
    struct LayerState;
    struct Folded;
    Values canonical(const std::string& what, const Values& args) const;
    std::vector<int64_t> layers_of(const Values& args) const;
    Folded fold(const std::vector<Item>& items) const;
    void take(Folded folded);
    void compile(Item& item) const;
    Values shown(const std::string& what, const Values& args) const;
    // interventions_acts.cpp
    std::vector<int64_t> routed_layers() const;
    Values keys_of(const Item& item, const Values& now) const;
    Values keys_in_force(const std::vector<Item>& items) const;
    Values act_on_keys(const Item& item);
    Values undo_keys(const Item& item, const std::vector<Item>& others);
    std::vector<Cell> cells_of_expert(int64_t layer, int64_t expert, bool gate) const;
    Placement placement(const std::vector<Item>& items) const;
    Contents::Maker maker(const Item& item, const at::Tensor& parameter) const;
    void check_act(const Item& item) const;
    Values biases(const Values& layers) const;
    Change append(Item item, const at::Tensor& parameter);

    Model& model_;
    Contents contents_;
    ScriptCompiler compiler_;
    std::function<Values(const Values&)> change_config_;
    std::vector<Item> items_;
    RunControls controls_;
    Values base_ = Values::object();          ///< keys of the configuration that acts in force set, with the values before all of them
    Values shown_ = Values::object();         ///< by kind and layer: what is in force, as plain values
    int64_t next_id_ = 1;
};

/// A tensor as plain values {dtype, shape, base64}, bit for bit, and back. Throws moe::Error (data) for what is not that.
Values tensor_to_values(const at::Tensor& tensor);
at::Tensor tensor_from_values(const Values& value);
bool is_tensor_values(const Values& value);

}  // namespace moe::train
