// Callbacks of a run: functions of a script that are called after steps and at events.
#include "core/base/suggest.h"
#include "core/train/agree.h"
#include "lua/bind/bind.h"
#include "lua/bind/ranks.h"
#include "lua/bind/run.h"
#include "lua/bind/script.h"
#include "lua/bind/source.h"

#include <algorithm>

namespace moe::lua {

/// What run:on and run:every give back. Its user value is the callback itself.
struct CallbackValue {
    std::shared_ptr<RunState> state;
};
template <>
struct TypeName<CallbackValue> {
    static constexpr const char* value = "callback";
};

namespace {
const std::vector<std::string> kEvents = {"step", "skip", "spike", "evaluate", "save"};

// The run's user value is {event = {callback, …}}, a callback is {every, function or false once it is off, its text, the list that it is in}.
enum Part { kEvery = 1, kFunction, kText, kList };

/// Pushes the list of an event's callbacks.
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

std::string text_of(lua_State* L, int callback) {
    lua_rawgeti(L, callback, kText);
    std::string text = to_string(L, -1);
    lua_pop(L, 1);
    return text;
}

bool is_on(lua_State* L, int callback) {
    bool on = lua_rawgeti(L, callback, kFunction) != LUA_TBOOLEAN;
    lua_pop(L, 1);
    return on;
}

/// Adds the function at index 3 to the run at index 1, and pushes the handle.
int add_callback(lua_State* L, const std::string& event, int64_t every, const std::string& when) {
    auto state = check<RunValue>(L, 1, "run").state;
    std::string place = lua_isfunction(L, 3) ? function_place(L, 3) : got_text(L, 3);
    push<CallbackValue>(L, {state});
    lua_createtable(L, 4, 0);
    lua_pushinteger(L, every);
    lua_rawseti(L, -2, kEvery);
    lua_pushvalue(L, 3);
    lua_rawseti(L, -2, kFunction);
    push_string(L, fmt::format("callback {}: {}, {}", ++state->last_callback, when, place));
    lua_rawseti(L, -2, kText);
    push_callbacks(L, 1, event);
    lua_pushvalue(L, -2);
    lua_rawseti(L, -2, lua_Integer(lua_rawlen(L, -2)) + 1);
    lua_rawseti(L, -2, kList);
    lua_setiuservalue(L, -2, 1);
    ++state->num_callbacks;
    return 1;
}

int every(lua_State* L) {
    live_run(L);
    int64_t n = check_integer(L, 2, "steps");
    MOE_CHECK(n > 0, usage, "run:every: steps", std::to_string(n), "1 or more", "");
    check_function(L, 3, "f");
    return add_callback(L, "step", n, n == 1 ? "every step" : fmt::format("every {} steps", n));
}

int on(lua_State* L) {
    live_run(L);
    std::string event = check_string(L, 2, "event");
    check_function(L, 3, "f");
    if (std::find(kEvents.begin(), kEvents.end(), event) == kEvents.end()) {
        std::string want;
        for (auto& e : kEvents) want += (want.empty() ? "one of " : ", ") + e;
        MOE_THROW(usage, "run:on: event", '"' + event + '"', want, did_you_mean(event, kEvents));
    }
    return add_callback(L, event, 1, "on " + event);
}

/// Takes the callback of the handle at index out of its list; one that is off stays so.
void turn_off(lua_State* L, int index, RunState& state) {
    lua_getiuservalue(L, index, 1);
    int callback = lua_gettop(L);
    if (is_on(L, callback)) {
        lua_pushboolean(L, false);
        lua_rawseti(L, callback, kFunction);
        lua_rawgeti(L, callback, kList);
        lua_Integer n = lua_Integer(lua_rawlen(L, -1)), kept = 0;
        for (lua_Integer i = 1; i <= n; ++i) {
            lua_rawgeti(L, -1, i);
            if (lua_rawequal(L, -1, callback)) lua_pop(L, 1);
            else lua_rawseti(L, -2, ++kept);
        }
        lua_pushnil(L);
        lua_rawseti(L, -2, n);
        --state.num_callbacks;
    }
    lua_settop(L, callback - 1);
}

int off(lua_State* L) {
    turn_off(L, 1, *self<CallbackValue>(L).state);
    return 0;
}

int run_off(lua_State* L) {
    auto state = self<RunValue>(L).state;
    auto& callback = check<CallbackValue>(L, 2, "callback");
    MOE_CHECK(callback.state == state, usage, "run:off: callback", "one of another run", "what this run's run:on or run:every gave", "print(run) lists its callbacks");
    turn_off(L, 2, *state);
    return 0;
}

/// `local h <close> = run:every(…)`: off at the end of the scope.
int close_callback(lua_State* L) {
    auto* box = test_box<CallbackValue>(L, 1);
    if (box && *box) turn_off(L, 1, *(*box)->state);
    return 0;
}

int field_active(lua_State* L) {
    self<CallbackValue>(L);
    lua_getiuservalue(L, 1, 1);
    return lua_pushboolean(L, is_on(L, lua_gettop(L))), 1;
}

int text(lua_State* L) {
    auto* box = test_box<CallbackValue>(L, 1);
    if (!box || !*box) return lua_pushliteral(L, "callback (freed)"), 1;
    lua_getiuservalue(L, 1, 1);
    int callback = lua_gettop(L);
    push_string(L, text_of(L, callback) + (is_on(L, callback) ? "" : " (off)"));
    return 1;
}

/// Calls the callback at index with the value at index. An error comes out with the callback's name in front.
void call_back(lua_State* L, int callback, int value, int64_t step) {
    lua_rawgeti(L, callback, kFunction);
    lua_pushvalue(L, value);
    if (call_with_traceback(L, 1, 0) == LUA_OK) return;
    if (is_error(L, -1)) {
        ErrorParts parts = error_parts(L, -1);
        if (parts.kind != ErrorKind::interrupted && !train::is_agreed(parts)) {         // what all ranks have heard stays as it is
            parts.op = fmt::format("{}, at step {}: {}", text_of(L, callback), step, parts.op);
            push_error(L, parts);
        }
    }
    lua_error(L);
}

const Binding kRunMethods[] = {
    {"every", every, "run:every(n, f): calls f(m) after each step that n divides. Returns a callback: h:off() ends it, local h <close> = run:every(…) at the end of the scope; print(run) lists them.\n"
     "Example: local run = moe.run { config = moe.config \"cpu_tiny\":with { model = { num_layers = 2, vocab_size = 64, mla = { d_model = 64 } }, training = { train_steps = 4, seq_length = 32 } }, log = false }; local h = run:every(2, print); run:train(3); h:off()"},
    {"on", on, "run:on(event, f): calls f(m) at an event: \"step\" (after each step), \"skip\" (a step whose loss or gradient was not finite), \"spike\" (a loss above mean + logging.alarms.spike_sigma deviations of the 50 steps before, once there are 10), "
     "\"evaluate\" (with run:evaluate's result), \"save\" (run:save's {step, path}). An error in f ends run:train after that step and says which callback it was; the run can go on. Returns a callback: h:off() ends it, local h <close> = run:on(…) at the end of the scope."},
    {"off", run_off, "run:off(h): the callback h, from run:on or run:every, is called no more; as h:off(), and like that it does nothing where it is off already."},
};
const Binding kMethods[] = {{"off", off, "h:off(): it is called no more, at once, also in the middle of its own call and while a job trains. A second time does nothing."}};
const Binding kFields[] = {{"active", field_active, "h.active: true until it is off."}};
const Binding kMeta[] = {{"__tostring", text, "tostring(h): its number, when it is called, and where its function stands."}};
constexpr Binding kClose = {"__close", close_callback, "local h <close> = run:every(…): off at the end of the scope."};
}  // namespace

std::span<const Binding> callback_methods() { return kRunMethods; }

void check_not_firing(const RunState& state, const std::string& op, std::initializer_list<const char*> events) {
    for (const char* event : events)
        MOE_CHECK(std::find(state.firing.begin(), state.firing.end(), std::pair(std::this_thread::get_id(), std::string(event))) == state.firing.end(), state, op, fmt::format("a call from a callback of \"{}\"", event), "one from outside of it",
                  "what it does would call the callback again; training goes on when the callback returns");
}

void fire(lua_State* L, int run_index, const std::string& event, int64_t step) {
    struct Firing {
        std::shared_ptr<RunState> state;
        decltype(RunState::firing)::iterator place;
        Firing(std::shared_ptr<RunState> s, const std::string& event) : state(std::move(s)), place(state->firing.emplace(state->firing.end(), std::this_thread::get_id(), event)) {}
        ~Firing() { state->firing.erase(place); }
    } firing(check<RunValue>(L, run_index, "run").state, event);
    int value = lua_gettop(L);
    luaL_checkstack(L, 10, "callbacks");
    push_callbacks(L, run_index, event);
    // A copy: what a callback adds or turns off counts from the next event on, but for what is off now.
    lua_Integer n = lua_Integer(lua_rawlen(L, -1));
    lua_createtable(L, int(n), 0);
    for (lua_Integer i = 1; i <= n; ++i) {
        lua_rawgeti(L, -2, i);
        lua_rawseti(L, -2, i);
    }
    int list = lua_gettop(L), callback = list + 1;
    for (lua_Integer i = 1; i <= n; ++i) {
        lua_rawgeti(L, list, i);
        lua_rawgeti(L, callback, kEvery);
        bool is_due = step % lua_tointeger(L, -1) == 0;
        lua_pop(L, 1);
        if (is_due && is_on(L, callback)) call_back(L, callback, value, step);
        lua_settop(L, list);
    }
    lua_settop(L, value - 1);
}

void fire_on_all(lua_State* L, const std::string& event, int64_t step) {
    if (!ranks_of(L)) return fire(L, 1, event, step);
    lua_pushvalue(L, 1);
    lua_insert(L, -2);
    settle(L, 2, "the callbacks of " + running(L), [&](lua_State* S) { fire(S, 1, event, step); });
}

void fire_step(lua_State* L, int run_index, const train::StepMetrics& m, bool spikes) {
    for (const char* event : {"step", "skip", "spike"}) {
        if (event[1] == 'k' && !m.skipped) continue;
        if (event[1] == 'p' && !spikes) continue;
        push_metrics(L, m);
        fire(L, run_index, event, m.step);
    }
}

void call_back_step(lua_State* L, int run_index, train::Run& run, RunState& state, const train::StepMetrics& m) {
    bool spikes = is_spike(state, m.loss, run.config().logging.alarms.spike_sigma);
    if (!ranks_of(L)) return fire_step(L, run_index, m, spikes);
    if (run.model().mesh().world.all_reduce(int64_t(state.num_callbacks > 0), dist::ReduceOp::max) == 0) return;
    lua_pushvalue(L, run_index);
    settle(L, 1, fmt::format("the callbacks of step {}", m.step), [&](lua_State* S) { fire_step(S, 1, m, spikes); });
}

std::string callbacks_text(lua_State* L, int run_index) {
    std::string out;
    int top = lua_gettop(L);
    if (lua_getiuservalue(L, run_index, 1) == LUA_TTABLE) {
        for (auto& event : kEvents) {
            if (lua_getfield(L, top + 1, event.c_str()) == LUA_TTABLE) {
                for (lua_Integer i = 1, n = lua_Integer(lua_rawlen(L, -1)); i <= n; ++i) {
                    lua_rawgeti(L, top + 2, i);
                    out += "\n  " + text_of(L, top + 3);
                    lua_pop(L, 1);
                }
            }
            lua_settop(L, top + 1);
        }
    }
    lua_settop(L, top);
    return out;
}

void open_callbacks(lua_State* L) {
    register_type<CallbackValue>(L, {.name = nullptr, .help = "callback: what run:on and run:every give back; h:off() ends it, and so does the end of a scope with local h <close> = ….",
                                     .methods = kMethods, .fields = kFields, .meta = kMeta});
    luaL_getmetatable(L, TypeName<CallbackValue>::value);
    push_function(L, kClose, "callback:__close");
    lua_setfield(L, -2, "__close");
    lua_pop(L, 1);
}
}  // namespace moe::lua
