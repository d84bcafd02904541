// moe.autograd: operators whose forward and backward are functions of Lua, as nodes of LibTorch's graph.
// What must hold: the graph may outlive the call, the operator and the Lua state, and may be freed on any thread. So a node keeps Lua values as references that it only
// hands back to a list; Lua's own thread frees them. The engine knows no exception of Lua's: every call is a pcall, an error goes on as moe::Error.
#include "core/tensor/check.h"
#include "lua/bind/autograd.h"
#include "lua/bind/control.h"
#include "lua/bind/script.h"
#include "lua/bind/tensor.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>

#include <mutex>

namespace moe::lua {

/// What all operators of a Lua state share.
struct Host {
    std::mutex mutex;                        ///< of what follows
    lua_State* main = nullptr;               ///< null once the state is closed
    std::vector<int> given_back;             ///< references that nodes no longer need
};
using HostPtr = std::shared_ptr<Host>;

template <>
struct TypeName<HostPtr> {
    static constexpr const char* value = "autograd host";
};

struct Operator {
    std::string name;
};
template <>
struct TypeName<Operator> {
    static constexpr const char* value = "operator";
};

namespace {
using at::Tensor;
using torch::autograd::AutogradContext;
using Tensors = torch::autograd::variable_list;

char kKeys[2] = {};
const void* const kHost = &kKeys[0];         // the host
const void* const kContext = &kKeys[1];      // metatable of ctx

HostPtr& host_of(lua_State* L) {
    lua_rawgetp(L, LUA_REGISTRYINDEX, kHost);
    HostPtr& host = check<HostPtr>(L, lua_gettop(L), "host");
    lua_pop(L, 1);
    return host;
}
/// On Lua's thread: frees what nodes have given back.
void free_references(lua_State* L, Host& host) {
    std::vector<int> list;
    {
        std::lock_guard lock(host.mutex);
        list.swap(host.given_back);
    }
    for (int ref : list) luaL_unref(L, LUA_REGISTRYINDEX, ref);
}

/// What a node of the graph keeps of its call.
struct Call : torch::CustomClassHolder {
    HostPtr host;
    std::string name;
    int ctx = LUA_NOREF, backward = LUA_NOREF;
    int num_arguments = 0;
    std::vector<int> places;                        ///< of the tensors among the arguments, from 0
    std::vector<std::vector<int64_t>> shapes;       ///< of those tensors

