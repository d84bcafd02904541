// Runs in Lua: train, evaluate, trace, callbacks between steps.
#include "lua/bind/run.h"

#include "core/base/log.h"
#include "core/data/tokenizer.h"
#include "core/train/agree.h"
#include "lua/bind/bind.h"
#include "lua/bind/config.h"
#include "lua/bind/control.h"
#include "lua/bind/intervene.h"
#include "lua/bind/job.h"
#include "lua/bind/ranks.h"
#include "lua/bind/tensor.h"
#include "lua/bind/trace.h"

#include <ATen/ATen.h>

#include <cmath>
#include <cstring>

namespace moe::lua {
namespace {
constexpr const char* kMetricsType = "step metrics";
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

void remember_step(RunState& state, const train::StepMetrics& m) {
    std::lock_guard guard(state.mutex);
    state.last = m;
}

void say_schedule_ended(train::Run& run, const RunState& state) {
    if (run.current_step() != run.num_steps() + 1 || !state.console || !run.config().logging.console || run.model().mesh().world.rank() != 0) return;
    for (auto& item : run.interventions().items())
        if (item.what == "schedule" || item.what == "lr") return;
    log::info(fmt::format("the schedule of {} steps (training.train_steps) has ended: the learning rate stays at {:.1e} from here on", run.num_steps(), run.next_learning_rate()));
}

namespace {
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
    check_not_firing(*state, running(L), {"step", "skip", "spike"});
    train::StepMetrics m;
    {
        Interruptible interruptible(L, r);
        m = r->step();
    }
    say_schedule_ended(*r, *state);
    remember_step(*state, m);
    bool logged = state->console && r->config().logging.console && (m.step == 1 || m.step % r->config().training.log_interval == 0) && !control(L).json;
    control(L).last_log = logged ? m.line() : "";
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

int evaluate(lua_State* L) {
    auto r = run(L);
    Options o(L, 2, {"max_batches"});
    check_not_firing(*self<RunValue>(L).state, "run:evaluate", {"evaluate"});
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
    push<TraceValue>(L, {trace, data::open_tokenizer(r->config().data.tokenizer), t.seq_length, o.integer("tokens", 0)});
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
int field_last(lua_State* L) {
    auto r = run_of(L);
    auto state = self<RunValue>(L).state;
    auto bytes = [&] {
        std::lock_guard guard(state->mutex);
        return state->last ? std::string(reinterpret_cast<const char*>(&*state->last), sizeof *state->last) : std::string();
    };
    bool asks = r->edge().has_turns() && !r->edge().is_trainer();      // as for run.step
    std::string last = asks ? from_rank_0(L, "run.last", bytes) : bytes();
    if (last.empty()) return lua_pushnil(L), 1;
    train::StepMetrics m;
    std::memcpy(&m, last.data(), sizeof m);
    push_metrics(L, m);
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
    std::string text = fmt::format("run: step {} of {}, {}{}", r.current_step(), r.num_steps(), r.folder().empty() ? "no folder" : r.folder(), r.is_closed() ? ", closed" : "");
    for (auto& item : r.interventions().items()) text += fmt::format("\n  intervention {}: {}", item.id, train::Interventions::text(item.what, item.args));
    push_string(L, text + callbacks_text(L, 1));
    return 1;
}

int save(lua_State* L) {
    auto r = run(L);
    check_not_firing(*self<RunValue>(L).state, "run:save", {"save"});
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
    check_no_job(L, self<RunValue>(L), "run:close");
    run(L)->close();
    return 0;
}

const Binding kMethods[] = {
    {"train", on_all_ranks<do_train>, "run:train(n): n optimizer steps, by default up to the configuration's length; beyond it the learning rate stays where the schedule has ended. Returns the last step's metrics (also run.last)."},
    {"steps", steps, "for step, m in run:steps(n) do … end: one optimizer step an iteration; leaving the loop stops there."},
    {"save", on_all_ranks<save>, "run:save(name): saves the whole state and returns the checkpoint's folder: checkpoints/<name> in the run's folder, never pruned; without a name checkpoints/step_N; a name with a \"/\" is a path. Waits until it is on the disk."},
    {"close", on_all_ranks<close_run>, "run:close(): waits for the last save and gives the run's folder free, an error while a job trains the run; no more steps: moe.resume(run) goes on from its newest checkpoint."},
    {"evaluate", on_all_ranks<evaluate>, "run:evaluate {max_batches =}: loss on validation data in nats a token: {loss (mean over domains), bits, num_tokens, by_domain = {{name, loss}, …}, and with MTP acceptance = {share of positions where module k's token is the main head's}}. Routers' counts and biases do not move."},
    {"eval", on_all_ranks<evaluate>, "run:eval {max_batches =}: as run:evaluate."},
    {"start", on_all_ranks<start_job>, "run:start(n): n steps (by default to the configured length) in the background while other inputs run; gives a job. The log line of its last step, which tells the end, is printed whatever training.log_interval is. Whatever touches the run meanwhile waits for the end of the step at hand. Callbacks are called between other inputs. "
     "On several ranks there is one job at a time, and what all ranks call meanwhile, about whatever run, has its turn between two of its steps."},
    {"trace", on_all_ranks<make_trace>, "run:trace {batches =, tokens =, weights = true, file =, memory = 2^28}: runs validation data through the model and records every routing decision, as model:trace does. A batch has micro_batch_size sequences of each data-parallel rank; tokens is rounded up to whole batches; every rank gets all of the trace."},
    {"counts", counts, "run:counts {by = \"domain\"}: routed tokens of the last step, int64 [layer, expert], or [layer, domain, expert]."},
};
const Binding kFields[] = {
    {"attempt", field_attempt, "run.attempt: how often it was resumed."},
    {"stopping", field_stopping, "run.stopping: true once it was asked to stop (SIGTERM, SIGUSR1, a file `stop` in its folder) and has saved; run:train and run:steps then end."},
    {"model", field_model, "run.model: the model."},
    {"step", field_step, "run.step: optimizer steps done."},
    {"last", field_last, "run.last: the metrics of the last step that was done here, as run:train returns them; nil before the first."},
    {"num_steps", field_num_steps, "run.num_steps: length of the run by its configuration."},
    {"folder", field_folder, "run.folder: its folder; nil with log = false."},
    {"domains", field_domains, "run.domains: names of the data's domains."},
    {"config", field_config, "run.config: the configuration that it was built from, derived values filled in."},
};
const Binding kMeta[] = {{"__tostring", text, "tostring(run): one line about it, and one for each intervention in force and each callback."}, {"__newindex", on_all_ranks<assign_to_run>, "run.lr = …, run.schedule = …, run.optimizer = …, run.data = …"}};
}  // namespace

void open_run(lua_State* L) {
    set_functions(L, "moe.", run_functions());
    luaL_newmetatable(L, kMetricsType);
    push_function(L, kMetricsText, "step metrics:__tostring");
    lua_setfield(L, -2, "__tostring");
    lua_pop(L, 1);
    auto joined = [](std::initializer_list<std::span<const Binding>> lists) {
        std::vector<Binding> all;
        for (auto& list : lists) all.insert(all.end(), list.begin(), list.end());
        return all;
    };
    static const std::vector<Binding> methods = joined({kMethods, callback_methods(), control_methods()}), fields = joined({kFields, control_fields()});
    register_type<RunValue>(L, {.name = nullptr, .help = "run: a model in training with its data, optimizer and log folder.\n"
        "Example: local run = moe.run { config = moe.config \"cpu_tiny\":with { model = { num_layers = 2, vocab_size = 64, mla = { d_model = 64 } }, training = { train_steps = 4, seq_length = 32 } }, log = false }; print(run:train(2))", .methods = methods, .fields = fields, .meta = kMeta});
    open_callbacks(L);
    open_job(L);
}
}  // namespace moe::lua
