#include "lua/bind/script.h"

#include "core/base/random.h"
#include "core/base/suggest.h"
#include "core/tensor/check.h"
#include "core/train/interventions.h"
#include "lua/bind/source.h"
#include "lua/bind/tensor.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <cstring>

namespace moe::lua {
namespace {
using train::Values;
thread_local Control* background = nullptr;
const char kLive = 0;                                 // key of the registry's table of functions with replay = false

/// Lua's own generator: its four words, where math.random is what Lua made it.
void* math_random_state(lua_State* L) {
    lua_getfield(L, LUA_REGISTRYINDEX, LUA_LOADED_TABLE);
    lua_getfield(L, -1, "math");
    void* state = nullptr;
    if (lua_istable(L, -1) && lua_getfield(L, -1, "random") == LUA_TFUNCTION && lua_iscfunction(L, -1) && lua_getupvalue(L, -1, 1)) {
        if (lua_type(L, -1) == LUA_TUSERDATA && lua_rawlen(L, -1) == 32) state = lua_touserdata(L, -1);
    }
    return state;                                     // the caller resets the stack
}

/// Seeds the generators, of the GPU in use too, and puts them back.
class Seeded {
public:
    Seeded(lua_State* L, uint64_t seed) {
        int top = lua_gettop(L);
        generators_.push_back({at::detail::getDefaultCPUGenerator(), {}});
        if (at::globalContext().hasCUDA()) generators_.push_back({at::globalContext().defaultGenerator(at::Device(at::kCUDA)), {}});
        for (auto& [generator, kept] : generators_) {
            std::lock_guard guard(generator.mutex());
            kept = generator.get_state();
            generator.set_current_seed(seed);
        }
        random_ = math_random_state(L);
        if (random_) {
            std::memcpy(words_, random_, sizeof words_);
            uint64_t next[4];
            for (uint32_t i = 0; i < 4; ++i) {
                auto r = philox({i, 0, 0, 0}, seed);
                next[i] = uint64_t(r[0]) << 32 | r[1] | 1;
            }
            std::memcpy(random_, next, sizeof next);
        }
        lua_settop(L, top);
    }
    ~Seeded() {
        for (auto& [generator, kept] : generators_) {
            std::lock_guard guard(generator.mutex());
            generator.set_state(kept);
        }
        if (random_) std::memcpy(random_, words_, sizeof words_);
    }

private:
    std::vector<std::pair<at::Generator, at::Tensor>> generators_;      ///< with the states to go back to
    void* random_ = nullptr;
    uint64_t words_[4];
};

int add_traceback(lua_State* L) {
    if (lua_istable(L, 1) && !is_error(L, 1)) return 1;              // a script's own object comes out as it is
    add_traceback_to_error(L);
    return 1;
}

void set_integer(lua_State* L, const char* name, int64_t value) {
    lua_pushinteger(L, value);
    lua_setfield(L, -2, name);
}
void set_tensor(lua_State* L, const char* name, const at::Tensor& value) {
    if (value.defined()) push_tensor(L, value);
    else lua_pushnil(L);
    lua_setfield(L, -2, name);
}

/// A field that a decision does not have here is nil, a misspelt one an error: nil would mean "as it was" to what calls a hook.
int index_decision(lua_State* L) {
    static const std::vector<std::string> kKnown = {"layer", "step", "training", "tokens", "logits", "scores", "bias", "ids", "weights"};
    std::string key = lua_type(L, 2) == LUA_TSTRING ? lua_tostring(L, 2) : got_text(L, 2);
    if (std::find(kKnown.begin(), kKnown.end(), key) == kKnown.end()) MOE_THROW(usage, "decision." + key.substr(0, 80), "no such field", fmt::format("one of {}", fmt::join(kKnown, ", ")), did_you_mean(key, kKnown));
    return lua_pushnil(L), 1;
}
constexpr Binding kIndexDecision = {"__index", index_decision, "decision.x: what a hook of the router is given."};

/// {layer, step, training, tokens} of a decision.
void push_decision(lua_State* L, const routing::RouteCall& call) {
    lua_createtable(L, 0, 8);
    if (luaL_newmetatable(L, "moe decision")) {
        push_function(L, kIndexDecision, "decision:__index");
        lua_setfield(L, -2, "__index");
    }
    lua_setmetatable(L, -2);
    set_integer(L, "layer", call.layer);
    set_integer(L, "step", call.step);
    lua_pushboolean(L, call.training);
    lua_setfield(L, -2, "training");
    set_tensor(L, "tokens", call.token_ids_T);
}

at::Tensor tensor_at(lua_State* L, int index, const char* what) {
    if (lua_isnil(L, index)) return {};
    if (lua_istable(L, index)) return tensor_from_table(L, index, std::nullopt);
    return check_tensor(L, index, what);
}

/// "run.lua:12", where the function of a stored form stands.
std::string name_of(const Values& f) { return f.value("name", "a function"); }
/// What a function of the router's is doing: "hook pre_topk, run.lua:12, layer 1, at step 5".
std::string decision_place(const char* what, const std::string& name, const routing::RouteCall& call) {
    return fmt::format("{}, {}, {}", what, name, call.place());
}

uint64_t seed_of(uint64_t run_seed, int64_t step, uint32_t kind) {
    auto r = draw({run_seed, routing::kScriptPurpose, uint32_t(step), kind}, 0);
    return uint64_t(r[0]) << 32 | r[1];
}
}  // namespace

InBackground::InBackground(Control& control) { background = &control; }
InBackground::~InBackground() { background = nullptr; }
Control* background_control() { return background; }

int call_with_traceback(lua_State* L, int num_arguments, int num_results) {
    int base = lua_gettop(L) - num_arguments;
    lua_pushcfunction(L, add_traceback);
    lua_insert(L, base);
    int status = lua_pcall(L, num_arguments, num_results, base);
    lua_remove(L, base);
    return status;
}

void call_protected(lua_State* co, int num_arguments, int num_results) {
    int status = call_with_traceback(co, num_arguments, num_results);
    if (status == LUA_OK) return;
    ErrorParts parts = error_parts(co, -1);
    if (status == LUA_ERRMEM) parts.kind = ErrorKind::memory;
    lua_pop(co, 1);
    throw Error(parts);
}

Callable::Callable(lua_State* L) : control_(&session_control(L)), alive_(control_->alive), lock_(control_->lock) {
    co_ = lua_newthread(L);
    control_slot(co_) = control_;
    lua_insert(L, -2);
    lua_xmove(L, co_, 1);                             // the function waits at the bottom of the coroutine's stack
    lua_rawsetp(L, LUA_REGISTRYINDEX, this);          // and the coroutine in the registry
}

Callable::~Callable() {
    std::lock_guard guard(*lock_);
    if (!*alive_) return;
    lua_pushnil(co_);
    lua_rawsetp(co_, LUA_REGISTRYINDEX, this);
}

void Callable::call(const std::function<std::string()>& place, uint64_t seed, const std::function<int(lua_State*)>& push, int num_results, const std::function<void(lua_State*)>& take) {
    try {
        call_function(seed, push, num_results, take);
    } catch (const Error& e) {
        if (e.kind() == ErrorKind::interrupted) throw;
        ErrorParts parts = e.parts();
        parts.op = fmt::format("{}: {}", place(), parts.op);
        throw Error(std::move(parts));
    }
}

void Callable::call_function(uint64_t seed, const std::function<int(lua_State*)>& push, int num_results, const std::function<void(lua_State*)>& take) {
    std::lock_guard guard(*lock_);
    MOE_CHECK(*alive_, state, "a hook", "a session that has ended", "a live one", "");
    // Its coroutine has one stack, and what it calls would call it again.
    MOE_CHECK(!is_called_, state, "a hook", "a call from inside of itself", "one from outside", "functions of the router, the optimizer and the data only give values: they run no model that calls them");
    Control& mine = background ? *background : *control_;
    struct Running {
        Control& control;
        lua_State *before, *co;
        int top;
        Control* slot;
        bool& is_called;
        Running(Control& c, lua_State* co, bool& called) : control(c), before(c.running), co(co), top(lua_gettop(co)), slot(control_slot(co)), is_called(called) {
            is_called = true;
            control_slot(co) = &c;
            if (!c.interrupted) lua_sethook(co, nullptr, 0, 0);
            c.running = co;
            ++c.alone;                                // hooks are called as often as a rank's layers want
        }
        ~Running() {
            is_called = false;
            --control.alone;
            lua_settop(co, top);
            control_slot(co) = slot;
            control.running = before;
            if (control.interrupted && before) interrupt(control);
        }
    } running(mine, co_, is_called_);
    luaL_checkstack(co_, 20, "a hook");
    Seeded seeded(co_, seed);
    int base = lua_gettop(co_);
    lua_pushvalue(co_, 1);
    int n = push(co_);
    call_protected(co_, n, num_results);
    // What `take` checks may throw Lua's or moe's errors: both end as moe::Error.
    try {
        lua_State* results = co_;
        for (int i = 1; i <= num_results; ++i) lua_pushvalue(results, base + i);
        take(results);
    } catch (const std::exception&) {
        throw Error(current_exception_parts());
    }
}

Values script_of(lua_State* L, int index, bool replay) {
    index = lua_absindex(L, index);
    if (replay) return function_to_values(L, index);
    if (lua_rawgetp(L, LUA_REGISTRYINDEX, &kLive) != LUA_TTABLE) {
        lua_pop(L, 1);
        lua_newtable(L);
        lua_pushvalue(L, -1);
        lua_rawsetp(L, LUA_REGISTRYINDEX, &kLive);
    }
    lua_pushvalue(L, index);
    int ref = luaL_ref(L, -2);
    lua_pop(L, 1);
    return {{"live", ref}, {"name", function_place(L, index)}};
}

train::ScriptCompiler script_compiler(lua_State* L) {
    lua_rawgeti(L, LUA_REGISTRYINDEX, LUA_RIDX_MAINTHREAD);
    lua_State* main = lua_tothread(L, -1);
    lua_pop(L, 1);
    Control* c = &session_control(L);
    auto alive = c->alive;
    auto compile = [alive, main, c](const Values& f) {
        MOE_CHECK(*alive, state, "a hook", "a session that has ended", "a live one", "");
        std::lock_guard guard(*c->lock);
        // Whatever Lua raises here ends at the guard of the binding that asked.
        lua_State* on = c->running ? c->running.load() : main;
        luaL_checkstack(on, 10, "a hook");
        if (f.contains("live")) {
            lua_rawgetp(on, LUA_REGISTRYINDEX, &kLive);
            if (lua_istable(on, -1)) lua_rawgeti(on, -1, f["live"].get<int64_t>());
            else lua_pushnil(on);
            lua_remove(on, -2);
        } else push_function_of(on, f);
        if (!lua_isfunction(on, -1)) {
            lua_pop(on, 1);
            MOE_THROW(state, "a hook", "a function of another session", "one that was stored", "");
        }
        return std::make_shared<Callable>(on);
    };
    train::ScriptCompiler s;
    s.failures = std::make_shared<train::HookFailures>();
    s.is_stored = [](const Values& f) { return !f.contains("live"); };
    s.score = [compile](const Values& f) -> routing::ScoreFunction {
        return [function = compile(f), name = name_of(f)](const at::Tensor& logits_TE, const routing::RouteCall& call) {
            at::Tensor out;
            auto place = [&] { return decision_place("router.score", name, call); };
            function->call(place, call.seed, [&](lua_State* L) { push_tensor(L, logits_TE); push_decision(L, call); return 2; }, 1, [&](lua_State* L) { out = tensor_at(L, -1, "scores"); });
            return out;
        };
    };
    s.pre_topk = [compile](const Values& f) -> routing::PreTopK {
        return [function = compile(f), name = name_of(f)](const at::Tensor& logits_TE, const at::Tensor& scores_TE, const at::Tensor& bias_E, const routing::RouteCall& call) {
            at::Tensor out;
            auto place = [&] { return decision_place("hook pre_topk", name, call); };
            auto push = [&](lua_State* L) {
                push_decision(L, call);
                set_tensor(L, "logits", logits_TE);
                set_tensor(L, "scores", scores_TE.clone());
                set_tensor(L, "bias", bias_E);
                return 1;
            };
            function->call(place, call.seed, push, 1, [&](lua_State* L) { out = tensor_at(L, -1, "scores"); });
            return out.defined() ? out : scores_TE;
        };
    };
    s.post_topk = [compile](const Values& f) -> routing::PostTopK {
        return [function = compile(f), name = name_of(f)](const at::Tensor& ids_TK, const at::Tensor& weights_TK, const at::Tensor& scores_TE, const routing::RouteCall& call) {
            std::pair<at::Tensor, at::Tensor> out;
            auto place = [&] { return decision_place("hook post_topk", name, call); };
            auto push = [&](lua_State* L) {
                push_decision(L, call);
                set_tensor(L, "ids", ids_TK.clone());
                set_tensor(L, "weights", weights_TK.clone());
                set_tensor(L, "scores", scores_TE);
                return 1;
            };
            function->call(place, call.seed, push, 2, [&](lua_State* L) { out = {tensor_at(L, -2, "ids"), tensor_at(L, -1, "weights")}; });
            return out;
        };
    };
    s.bias_rule = [compile](const Values& f, uint64_t run_seed) -> train::BiasRule {
        return [function = compile(f), name = name_of(f), run_seed](int64_t layer, int64_t step, const at::Tensor& counts_E, const at::Tensor& bias_E) {
            at::Tensor out;
            auto place = [&] { return fmt::format("router.balance, {}, layer {}, at step {}", name, layer, step); };
            auto push = [&](lua_State* L) {
                push_tensor(L, counts_E);
                push_tensor(L, bias_E);
                lua_createtable(L, 0, 2);
                set_integer(L, "layer", layer);
                set_integer(L, "step", step);
                return 3;
            };
            function->call(place, seed_of(run_seed, step, 0x8000u | uint32_t(layer)), push, 1, [&](lua_State* L) { out = tensor_at(L, -1, "bias"); });
            return out;
        };
    };
    s.schedule = [compile](const Values& f, uint64_t run_seed) -> train::Schedule {
        return [function = compile(f), name = name_of(f), run_seed](int64_t step) {
            double lr = 0;
            auto place = [&] { return fmt::format("run.schedule, {}, at step {}", name, step); };
            function->call(place, seed_of(run_seed, step, 0xfff0), [&](lua_State* L) { lua_pushinteger(L, step); return 1; }, 1, [&](lua_State* L) { lr = check_number(L, -1, "learning rate"); });
            return lr;
        };
    };
    s.data = [compile](const Values& f, uint64_t run_seed) -> train::BatchSource {
        return [function = compile(f), name = name_of(f), run_seed](int64_t step, int64_t num_sequences, int64_t seq_length) {
            data::Batch batch;
            auto place = [&] { return fmt::format("run.data, {}, at step {}", name, step); };
            auto push = [&](lua_State* L) {
                lua_createtable(L, 0, 3);
                set_integer(L, "step", step);
                set_integer(L, "sequences", num_sequences);
                set_integer(L, "seq_length", seq_length);
                return 1;
            };
            auto take = [&](lua_State* L) {
                batch.ids = tensor_at(L, -3, "ids");
                batch.targets = tensor_at(L, -2, "targets");
                batch.domain = tensor_at(L, -1, "domain");
            };
            function->call(place, seed_of(run_seed, step, 0xfff1), push, 3, take);
            MOE_CHECK(batch.ids.defined() && batch.ids.dim() == 2 && at::isIntegralType(batch.ids.scalar_type(), false), usage, place(), batch.ids.defined() ? "ids " + describe(batch.ids) : "no ids", "ids, targets, domain: ids int64 [sequences, seq_length]", "");
            batch.ids = batch.ids.to(at::kCPU, at::kLong).contiguous();
            if (!batch.targets.defined()) {
                batch.targets = at::full_like(batch.ids, -100);
                int64_t S = batch.ids.size(1);
                if (S > 1) batch.targets.narrow(1, 0, S - 1).copy_(batch.ids.narrow(1, 1, S - 1));
            }
            batch.targets = batch.targets.to(at::kCPU, at::kLong).contiguous();
            batch.domain = batch.domain.defined() ? batch.domain.to(at::kCPU, at::kInt).contiguous() : at::zeros_like(batch.ids, at::kInt);
            MOE_CHECK(batch.targets.sizes() == batch.ids.sizes() && batch.domain.sizes() == batch.ids.sizes(), shape, place(), "targets or domain of another shape", "that of ids", "");
            batch.doc_start = at::zeros_like(batch.ids, at::kInt);
            return batch;
        };
    };
    s.optimizer = [compile](const Values& f, uint64_t run_seed) -> train::OptimizerRule {
        return [function = compile(f), place_of_f = name_of(f), run_seed](const std::string& name, const at::Tensor& value, const at::Tensor& grad, const std::vector<at::Tensor>& state, int64_t step, double lr) {
            at::Tensor out;
            auto place = [&] { return fmt::format("run.optimizer, {}, {}, at update {}", place_of_f, name, step); };
            auto push = [&](lua_State* L) {
                push_string(L, name);
                push_tensor(L, value);
                push_tensor(L, grad);
                lua_createtable(L, int(state.size()), 0);
                for (size_t i = 0; i < state.size(); ++i) {
                    push_tensor(L, state[i]);
                    lua_rawseti(L, -2, lua_Integer(i) + 1);
                }
                lua_createtable(L, 0, 2);
                set_integer(L, "step", step);
                lua_pushnumber(L, lr);
                lua_setfield(L, -2, "lr");
                return 5;
            };
            function->call(place, seed_of(run_seed, step, 0xfff2) ^ hash_name(name), push, 1, [&](lua_State* L) { out = tensor_at(L, -1, "value"); });
            return out;
        };
    };
    return s;
}
}  // namespace moe::lua