    ~Call() override {
        std::lock_guard lock(host->mutex);
        if (host->main) host->given_back.insert(host->given_back.end(), {ctx, backward});
    }
};
/// The call that runs: its state, where its arguments start, and the forward function.
struct Running {
    lua_State* L;
    int first, forward;
    c10::intrusive_ptr<Call> call;
};

int with_traceback(lua_State* L) {
    ErrorParts parts = error_parts(L, 1);
    luaL_traceback(L, L, nullptr, 1);
    parts.traceback = parts.traceback.empty() ? lua_tostring(L, -1) : parts.traceback + "\n" + lua_tostring(L, -1);
    push_error(L, parts);
    return 1;
}
/// Stack: function, n arguments → results. An error of Lua's comes out as moe::Error.
int call_lua(lua_State* L, int n) {
    int base = lua_gettop(L) - n;
    lua_pushcfunction(L, with_traceback);
    lua_insert(L, base);
    if (lua_pcall(L, n, LUA_MULTRET, base) != LUA_OK) {
        ErrorParts parts = error_parts(L, -1);
        lua_settop(L, base - 1);
        throw Error(std::move(parts));
    }
    lua_remove(L, base);
    return lua_gettop(L) - base + 1;
}

/// What LibTorch's engine hands on, from the thread that asked for gradients to those that make them: who waits, and on which coroutine.
struct Waiting : c10::DebugInfoBase {
    HostPtr host;
    lua_State* L;
    Waiting(HostPtr h, lua_State* l) : host(std::move(h)), L(l) {}
};
constexpr auto kWaiting = c10::DebugInfoKind::TEST_INFO_2;         // moe's own backward uses none of the kinds

/// A turn of this thread with the Lua state, for a backward: `L` is a coroutine that nobody else uses meanwhile. Three kinds of threads come here. One that holds the state's lock (backward of a script on the
/// CPU) goes on where it is. An engine's thread (on a GPU) that works for one that waits with the lock takes that one's place. A job's, in its step, takes the lock as for a hook. Any other is refused: it could
/// only run beside another thread, or wait for one that waits for it.
class Turn {
public:
    Turn(const HostPtr& host, const std::string& name) {
        MOE_CHECK(host->main, state, name + ": backward", "a Lua state that is closed", "a live one", "");
        Control& session = control(host->main);
        Control* own = background_control();
        auto* waiting = static_cast<Waiting*>(c10::ThreadLocalDebugInfo::get(kWaiting));
        if (session.lock->is_mine()) {
            L = own && own->running ? own->running : session.running;
        } else if (waiting && waiting->host == host) {
            engine_ = std::unique_lock(one_);
            L = waiting->L;
        } else {
            MOE_CHECK(own, state, name + ": backward", "a call from a thread that is not Lua's", "a backward that Lua waits for", "parts written in Lua train on a GPU without operators of moe.autograd");
            lock_ = std::unique_lock(*session.lock);
            MOE_CHECK(*session.alive, state, name + ": backward", "a session that has ended", "a live one", "");
            MOE_CHECK(lua_checkstack(host->main, 2), memory, name + ": backward", "no room on Lua's stack", "", "");
            L = lua_newthread(host->main);
            control_slot(L) = own;
            ref_ = luaL_ref(host->main, LUA_REGISTRYINDEX);
            own_ = own;
            before_ = own->running.exchange(L);
        }
        top_ = lua_gettop(L);
    }
    ~Turn() {
        lua_settop(L, top_);
        if (!own_) return;
        own_->running = before_;
        luaL_unref(L, LUA_REGISTRYINDEX, ref_);
    }
    Turn(const Turn&) = delete;
    lua_State* L = nullptr;

private:
    static inline std::recursive_mutex one_;           // a backward inside of one comes on the same thread
    std::unique_lock<std::recursive_mutex> engine_;
    std::unique_lock<StateLock> lock_;
    Control* own_ = nullptr;
    lua_State* before_ = nullptr;
    int ref_ = LUA_NOREF, top_ = 0;
};

struct LuaFunction : torch::autograd::Function<LuaFunction> {
    static Tensors forward(AutogradContext* ctx, const Running* running, at::TensorList inputs) {
        lua_State* L = running->L;
        Call& call = *running->call;
        ctx->saved_data["call"] = c10::IValue::make_capsule(running->call);
        int top = lua_gettop(L);
        luaL_checkstack(L, call.num_arguments + 8, "arguments of an operator");
        lua_pushvalue(L, running->forward);
        lua_rawgeti(L, LUA_REGISTRYINDEX, call.ctx);
        for (int i = 0; i < call.num_arguments; ++i) lua_pushvalue(L, running->first + i);
        int n = call_lua(L, call.num_arguments + 1);
        Tensors outputs;
        for (int i = 0; i < n; ++i) {
            auto* box = test_box<Tensor>(L, top + 1 + i);
            MOE_CHECK(box && *box, usage, call.name + ": forward", got_text(L, top + 1 + i) + " as result " + std::to_string(i + 1), "tensors", "what backward needs goes into ctx");
            outputs.push_back(**box);
        }
        MOE_CHECK(n > 0, usage, call.name + ": forward", "no result", "at least one tensor", "");
        lua_settop(L, top);
        lua_rawgeti(L, LUA_REGISTRYINDEX, call.ctx);
        if (lua_getfield(L, -1, "saved_tensors") == LUA_TTABLE) {
            Tensors saved;
            for (lua_Integer i = 1, count = lua_Integer(lua_rawlen(L, -1)); i <= count; ++i) {
                lua_rawgeti(L, -1, i);
                saved.push_back(check_tensor(L, lua_gettop(L), "saved tensor"));
                lua_pop(L, 1);
            }
            // An output among them would hold the graph that holds it, were it kept by Lua: autograd's own list knows how.
            ctx->save_for_backward(std::move(saved));
            lua_pushnil(L);
            lua_setfield(L, -3, "saved_tensors");
        }
        lua_settop(L, top);
        if (call.backward == LUA_REFNIL) ctx->mark_non_differentiable(outputs);
        return outputs;
    }

