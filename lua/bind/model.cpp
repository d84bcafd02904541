#include "lua/bind/model.h"

#include "core/base/units.h"
#include "core/config/load.h"
#include "core/data/tokenizer.h"
#include "core/plan/count.h"
#include "core/tensor/check.h"
#include "core/train/agree.h"
#include "core/train/hardware.h"
#include "lua/bind/bind.h"
#include "lua/bind/config.h"
#include "lua/bind/control.h"
#include "lua/bind/intervene.h"
#include "lua/bind/ranks.h"
#include "lua/bind/tensor.h"
#include "lua/bind/trace.h"

#include <ATen/ATen.h>

namespace moe::lua {
namespace {
LiveModel model(lua_State* L) { return live_model(L, self<ModelValue>(L)); }

/// int64 [B, S] from a tensor or a nested table; one row may come without its brackets.
at::Tensor check_ids(lua_State* L, int index) {
    at::Tensor ids = lua_istable(L, index) ? tensor_from_table(L, index, std::nullopt) : check_tensor(L, index, "ids");
    if (ids.dim() == 1) ids = ids.unsqueeze(0);
    MOE_CHECK(ids.dim() == 2 && ids.numel() > 0, shape, running(L) + ": ids", shape_text(ids.sizes()), "[batch, time]", "");
    MOE_CHECK(at::isIntegralType(ids.scalar_type(), false), dtype, running(L) + ": ids", dtype_text(ids.scalar_type()), "int64", "");
    return ids.to(at::kCPU, at::kLong).contiguous();
}

/// The causal language-model loss as Hugging Face's with labels = ids: mean over the shifted positions, in an attached graph.
at::Tensor loss_of(lua_State* L, Model& m) {
    at::Tensor ids = check_ids(L, 2);
    int64_t B = ids.size(0), S = ids.size(1);
    MOE_CHECK(S > 1, shape, running(L) + ": ids", shape_text(ids.sizes()), "at least two positions: the loss is of the next token", "");
    at::Tensor targets = at::full({B, S}, -100, at::kLong);
    targets.narrow(1, 0, S - 1).copy_(ids.narrow(1, 1, S - 1));
    MicroBatch batch = m.micro_batch(ids, targets, {}, {});
    batch.loss_scale = 1.0 / double(B * (S - 1));
    return m.run_attached(batch);
}

int loss(lua_State* L) {
    at::Tensor value;
    {
        at::NoGradGuard no_grad;
        value = loss_of(L, *model(L));
    }
    return push_tensor(L, value.detach());
}

int logits(lua_State* L) {
    return push_tensor(L, model(L)->logits(check_ids(L, 2)));
}

/// A table of all logical parameters in declaration order.
template <class F>
int push_parameters(lua_State* L, Model& m, F value) {
    push_ordered_table(L, m.store().names());
    for (auto& name : m.store().names()) {
        push_tensor(L, value(name));
        lua_setfield(L, -2, name.c_str());
    }
    return 1;
}

int grads(lua_State* L) {
    LiveModel live = model(L);
    Model& m = *live;
    MOE_CHECK(m.options().training, state, "model:grads", "a model without gradients", "one built with training = true", "");
    ParamStore& store = m.store();
    store.zero_grads();
    try {
        at::AutoGradMode enable(true);
        loss_of(L, m).backward();
        push_parameters(L, m, [&](const std::string& name) { return store.grad(name).clone(); });
    } catch (...) {
        store.sink().reset();
        store.zero_grads();
        throw;
    }
    store.zero_grads();
    return 1;
}

int parameters(lua_State* L) {
    LiveModel live = model(L);
    Model& m = *live;
    return push_parameters(L, m, [&](const std::string& name) { return m.store().value(name); });
}

template <Function f>
int by_all_that_have_it(lua_State* L) {
    ModelValue of = self<ModelValue>(L);
    return call_on_all_that_have(L, of, f);
}

int num_parameters(lua_State* L) {
    lua_pushinteger(L, model(L)->store().num_parameters());
    return 1;
}

int set(lua_State* L) {
    std::string name = check_string(L, 2, "name");
    at::Tensor value = check_tensor(L, 3, "tensor");
    LiveModel live = model(L);
    if (live.value.run) live.value.run->set_parameter(name, value);
    else live->store().set(name, value);
    lua_settop(L, 1);
    return 1;
}

int bias(lua_State* L) {
    LiveModel live = model(L);
    Model& m = *live;
    int64_t layer = check_integer(L, 2, "layer");
    auto& routed = m.routed_layers();
    if (std::find(routed.begin(), routed.end(), layer) == routed.end()) {
        std::string want;
        for (int64_t r : routed) want += (want.empty() ? "a routed layer: one of " : ", ") + std::to_string(r);
        MOE_THROW(config, "model:bias: layer", std::to_string(layer), want.empty() ? "a model with routed layers" : want, "layers are counted from 0; dense layers have no router");
    }
    at::Tensor b = m.bias(layer);
    if (!b.defined()) return lua_pushnil(L), 1;
    return push_tensor(L, b);
}

int field_config(lua_State* L) {
    push<ConfigValue>(L, {std::make_shared<const Config>(model(L)->config()), nullptr});
    return 1;
}
int field_routed(lua_State* L) {
    push_integers(L, model(L)->routed_layers());
    return 1;
}
int field_device(lua_State* L) {
    push_string(L, model(L)->options().device.str());
    return 1;
}
int text(lua_State* L) {
    auto* box = test_box<ModelValue>(L, 1);
    if (!box || !*box) return lua_pushliteral(L, "model (freed)"), 1;
    Model& m = *(*box)->model;
    auto& c = m.config().model;
    push_string(L, fmt::format("model: {} parameters, {} layers ({} with {} experts, {} a token), d_model {}, {} on {}", format_count(double(m.store().num_parameters())), c.num_layers,
                               m.routed_layers().size(), c.moe.num_experts, c.moe.num_experts_per_token, c.mla.d_model, dtype_text(m.options().precision.compute), m.options().device.str()));
    return 1;
}

int make_model(lua_State* L) {
    ConfigValue c = check_config(L, 1, "config");
    Options o(L, 2, {"dtype", "training"});
    push<ModelValue>(L, {build_model(L, *c.config, o.string("dtype", ""), o.boolean("training", true))});
    return 1;
}

const Binding kFunctions[] = {
    {"model", on_all_ranks<make_model>,
     "moe.model(config, {dtype = \"fp32\" | \"fp64\" | \"bf16\", training = true}): builds a model with initial weights, without data. training = false keeps no gradients. Its biases and weights depend on config.seed alone."},
};
const Binding kMethods[] = {
    {"logits", by_all_that_have_it<logits>, "m:logits(ids): ids int64 [batch, time] (tensor or tables) → fp32 (or fp64) [batch, time, vocabulary]."},
    {"loss", by_all_that_have_it<loss>, "m:loss(ids): mean loss in nats of each next token, a 0-d tensor; as Hugging Face's with labels = ids."},
    {"grads", by_all_that_have_it<grads>, "m:grads(ids): name → gradient of m:loss(ids), for every parameter, in declaration order."},
    {"parameters", by_all_that_have_it<parameters>, "m:parameters(): name → tensor (a view of the weights), in declaration order, under Hugging Face's names."},
    {"num_parameters", num_parameters, "m:num_parameters(): elements of all parameters on this rank."},
    {"set", on_all_ranks<set>, "m:set(name, tensor): overwrites a parameter, any float dtype. Returns m. Of a run it is an event: run:undo() takes it back, and moe.replay does it again where the value has at most 1 MiB."},
    {"layer", layer_of_model, "m:layer(i): the layer i, from 0, as m.layers[i]."},
    {"trace", on_all_ranks<model_trace>,
     "m:trace(data, {tokens =, batches =, weights = true, file =, memory = 2^28}): runs data from its beginning through the model and records every routing decision: ids, weights (fp16), margins, token, domain, position. data: what moe.data gives or takes, or ids [batch, time]; "
     "tokens default to the data's, else 65536, and are rounded up to whole batches. More than `memory` bytes goes to a file: `file`, which moe.trace reads again, or a temporary one. On several ranks each takes its share of the sequences, and gets all of the trace.\nExample: print(moe.model(moe.config(\"cpu_quick\"):with { [\"model.num_layers\"] = 2 }):trace(moe.randint(0, 256, { 1, 16 })))"},
    {"expert_outputs", model_expert_outputs,
     "m:expert_outputs(data, {layer =, tokens =, batches =}): what the experts of a layer put out for the data's tokens: {layer, mean float64 [expert, d_model] (weighted by the gate, nan without tokens), norm (mean |E(x)|), weighted_norm (mean |w E(x)|), tokens int64}; tokens = … is rounded up to whole batches. moe.lens shows it as tokens."},
    {"bias", bias, "m:bias(layer): selection bias of a routed layer's experts, a view; nil without use_aux_loss_free."},
};
const Binding kFields[] = {
    {"router", router_of_model, "m.router: its routers, to intervene in: m.router:mask { layer = 2, expert = 7 }; help(m.router) lists what there is."},
    {"layers", layers_of_model, "m.layers: its layers, 0-based: m.layers[3].attention; #m.layers of them, MTP modules included."},
    {"config", field_config, "m.config: the configuration that it was built from."},
    {"routed_layers", field_routed, "m.routed_layers: absolute, 0-based indices of the layers with experts."},
    {"device", field_device, "m.device: \"cpu\" or \"cuda:0\"."},
};
const Binding kMeta[] = {{"__tostring", text, "tostring(m): one line about it."}};
}  // namespace

HeldEdge hold_edge(lua_State* L, const std::shared_ptr<train::Run>& run) {
    if (!run) return {};
    if (run->edge().has_turns() && !run->edge().is_trainer()) {
        // A job on several ranks: all ask, and are let in after the same step.
        meet(L, Tensors::own);
        Unlocked unlocked(L);
        run->edge().lock();
        return HeldEdge(run->edge(), std::adopt_lock);
    }
    if (run->edge().lock_unless([] { return true; })) return HeldEdge(run->edge(), std::adopt_lock);
    bool held;
    {
        Unlocked unlocked(L);
        held = run->edge().lock_unless([&] { return control(L).interrupted.load(); });
    }
    if (!held) throw_if_interrupted(L);
    MOE_CHECK(held, state, "run", "a step that does not end", "its end", "");
    return HeldEdge(run->edge(), std::adopt_lock);
}

int call_on_all_that_have(lua_State* L, const ModelValue& of, Function f) {
    auto& mesh = of.model->mesh();
    bool is_cut = mesh.tp.size() * mesh.ep.size() * mesh.pp.size() > 1 || (mesh.world.size() > 1 && of.model->config().distributed.zero_stage == 3);
    if (!is_cut || !control(L).ranks) return f(L);
    return call_on_all_ranks(L, [&](lua_State*) {
        LiveModel live = live_model(L, of);                // before the failures: they are the run's
        train::HookFailures::Kept kept(failures_of(of), true);
        int n = 0;
        train::together(live->mesh().world, [&] {
            n = f(L);
            kept.rethrow();
        });
        return n;
    }, Tensors::own);
}

LiveModel live_model(lua_State* L, const ModelValue& value) {
    ModelValue kept = value;                              // the userdata may be freed while this waits
    HeldEdge edge = hold_edge(L, kept.run);
    return {std::move(kept), std::move(edge)};
}

std::shared_ptr<Model> build_model(lua_State* L, const Config& config, const std::string& dtype, bool training) {
    Config c = with_session_device(L, config);
    if (!c.model.vocab_size) c.model.vocab_size = data::open_tokenizer(c.data.tokenizer)->vocab_size();
    validate(c);
    require_built(c);
    const dist::Group& world = dist::world();
    ModelOptions options{Precision::named(dtype.empty() ? c.training.precision() : dtype), train::choose_device(world.size() == 1 ? c.device.value_or("") : "cpu"), training};
    return std::make_shared<Model>(c, dist::make_mesh(c.distributed, world.duplicate()), options);
}

void open_model(lua_State* L) {
    set_functions(L, "moe.", kFunctions);
    register_type<ModelValue>(L, {.name = nullptr, .help = "model: weights and the functions over them. Parameters have Hugging Face's names; layers are 0-based.\n"
        "Example: print(moe.model(moe.config \"cpu_quick\":with { [\"model.num_layers\"] = 2 }))",
                                  .methods = kMethods, .fields = kFields, .meta = kMeta});
}
}  // namespace moe::lua
