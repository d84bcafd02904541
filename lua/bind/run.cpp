// Runs in Lua: train, evaluate, trace, callbacks between steps.
#include "lua/bind/run.h"

#include "core/base/log.h"
#include "core/base/suggest.h"
#include "core/data/tokenizer.h"
#include "core/train/agree.h"
#include "lua/bind/bind.h"
#include "lua/bind/config.h"
#include "lua/bind/control.h"
#include "lua/bind/intervene.h"
#include "lua/bind/job.h"
#include "lua/bind/ranks.h"
#include "lua/bind/script.h"
#include "lua/bind/tensor.h"
#include "lua/bind/trace.h"

#include <ATen/ATen.h>

#include <cmath>

namespace moe::lua {
namespace {
constexpr const char* kMetricsType = "step metrics";
const std::vector<std::string> kEvents = {"step", "skip", "spike", "evaluate", "save"};
/// Steps that a spike is compared with.
constexpr size_t kSpikeSteps = 50, kFewSteps = 10;

LiveRun run(lua_State* L) { return live_run(L); }

/// Several ranks know of an interrupt after a step and in meetings: one that left a call of all by itself would leave the others in its collectives.
void throw_if_interrupted_here(lua_State* L) {
    if (!ranks_of(L)) throw_if_interrupted(L);
}

// --- metrics ---

struct MetricsField {
    const char* name;
    double train::StepMetrics::*value;
};
constexpr MetricsField kMetrics[] = {
    {"loss", &train::StepMetrics::loss},         {"grad_norm", &train::StepMetrics::grad_norm}, {"lr", &train::StepMetrics::lr},
    {"tps", &train::StepMetrics::tokens_per_sec}, {"tflops", &train::StepMetrics::tflops},       {"mfu", &train::StepMetrics::mfu},
    {"memory", &train::StepMetrics::memory_gib}, {"maxvio", &train::StepMetrics::max_vio},      {"step_secs", &train::StepMetrics::step_secs},
    {"mtp_loss", &train::StepMetrics::mtp_loss},  {"balance_loss", &train::StepMetrics::balance_loss}, {"drop_rate", &train::StepMetrics::drop_rate},
};

int metrics_text(lua_State* L) {
    check_table(L, 1, "metrics");
    train::StepMetrics m;
    for (auto& f : kMetrics) {
        lua_getfield(L, 1, f.name);
        m.*f.value = lua_tonumber(L, -1);
    }
    lua_getfield(L, 1, "step");
    m.step = lua_tointeger(L, -1);
    lua_getfield(L, 1, "skipped");
    m.skipped = lua_toboolean(L, -1);
    push_string(L, m.line());
    return 1;
}
constexpr Binding kMetricsText = {"__tostring", metrics_text, "tostring(m): the log line of a step."};

}  // namespace

std::shared_ptr<train::Run> run_of(lua_State* L) { return self<RunValue>(L).run; }

LiveRun live_run(lua_State* L) {
    auto r = run_of(L);                                   // a copy: a callback may free the run while it trains
    HeldEdge edge = hold_edge(L, r);
    return {std::move(r), std::move(edge)};
}

bool is_spike(RunState& state, double loss, double sigma) {
    double n = double(state.losses.size()), sum = 0, squares = 0;
    for (double x : state.losses) sum += x;
    double mean = sum / std::max(n, 1.0);
    for (double x : state.losses) squares += (x - mean) * (x - mean);
    bool spikes = state.losses.size() >= kFewSteps && loss > mean + sigma * std::sqrt(squares / n);
    if (std::isfinite(loss)) state.losses.push_back(loss);
    if (state.losses.size() > kSpikeSteps) state.losses.pop_front();
    return spikes;
}

void check_no_job(lua_State* L, const RunValue& value, const std::string& op) {
    auto job = value.state->job.lock();
    MOE_CHECK(!job || !job->is_training_anywhere(L), state, op, "a run that a job trains", "a run of its own", "job:pause(), job:wait() or job:stop() first");
}

void push_metrics(lua_State* L, const train::StepMetrics& m) {
    lua_createtable(L, 0, 15);
    for (auto& f : kMetrics) {
        lua_pushnumber(L, m.*f.value);
        lua_setfield(L, -2, f.name);
    }
    lua_pushinteger(L, m.step);
    lua_setfield(L, -2, "step");
    lua_pushinteger(L, m.tokens);
    lua_setfield(L, -2, "tokens");
    lua_pushboolean(L, m.skipped);
    lua_setfield(L, -2, "skipped");
    luaL_setmetatable(L, kMetricsType);
}

namespace {
// --- callbacks: the userdata's user value is {event = {function or {every, function}, …}} ---

void push_callbacks(lua_State* L, int run_index, const std::string& event) {
    if (lua_getiuservalue(L, run_index, 1) != LUA_TTABLE) {
        lua_pop(L, 1);
        lua_newtable(L);
        lua_pushvalue(L, -1);
        lua_setiuservalue(L, run_index, 1);
    }
    luaL_getsubtable(L, -1, event.c_str());
    lua_remove(L, -2);
}

void add_callback(lua_State* L, const std::string& event, int64_t every, int function) {
    push_callbacks(L, 1, event);
    lua_createtable(L, 2, 0);
    lua_pushinteger(L, every);
    lua_rawseti(L, -2, 1);
    lua_pushvalue(L, function);
    lua_rawseti(L, -2, 2);
    lua_rawseti(L, -2, lua_Integer(lua_rawlen(L, -2)) + 1);
    lua_pop(L, 1);
    ++check<RunValue>(L, 1, "run").state->num_callbacks;
}
}  // namespace

void fire(lua_State* L, int run_index, const std::string& event, int64_t step) {
    int value = lua_gettop(L);
    push_callbacks(L, run_index, event);
    for (lua_Integer i = 1, n = lua_Integer(lua_rawlen(L, -1)); i <= n; ++i) {
        lua_rawgeti(L, -1, i);
        lua_rawgeti(L, -1, 1);
        if (step % lua_tointeger(L, -1) == 0) {
            lua_rawgeti(L, -2, 2);
            lua_pushvalue(L, value);
            call_or_raise(L, 1, 0);
        }
        lua_pop(L, 2);
    }
    lua_settop(L, value - 1);
}

void call_back_step(lua_State* L, int run_index, train::Run& run, RunState& state, const train::StepMetrics& m) {
    bool spikes = is_spike(state, m.loss, run.config().logging.alarms.spike_sigma);
    if (!ranks_of(L)) return fire_step(L, run_index, m, spikes);
    if (run.model().mesh().world.all_reduce(int64_t(state.num_callbacks > 0), dist::ReduceOp::max) == 0) return;
    lua_pushvalue(L, run_index);
    settle(L, 1, fmt::format("the callbacks of step {}", m.step), [&](lua_State* S) { fire_step(S, 1, m, spikes); });
}

void fire_step(lua_State* L, int run_index, const train::StepMetrics& m, bool spikes) {
    for (const char* event : {"step", "skip", "spike"}) {
        if (event[1] == 'k' && !m.skipped) continue;
        if (event[1] == 'p' && !spikes) continue;
        push_metrics(L, m);
        fire(L, run_index, event, m.step);
    }
}

namespace {
/// fire(), where a function's error on one rank is raised on all.
void fire_on_all(lua_State* L, const std::string& event, int64_t step) {
    if (!ranks_of(L)) return fire(L, 1, event, step);
    lua_pushvalue(L, 1);
    lua_insert(L, -2);
    settle(L, 2, "the callbacks of " + running(L), [&](lua_State* S) { fire(S, 1, event, step); });
}

/// While it lives an interrupt of the session ends a step or evaluation of the run at its next segment.
struct Interruptible {
    std::shared_ptr<train::Run> run;
    Interruptible(lua_State* L, const LiveRun& r) : run(r.run) { run->set_interrupt(&control(L).interrupted); }
    ~Interruptible() { run->set_interrupt(nullptr); }
};

/// One optimizer step of the run at index, its callbacks, and its metrics on the stack.
void step(lua_State* L, int run_index, const LiveRun& r) {
    throw_if_interrupted_here(L);
    auto state = check<RunValue>(L, run_index, "run").state;
    train::StepMetrics m;
    {
        Interruptible interruptible(L, r);
        m = r->step();
    }
    call_back_step(L, run_index, *r, *state, m);
    if (r->was_interrupted()) throw_interrupted_on_all(L);
    push_metrics(L, m);
}

int do_train(lua_State* L) {
    check_no_job(L, self<RunValue>(L), "run:train");
    auto r = run(L);
    int64_t n = lua_isnoneornil(L, 2) ? std::max<int64_t>(0, r->num_steps() - r->current_step()) : check_integer(L, 2, "steps");
    MOE_CHECK(n >= 0, usage, "run:train: steps", std::to_string(n), "0 or more", "");
    lua_settop(L, 1);
    lua_pushnil(L);
    for (int64_t i = 0; i < n && !r->is_stopping(); ++i) {
        lua_settop(L, 1);
        step(L, 1, r);
    }
    return 1;
}

/// Upvalues: run, steps left.
int next_step(lua_State* L) {
    int64_t left = lua_tointeger(L, upvalue(2));
    lua_settop(L, 0);
    lua_pushvalue(L, upvalue(1));
    check_no_job(L, self<RunValue>(L), "run:steps");
    auto r = run(L);
    if (left <= 0 || r->is_stopping()) return lua_pushnil(L), 1;
    lua_pushinteger(L, left - 1);
    lua_replace(L, upvalue(2));
    step(L, 1, r);
    lua_pushinteger(L, r->current_step());
    lua_insert(L, -2);
    return 2;
}

int steps(lua_State* L) {
    auto r = run(L);
    int64_t n = lua_isnoneornil(L, 2) ? std::max<int64_t>(0, r->num_steps() - r->current_step()) : check_integer(L, 2, "steps");
    lua_settop(L, 1);
    lua_pushinteger(L, n);
    push_function(L, {"next", on_all_ranks<next_step>, "next step of run:steps: step, metrics."}, "run:steps.next", 2);
    return 1;
}

int every(lua_State* L) {
    run(L);
    int64_t n = check_integer(L, 2, "steps");
    MOE_CHECK(n > 0, usage, "run:every: steps", std::to_string(n), "1 or more", "");
    check_function(L, 3, "f");
    add_callback(L, "step", n, 3);
    lua_settop(L, 1);
    return 1;
}

int on(lua_State* L) {
    run(L);
    std::string event = check_string(L, 2, "event");
    check_function(L, 3, "f");
    if (std::find(kEvents.begin(), kEvents.end(), event) == kEvents.end()) {
        std::string want;
        for (auto& e : kEvents) want += (want.empty() ? "one of " : ", ") + e;
        MOE_THROW(usage, "run:on: event", '"' + event + '"', want, did_you_mean(event, kEvents));
    }
    add_callback(L, event, 1, 3);
    lua_settop(L, 1);
    return 1;
}

int evaluate(lua_State* L) {
    auto r = run(L);
    Options o(L, 2, {"max_batches"});
    throw_if_interrupted_here(L);
    Interruptible interruptible(L, r);
    train::Evaluation e = r->evaluate(nullptr, o.integer("max_batches", 0));
    lua_settop(L, 1);
    push_ordered_table(L, {"loss", "bits", "num_tokens", "by_domain", "acceptance"});
    lua_pushnumber(L, e.loss);
    lua_setfield(L, -2, "loss");
    lua_pushnumber(L, e.loss / std::log(2.0));
    lua_setfield(L, -2, "bits");
    lua_pushinteger(L, e.num_tokens);
    lua_setfield(L, -2, "num_tokens");
    lua_newtable(L);
    lua_Integer i = 0;
    for (auto& [name, loss] : e.by_domain) {
        push_ordered_table(L, {"name", "loss"});
        push_string(L, name);
        lua_setfield(L, -2, "name");
        lua_pushnumber(L, loss);
        lua_setfield(L, -2, "loss");
        lua_rawseti(L, -2, ++i);
    }
    lua_setfield(L, -2, "by_domain");
    if (!e.acceptance.empty()) {
        lua_newtable(L);
        for (size_t k = 0; k < e.acceptance.size(); ++k) {
            lua_pushnumber(L, e.acceptance[k]);
            lua_rawseti(L, -2, lua_Integer(k) + 1);
        }
        lua_setfield(L, -2, "acceptance");
    }
    lua_pushvalue(L, -1);
    fire_on_all(L, "evaluate", r->current_step());
    return 1;
}

int make_trace(lua_State* L) {
    auto r = run(L);
    Options o(L, 2, {"batches", "tokens", "weights", "file", "memory"});
    const dist::Mesh& mesh = r->model().mesh();
    MOE_CHECK(!(o.has("batches") && o.has("tokens")), usage, "run:trace", "batches and tokens", "one of them", "");
    auto& t = r->config().training;
    int64_t per_batch = t.micro_batch_size * mesh.dp.size() * t.seq_length, batches = o.integer("batches", 0);
    if (o.has("tokens")) batches = (o.integer("tokens", 0) + per_batch - 1) / per_batch;
    MOE_CHECK(batches >= 0, usage, "run:trace: batches", std::to_string(batches), "1 or more", "");
    throw_if_interrupted_here(L);
    Interruptible interruptible(L, r);
    auto& moe = r->config().model.moe;
    auto trace = std::make_shared<routing::Trace>(routing::TraceFacts{moe.num_experts, moe.n_group, t.seq_length, {}, r->config().data.tokenizer}, trace_options(o, mesh));
    r->evaluate(trace.get(), batches);
    train::agree(mesh.world, [&] { trace->finish(); });
    push<TraceValue>(L, {trace, data::open_tokenizer(r->config().data.tokenizer), t.seq_length});
    return 1;
}

int counts(lua_State* L) {
    auto r = run(L);
    Options o(L, 2, {"by"});
    std::string by = o.string("by", "");
    MOE_CHECK(by.empty() || by == "domain", usage, "run:counts: by", '"' + by + '"', "\"domain\" or nothing", "");
    at::Tensor c = by.empty() ? r->last_counts() : r->last_counts_by_domain();
    MOE_CHECK(c.defined(), state, "run:counts", "no step done yet", "run:train(1) first", "");
    return push_tensor(L, c.clone());
}

// --- fields ---

int field_model(lua_State* L) {
    auto r = run_of(L);
    push<ModelValue>(L, {std::shared_ptr<Model>(r, &r->model()), r});
    return 1;
}
/// While a job trains, ranks are a step apart at times: all say what rank 0 says.
int field_step(lua_State* L) {
    auto r = run_of(L);
    auto text = [&] { return std::to_string(r->current_step()); };
    bool asks = r->edge().has_turns() && !r->edge().is_trainer();      // the job's own callbacks come at the same step on all
    lua_pushinteger(L, std::stoll(asks ? from_rank_0(L, "run.step", text) : text()));
    return 1;
}
int field_attempt(lua_State* L) { return lua_pushinteger(L, run_of(L)->attempt()), 1; }
int field_stopping(lua_State* L) { return lua_pushboolean(L, run_of(L)->is_stopping()), 1; }
int field_num_steps(lua_State* L) { return lua_pushinteger(L, run_of(L)->num_steps()), 1; }
int field_folder(lua_State* L) {
    auto r = run_of(L);
    if (r->folder().empty()) return lua_pushnil(L), 1;
    push_string(L, r->folder());
    return 1;
}
int field_domains(lua_State* L) {
    lua_newtable(L);
    lua_Integer i = 0;
    for (auto& name : run_of(L)->domains()) {
        push_string(L, name);
        lua_rawseti(L, -2, ++i);
    }
    return 1;
}
int field_config(lua_State* L) {
    push<ConfigValue>(L, {std::make_shared<const Config>(run(L)->config()), nullptr});
    return 1;
}
int text(lua_State* L) {
    auto* box = test_box<RunValue>(L, 1);
    if (!box || !*box) return lua_pushliteral(L, "run (freed)"), 1;
    auto& r = *(*box)->run;
    push_string(L, fmt::format("run: step {} of {}, {}", r.current_step(), r.num_steps(), r.folder().empty() ? "no folder" : r.folder()));
    return 1;
}

int save(lua_State* L) {
    auto r = run(L);
    throw_if_interrupted_here(L);
    std::string path = r->save(lua_isnoneornil(L, 2) ? "" : check_string(L, 2, "name"));
    lua_settop(L, 1);
    push_ordered_table(L, {"step", "path"});
    lua_pushinteger(L, r->current_step());
    lua_setfield(L, -2, "step");
    push_string(L, path);
    lua_setfield(L, -2, "path");
    fire_on_all(L, "save", r->current_step());
    push_string(L, path);
    return 1;
}

int close_run(lua_State* L) {
    run(L)->close();
    return 0;
}

const Binding kMethods[] = {
    {"train", on_all_ranks<do_train>, "run:train(n): n optimizer steps, by default up to the configuration's length. Returns the last step's metrics."},
    {"steps", steps, "for step, m in run:steps(n) do … end: one optimizer step an iteration; leaving the loop stops there."},
    {"every", every, "run:every(n, f): calls f(m) after each step that n divides. Returns run."},
    {"on", on, "run:on(event, f): calls f(m) at an event: \"step\" (after each step), \"skip\" (a step whose loss or gradient was not finite), \"spike\" (a loss above mean + logging.alarms.spike_sigma deviations of the 50 steps before, once there are 10), "
     "\"evaluate\" (with run:evaluate's result), \"save\" (run:save's {step, path}). An error in f ends run:train after that step; the run can go on. Returns run."},
    {"save", on_all_ranks<save>, "run:save(name): saves the whole state and returns the checkpoint's folder: checkpoints/<name> in the run's folder, never pruned; without a name checkpoints/step_N; a name with a \"/\" is a path. Waits until it is on the disk."},
    {"close", on_all_ranks<close_run>, "run:close(): waits for the last save and gives the run's folder free; no more steps."},
    {"evaluate", on_all_ranks<evaluate>, "run:evaluate {max_batches =}: loss on validation data in nats a token: {loss (mean over domains), bits, num_tokens, by_domain = {{name, loss}, …}, and with MTP acceptance = {share of positions where module k's token is the main head's}}. Routers' counts and biases do not move."},
    {"eval", on_all_ranks<evaluate>, "run:eval {max_batches =}: as run:evaluate."},
    {"start", on_all_ranks<start_job>, "run:start(n): n steps (by default to the configured length) in the background while other inputs run; gives a job. Whatever touches the run meanwhile waits for the end of the step at hand. Callbacks are called between other inputs. "
     "On several ranks there is one job at a time, and what all ranks call meanwhile, about whatever run, has its turn between two of its steps."},
    {"trace", on_all_ranks<make_trace>, "run:trace {batches =, tokens =, weights = true, file =, memory = 2^28}: runs validation data through the model and records every routing decision, as model:trace does. A batch has micro_batch_size sequences of each data-parallel rank; every rank gets all of the trace."},
    {"counts", counts, "run:counts {by = \"domain\"}: routed tokens of the last step, int64 [layer, expert], or [layer, domain, expert]."},
};
const Binding kFields[] = {
    {"attempt", field_attempt, "run.attempt: how often it was resumed."},
    {"stopping", field_stopping, "run.stopping: true once it was asked to stop (SIGTERM, SIGUSR1, a file `stop` in its folder) and has saved; run:train and run:steps then end."},
    {"model", field_model, "run.model: the model."},
    {"step", field_step, "run.step: optimizer steps done."},
    {"num_steps", field_num_steps, "run.num_steps: length of the run by its configuration."},
    {"folder", field_folder, "run.folder: its folder; nil with log = false."},
    {"domains", field_domains, "run.domains: names of the data's domains."},
    {"config", field_config, "run.config: the configuration that it was built from, derived values filled in."},
};
const Binding kMeta[] = {{"__tostring", text, "tostring(run): one line about it."}, {"__newindex", on_all_ranks<assign_to_run>, "run.lr = …, run.schedule = …, run.optimizer = …, run.data = …"}};
}  // namespace

void open_run(lua_State* L) {
    set_functions(L, "moe.", run_functions());
    luaL_newmetatable(L, kMetricsType);
    push_function(L, kMetricsText, "step metrics:__tostring");
    lua_setfield(L, -2, "__tostring");
    lua_pop(L, 1);
    auto both = [](std::span<const Binding> a, std::span<const Binding> b) {
        std::vector<Binding> all(a.begin(), a.end());
        all.insert(all.end(), b.begin(), b.end());
        return all;
    };
    static const std::vector<Binding> methods = both(kMethods, control_methods()), fields = both(kFields, control_fields());
    register_type<RunValue>(L, {.name = nullptr, .help = "run: a model in training with its data, optimizer and log folder.", .methods = methods, .fields = fields, .meta = kMeta});
    open_job(L);
}
}  // namespace moe::lua