    static Tensors backward(AutogradContext* ctx, Tensors grads) {
        auto call = c10::static_intrusive_pointer_cast<Call>(ctx->saved_data.at("call").toCapsule());
        Turn turn(call->host, call->name);
        lua_State* L = turn.L;
        int top = lua_gettop(L);
        MOE_CHECK(lua_checkstack(L, int(grads.size()) + 12), memory, call->name + ": backward", "no room on Lua's stack", "", "");
        lua_rawgeti(L, LUA_REGISTRYINDEX, call->backward);
        lua_rawgeti(L, LUA_REGISTRYINDEX, call->ctx);
        Tensors saved = ctx->get_saved_variables();
        if (!saved.empty()) {
            push_tensors(L, saved);
            lua_setfield(L, -2, "saved_tensors");
        }
        for (auto& g : grads) push_tensor(L, g);
        int n = call_lua(L, int(grads.size()) + 1);
        Tensors out(call->places.size() + 1);       // [0]: of the pointer to the running call
        for (size_t i = 0; i < call->places.size(); ++i) {
            int place = call->places[i], at = top + 1 + place;
            if (place >= n || lua_isnil(L, at)) continue;
            auto* box = test_box<Tensor>(L, at);
            MOE_CHECK(box && *box, usage, call->name + ": backward", got_text(L, at) + " for argument " + std::to_string(place + 1), "a gradient for each argument: a tensor, or nil", "");
            MOE_CHECK((*box)->sizes() == at::IntArrayRef(call->shapes[i]), shape, call->name + ": backward: gradient of argument " + std::to_string(place + 1), shape_text((*box)->sizes()),
                      shape_text(call->shapes[i]), "a gradient has its argument's shape");
            out[i + 1] = **box;
        }
        if (!saved.empty()) {
            lua_rawgeti(L, LUA_REGISTRYINDEX, call->ctx);
            lua_pushnil(L);
            lua_setfield(L, -2, "saved_tensors");
        }
        return out;
    }
};

/// ctx:save(a, b, …) and ctx:saved().
int context_save(lua_State* L) {
    check_table(L, 1, "self");
    int n = lua_gettop(L) - 1;
    lua_createtable(L, n, 0);
    for (int i = 1; i <= n; ++i) {
        check_tensor(L, i + 1, "tensor");
        lua_pushvalue(L, i + 1);
        lua_rawseti(L, -2, i);
    }
    lua_setfield(L, 1, "saved_tensors");
    return 0;
}
int context_saved(lua_State* L) {
    check_table(L, 1, "self");
    if (lua_getfield(L, 1, "saved_tensors") != LUA_TTABLE) return 0;
    int n = int(lua_rawlen(L, -1));
    luaL_checkstack(L, n + 2, "saved tensors");
    for (int i = 1; i <= n; ++i) lua_rawgeti(L, 2, i);
    return n;
}
const Binding kContext_[] = {
    {"save", context_save, "ctx:save(a, b, …): keeps tensors for backward. The way for results; arguments may also be kept as ctx.x = x."},
    {"saved", context_saved, "ctx:saved(): in backward, the tensors that forward saved."},
};

int make_operator(lua_State* L) {
    check_table(L, 1, "parts");
    Options o(L, 1, {"name", "forward", "backward"});
    for (const char* part : {"forward", "backward"}) {
        o.push(part);
        if (part[0] == 'f' || !lua_isnil(L, -1)) check_function(L, lua_gettop(L), part);
        lua_pop(L, 1);
    }
    push(L, Operator{o.string("name", "operator")});
    lua_pushvalue(L, 1);
    lua_setiuservalue(L, -2, 1);
    return 1;
}

int call_operator(lua_State* L) {
    auto call = c10::make_intrusive<Call>();
    call->host = host_of(L);
    call->name = self<Operator>(L).name;
    free_references(L, *call->host);
    call->num_arguments = lua_gettop(L) - 1;
    Tensors inputs;
    for (int i = 0; i < call->num_arguments; ++i) {
        if (!test_box<Tensor>(L, i + 2)) continue;
        inputs.push_back(check_tensor(L, i + 2, "argument"));
        call->places.push_back(i);
        call->shapes.push_back(inputs.back().sizes().vec());
    }
    lua_getiuservalue(L, 1, 1);
    int parts = lua_gettop(L);
    lua_getfield(L, parts, "backward");
    call->backward = luaL_ref(L, LUA_REGISTRYINDEX);
    lua_newtable(L);
    lua_createtable(L, call->num_arguments, 0);
    for (int i = 0; i < call->num_arguments; ++i) {
        auto* box = test_box<Tensor>(L, i + 2);
        lua_pushboolean(L, box && (*box)->requires_grad() && at::GradMode::is_enabled());
        lua_rawseti(L, -2, i + 1);
    }
    lua_setfield(L, -2, "needs_grad");
    lua_rawgetp(L, LUA_REGISTRYINDEX, kContext);
    lua_setmetatable(L, -2);
    call->ctx = luaL_ref(L, LUA_REGISTRYINDEX);
    lua_getfield(L, parts, "forward");
    Running running{L, 2, lua_gettop(L), call};
    Tensors outputs = LuaFunction::apply(static_cast<const Running*>(&running), at::TensorList(inputs));
    luaL_checkstack(L, int(outputs.size()) + 2, "results of an operator");
    for (auto& y : outputs) push_tensor(L, y);
    return int(outputs.size());
}
int text(lua_State* L) {
    auto* box = test_box<Operator>(L, 1);
    push_string(L, box && *box ? "operator " + (*box)->name : "operator (freed)");
    return 1;
}
const Binding kOperators[] = {
    {"__call", call_operator, "op(…): forward's results for these arguments; gradients go through backward."},
    {"__tostring", text, "tostring(op): its name."},
};
const Binding kFunctions[] = {
    {"autograd", make_operator,
     "moe.autograd {forward = function(ctx, …) … end, backward = function(ctx, gradient, …) … end, name =}: an operator of two functions. forward gets the call's arguments, tensors or any\n"
     "other, and gives one or more tensors; it must not change its arguments. backward gets the gradient of each result and gives one of each argument, nil where there is none. ctx is a\n"
     "table for what both need: ctx.x = x for arguments, ctx:save(y) and ctx:saved() for results; ctx.needs_grad[i]: whether argument i needs a gradient. Without backward the results have no gradient.\n"
     "Example: local cube = moe.autograd {forward = function(ctx, x) ctx.x = x; return x ^ 3 end, backward = function(ctx, g) return g * 3 * ctx.x ^ 2 end}; "
     "local x = moe.tensor({2.0}, {requires_grad = true}); cube(x):sum():backward(); print(x.grad)"},
};
}  // namespace

LuaWaits::LuaWaits(lua_State* L) : guard_(kWaiting, std::make_shared<Waiting>(host_of(L), L)) {}

void open_autograd_operators(lua_State* L) {
    register_type<HostPtr>(L, {.name = nullptr, .help = "autograd host: what operators written in Lua share.", .methods = {}, .fields = {}, .meta = {}});
    // Closing the state ends it for nodes that live on. The collector runs it last: it is the first object with a finalizer of its kind.
    luaL_getmetatable(L, TypeName<HostPtr>::value);
    lua_pushcfunction(L, [](lua_State* L) {
        auto* box = test_box<HostPtr>(L, 1);
        if (!box || !*box) return 0;
        {
            std::lock_guard lock((**box)->mutex);
            (**box)->main = nullptr;
        }
        return collect<HostPtr>(L);
    });
    lua_setfield(L, -2, "__gc");
    lua_pop(L, 1);
    auto host = std::make_shared<Host>();
    lua_rawgeti(L, LUA_REGISTRYINDEX, LUA_RIDX_MAINTHREAD);
    host->main = lua_tothread(L, -1);
    lua_pop(L, 1);
    push(L, host);
    lua_rawsetp(L, LUA_REGISTRYINDEX, kHost);
    lua_newtable(L);
    lua_newtable(L);
    set_functions(L, "ctx:", kContext_);
    lua_setfield(L, -2, "__index");
    lua_rawsetp(L, LUA_REGISTRYINDEX, kContext);
    register_type<Operator>(L, {.name = nullptr, .help = "operator: a differentiable function made of two of Lua's, from moe.autograd.", .methods = {}, .fields = {}, .meta = kOperators});
    set_functions(L, "moe.", kFunctions);
}
}  // namespace moe::lua
