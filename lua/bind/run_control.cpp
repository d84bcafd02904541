// What changes a run between its steps: keys, learning rate, parts that a script gives, undo, restore, replay.
#include "core/base/json.h"
#include "core/base/suggest.h"
#include "core/config/load.h"
#include "core/train/agree.h"
#include "core/train/resume.h"
#include "lua/bind/bind.h"
#include "lua/bind/config.h"
#include "lua/bind/control.h"
#include "lua/bind/intervene.h"
#include "lua/bind/ranks.h"
#include "lua/bind/run.h"
#include "lua/bind/script.h"
#include "lua/bind/source.h"

#include <filesystem>

namespace moe::lua {
using train::Values;
namespace {
ModelValue model_of(const std::shared_ptr<train::Run>& run) { return {std::shared_ptr<Model>(run, &run->model()), run}; }

/// An intervention of the run at index 1, its handle on the stack.
int change(lua_State* L, const std::string& what, const Values& args) { return intervene(L, model_of(run_of(L)), what, args); }

int set(lua_State* L) {
    Values changes = live_changes(L, 2, run_of(L)->config());
    return change(L, "set", {{"changes", changes}});
}

int undo(lua_State* L) {
    auto r = live_run(L);
    int64_t id = 0;
    if (!is_nothing(L, 2)) {
        id = check_integer(L, 2, "id");
        MOE_CHECK(id >= 1, usage, "run:undo: id", std::to_string(id), "an intervention's id, 1 or more", "run.events lists them");
    }
    r->undo(id);
    lua_settop(L, 1);
    return 1;
}

int restore(lua_State* L) {
    check_no_job(L, self<RunValue>(L), "run:restore");
    auto r = live_run(L);
    r->restore_from(check_string(L, 2, "name"));
    auto& state = *self<RunValue>(L).state;
    state.losses.clear();
    std::lock_guard guard(state.mutex);
    state.last.reset();
    lua_settop(L, 1);
    return 1;
}

int field_events(lua_State* L) {
    auto r = live_run(L);
    push_events(L, r->events());
    return 1;
}
int field_lr(lua_State* L) {
    auto r = live_run(L);
    return lua_pushnumber(L, r->next_learning_rate()), 1;
}

/// The function in force, else what the configuration says.
template <int kind>
int field_part(lua_State* L) {
    static constexpr const char *names[] = {"schedule", "optimizer", "data"}, *keys[] = {"training.lr_decay_style", "training.optimizer", "data"};
    auto r = live_run(L);
    for (auto it = r->interventions().items().rbegin(); it != r->interventions().items().rend(); ++it) {
        if (it->what != names[kind]) continue;
        const Values& f = it->args["function"];
        if (f.is_null()) break;
        return push_function_of(L, f), 1;
    }
    push<ConfigValue>(L, {std::make_shared<const Config>(r->config()), nullptr});
    return lua_getfield(L, -1, keys[kind]), 1;
}

const Binding kMethods[] = {
    {"set", on_all_ranks<set>,
     "run:set {key = value, …}: changes keys of the configuration between two steps: nested as in a file, with dots, or the last word of one that may change (learning_rate, min_learning_rate, weight_decay, grad_clip, global_batch_size, micro_batch_size, train_steps, eval_interval, bias_update_speed, sequence_aux_loss_weight, …). "
     "data = {web = 0.7, code = 0.3}: weights of the mixture's sources from now on. An event; returns a handle."},
    {"undo", on_all_ranks<undo>, "run:undo(), run:undo(id): takes the latest intervention in force back, or the one with this id in run.events; an event as well. What is left is what the other interventions give in their order. Returns run."},
    {"restore", on_all_ranks<restore>, "run:restore(name): goes back to a checkpoint of this run in place: the name of a save, \"step_N\", \"last\" or a path. Weights, optimizer, data, interventions and changed keys are as they were; steps from here on are the next attempt. Returns run."},
};
const Binding kFields[] = {
    {"events", field_events, "run.events: what happened to it, as a list that prints as a table: step, what, old, new."},
    {"lr", field_lr, "run.lr: the next step's learning rate. run.lr = 1e-4 holds it there, run.lr = nil gives it back to the schedule; an event."},
    {"schedule", field_part<0>, "run.schedule = function(step) … return lr end: the learning rate of each step, from 1; nil: the configuration's. Stored as source like a hook; an event. Read: the function that is set, else the configuration's training.lr_decay_style."},
    {"optimizer", field_part<1>,
     "run.optimizer = function(name, value, grad, state, m) … return value end: the next value of each parameter from its value and gradient (clipped; both in the master type), state a list of the optimizer's tensors, written in place with :copy_(…) and saved with the run, m = {step, lr}; nil: the configuration's. On several ranks each calls it for the parameters that it has a part of, with the whole of them. An error undoes the step. Read: the function that is set, else the configuration's training.optimizer."},
    {"data", field_part<2>,
     "run.data = function(m) … return ids, targets, domain end: the sequences of each step: int64 [m.sequences, m.seq_length]; targets nil: the next token, -100 for none; domain nil: 0. m = {step, sequences, seq_length}; draws inside follow from seed and step, so a resume goes on with the same data. nil: the configuration's data. Also moe.run { data = … }. Read: the function that is set, else the configuration's section data."},
};

Config config_of_first(const store::Checkpoint& checkpoint) {
    return checkpoint.meta().contains("first_config") ? config_from_json(checkpoint.meta().at("first_config")) : train::saved_config(checkpoint);
}
}  // namespace

std::span<const Binding> control_methods() { return kMethods; }
std::span<const Binding> control_fields() { return kFields; }

int assign_to_run(lua_State* L) {
    std::string key = check_string(L, 2, "name");
    if (key == "lr") {
        Values value = is_nothing(L, 3) ? Values() : Values(check_number(L, 3, "lr"));
        return change(L, "lr", {{"value", value}}), 0;
    }
    std::vector<std::string> known = {"lr", "schedule", "optimizer", "data"};
    if (key != "schedule" && key != "optimizer" && key != "data") MOE_THROW(usage, "run." + key, "an assignment", "run.lr, run.schedule, run.optimizer or run.data", did_you_mean(key, known));
    if (!is_nothing(L, 3) && lua_type(L, 3) != LUA_TFUNCTION) {          // what reading gives where no function is set: the configuration's again
        lua_getfield(L, 1, key.c_str());
        luaL_tolstring(L, -1, nullptr);
        luaL_tolstring(L, 3, nullptr);
        if (lua_type(L, 3) == lua_type(L, 4) && lua_rawequal(L, -1, -2)) lua_pushnil(L), lua_replace(L, 3);
        lua_settop(L, 3);
    }
    return change(L, key, function_arguments(L, 3, true)), 0;
}

int replay_run(lua_State* L) {
    Options o(L, 2, {"name", "output_dir", "console", "log", "steps"});
    train::RunOptions options = run_options(L, o);
    std::vector<Values> events;
    Config config;
    int64_t steps = 0;
    if (test_box<RunValue>(L, 1)) {
        LiveRun r = live_run(L);
        for (auto& e : r->events()) events.push_back(Values::parse(e, nullptr, false));
        config = r->first_config();
        steps = r->current_step();
        if (options.name.empty() && !r->folder().empty()) options.name = std::filesystem::path(r->folder()).parent_path().filename().string();
    } else {
        std::string what = check_string(L, 1, "what");
        const auto& world = dist::world();
        std::string path;
        train::on_rank_0(world, [&] { path = std::filesystem::absolute(find_saved(what)).string(); });
        path = train::shared_text(path, world);
        train::agree(world, [&] {
            store::Checkpoint checkpoint(path);
            for (auto& e : checkpoint.meta().at("events")) events.push_back(e);
            config = config_of_first(checkpoint);
            steps = checkpoint.meta().at("step");
        });
    }
    if (o.has("steps")) steps = o.integer("steps", steps);
    MOE_CHECK(steps >= 0, usage, "moe.replay: steps", std::to_string(steps), "0 or more", "");
    if (o.has("output_dir")) config.output_dir = o.string("output_dir", config.output_dir);
    std::erase_if(events, [&](const Values& e) { return !e.is_object() || e.value("step", int64_t(0)) > steps; });
    for (auto& e : events) train::Run::check_replayable(e, options.compiler);
    push_run(L, config, options);
    int index = lua_gettop(L);
    auto [run, state] = check<RunValue>(L, index, "run");
    size_t next = 0;
    for (int64_t step = 0;; ++step) {
        for (; next < events.size() && events[next].value("step", int64_t(0)) <= step; ++next) run->replay(events[next]);
        if (step == steps) break;
        if (!ranks_of(L)) throw_if_interrupted(L);
        run->set_interrupt(&control(L).interrupted);
        remember_step(*state, run->step());
        run->set_interrupt(nullptr);
        if (run->was_interrupted()) throw_interrupted_on_all(L);
    }
    lua_settop(L, index);
    return 1;
}
}  // namespace moe::lua
