// model.router: masks, overrides, hooks and the rest of the interventions; moe.balance.
#include "lua/bind/bind.h"
#include "lua/bind/intervene.h"
#include "lua/bind/json.h"
#include "lua/bind/ranks.h"
#include "lua/bind/script.h"
#include "lua/bind/tensor.h"

namespace moe::lua {
using train::Values;
namespace {
RouterValue& router(lua_State* L) { return self<RouterValue>(L); }

/// A table of named values: tensors and functions in their stored form.
Values arguments(lua_State* L, int index, const RouterValue& of) {
    Values args = Values::object();
    if (!is_nothing(L, index)) {
        check_table(L, index, "options");
        for (auto& key : ordered_keys(L, index)) {
            lua_getfield(L, index, key.c_str());
            if (key == "by_token" && lua_istable(L, -1)) args[key] = train::tensor_to_values(tensor_from_table(L, -1, at::kLong));
            else if (test_box<at::Tensor>(L, -1)) args[key] = train::tensor_to_values(check_tensor(L, -1, key.c_str()));
            else args[key] = to_json(L, -1);
            lua_pop(L, 1);
        }
        lua_pushnil(L);
        while (lua_next(L, index)) {
            lua_pop(L, 1);
            if (lua_type(L, -1) != LUA_TSTRING) bad_argument(L, index, "options", "named values only, such as { layer = 2, expert = 7 }");
        }
    }
    if (!of.layers.empty()) {
        MOE_CHECK(!args.contains("layer") && !args.contains("layers"), usage, running(L), "layer", "nothing: this router is of one layer", "model.router takes layers");
        args["layers"] = of.layers;
    }
    return args;
}

template <int kind>
int simple(lua_State* L) {
    static constexpr const char* names[] = {"mask", "unmask", "override", "offset", "freeze", "force", "ablate", "swap", "duplicate", "reinit"};
    RouterValue r = router(L);
    return intervene(L, r.of, names[kind], arguments(L, 2, r));
}

/// router:bias { layer =, set = | offset = }.
int bias(lua_State* L) {
    RouterValue r = router(L);
    Values args = arguments(L, 2, r);
    MOE_CHECK(args.contains("set") != args.contains("offset"), usage, "router:bias", args.contains("set") ? "set and offset" : "nothing", "set = … or offset = …", "a number, or one for each expert");
    bool sets = args.contains("set");
    args["values"] = args[sets ? "set" : "offset"];
    args.erase(sets ? "set" : "offset");
    return intervene(L, r.of, sets ? "bias" : "offset", args);
}

int hook(lua_State* L) {
    RouterValue r = router(L);
    std::string point = check_string(L, 2, "point");
    MOE_CHECK(point == "pre_topk" || point == "post_topk", usage, "router:hook: point", '"' + point + '"', "\"pre_topk\" or \"post_topk\"", "");
    check_function(L, 3, "f");
    Options o(L, 4, {"layer", "layers", "replay"});
    Values args = function_arguments(L, 3, o.boolean("replay", true));
    for (const char* key : {"layer", "layers"}) {
        if (!o.has(key)) continue;
        o.push(key);
        args[key] = to_json(L, -1);
        lua_pop(L, 1);
    }
    if (!r.layers.empty()) args["layers"] = r.layers;
    return intervene(L, r.of, point, args);
}

Values balance_arguments(lua_State* L, int index) {
    if (lua_isfunction(L, index)) {
        Values args = function_arguments(L, index, true);
        args["kind"] = "custom";
        return args;
    }
    if (!lua_istable(L, index)) bad_argument(L, index, "balance", "one of moe.balance, such as moe.balance.aux { alpha = 1e-3 }, or a function(counts, bias, m) that gives the next bias; h:undo() or run:undo(id) takes a change back");
    Values args = Values::object();
    for (auto& key : ordered_keys(L, index)) {
        lua_getfield(L, index, key.c_str());
        if (key == "f") {
            bool replay = true;
            lua_getfield(L, index, "replay");
            if (lua_isboolean(L, -1)) replay = lua_toboolean(L, -1);
            lua_pop(L, 1);
            args.update(function_arguments(L, -1, replay));
        } else if (key != "replay") args[key] = to_json(L, -1);
        lua_pop(L, 1);
    }
    return args;
}

int assign_to_router(lua_State* L) {
    RouterValue r = router(L);
    std::string key = check_string(L, 2, "name");
    if (key == "balance") {
        MOE_CHECK(r.layers.empty(), usage, "router.balance", "one layer's", "the whole model's: run.model.router.balance", "");
        return intervene(L, r.of, "balance", balance_arguments(L, 3)), 0;
    }
    if (key == "score") {
        Values args = function_arguments(L, 3, true);
        if (!r.layers.empty()) args["layers"] = r.layers;
        return intervene(L, r.of, "score", args), 0;
    }
    MOE_THROW(usage, "router." + key, "an assignment", "router.balance = … or router.score = …", "the rest are methods: help(router)");
}

int field_balance(lua_State* L) {
    RouterValue r = router(L);
    HeldEdge edge = hold_edge(L, r.of.run);
    for (auto it = interventions_of(r.of).items().rbegin(); it != interventions_of(r.of).items().rend(); ++it) {
        if (it->what != "balance") continue;
        Values args = it->args;
        args.erase("function");
        return push_json(L, args), 1;
    }
    auto& c = r.of.model->config().model.moe;
    Values args = {{"kind", c.use_aux_loss_free && c.bias_update_speed > 0 ? "aux_free" : c.sequence_aux_loss_weight + c.router_aux_loss_weight + c.global_aux_loss_weight > 0 ? "aux" : "none"}};
    return push_json(L, args), 1;
}
int field_score(lua_State* L) {
    RouterValue r = router(L);
    HeldEdge edge = hold_edge(L, r.of.run);
    for (auto it = interventions_of(r.of).items().rbegin(); it != interventions_of(r.of).items().rend(); ++it)
        if (it->what == "score" && !it->args["function"].is_null()) return push_string(L, it->args["function"].value("name", "a function")), 1;
    push_string(L, r.of.model->config().model.moe.scoring_func);
    return 1;
}

int text(lua_State* L) {
    auto* box = test_box<RouterValue>(L, 1);
    if (!box || !*box) return lua_pushliteral(L, "router (freed)"), 1;
    RouterValue r = **box;
    HeldEdge edge = hold_edge(L, r.of.run);
    std::string text = r.layers.empty() ? fmt::format("router of {} layers", r.of.model->routed_layers().size()) : fmt::format("router of layer {}", r.layers[0]);
    for (auto& item : interventions_of(r.of).items()) text += fmt::format("\n  {}: {}", item.id, train::Interventions::text(item.what, item.args));
    push_string(L, text);
    return 1;
}

template <int kind>
int balance(lua_State* L) {
    static constexpr const char* names[] = {"aux", "aux_free", "none"};
    if (kind == 0) Options(L, 1, {"alpha", "scope"});
    else if (kind == 1) Options(L, 1, {"speed", "rule"});
    push_ordered_table(L, {"kind", "alpha", "scope", "speed", "rule"});
    push_string(L, names[kind]);
    lua_setfield(L, -2, "kind");
    for (const char* key : {"alpha", "scope", "speed", "rule"}) {
        if (!lua_istable(L, 1)) break;
        lua_getfield(L, 1, key);
        lua_setfield(L, -2, key);
    }
    return 1;
}
int balance_custom(lua_State* L) {
    check_function(L, 1, "f");
    Options o(L, 2, {"replay"});
    lua_newtable(L);
    lua_pushliteral(L, "custom");
    lua_setfield(L, -2, "kind");
    lua_pushvalue(L, 1);
    lua_setfield(L, -2, "f");
    lua_pushboolean(L, o.boolean("replay", true));
    lua_setfield(L, -2, "replay");
    return 1;
}

#define MOE_WHERE_TEXT " layer = or layers = (0-based; all routed ones by default), expert = or experts =. Returns a handle: h:undo(), or local h <close> = …."
const Binding kMethods[] = {
    {"mask", on_all_ranks<simple<0>>, "router:mask {layer =, expert =}: these experts are never chosen (their selection score is -inf); an error where fewer are left than a token takes." MOE_WHERE_TEXT
                        "\nExample: local m = moe.model(moe.config \"cpu_tiny\":with { model = { num_layers = 2, vocab_size = 64, mla = { d_model = 64 } } }); local h = m.router:mask { layer = 1, expert = 3 }; h:undo()"},
    {"unmask", on_all_ranks<simple<1>>, "router:unmask {layer =, expert =}: lets masked experts be chosen again." MOE_WHERE_TEXT},
    {"override", on_all_ranks<simple<2>>, "router:override {layer =, top_k =, temperature =}: another number of experts a token, or another temperature of the logits." MOE_WHERE_TEXT},
    {"bias", on_all_ranks<bias>, "router:bias {layer =, set = | offset =}: set overwrites the selection bias (the balance moves it on from there; needs use_aux_loss_free), offset is added to it in the choice alone. A number, or one for each expert (table or tensor)." MOE_WHERE_TEXT},
    {"freeze", on_all_ranks<simple<4>>, "router:freeze {layer =}: the balance leaves the selection bias as it is." MOE_WHERE_TEXT},
    {"force", on_all_ranks<simple<5>>, "router:force {layer =, experts = {…}} or {by_token = t}: every token goes to these experts, or by its id to row t[id] of a tensor int64 [vocabulary, K] (Roller et al., 2106.04426). Weights come from the scores as ever; masks have no say." MOE_WHERE_TEXT},
    {"ablate", on_all_ranks<simple<6>>, "router:ablate {layer =, expert =}: chosen and counted as before, but with weight 0 (after the weights' normalisation, so that the others keep theirs): the expert adds nothing and learns nothing." MOE_WHERE_TEXT},
    {"swap", on_all_ranks<simple<7>>, "router:swap {layer =, experts = {a, b}, gate = false}: exchanges two experts' weights and optimizer state; with gate = true their rows of the router and biases, too, which only renames them." MOE_WHERE_TEXT},
    {"duplicate", on_all_ranks<simple<8>>, "router:duplicate {layer =, from =, to =, gate = false}: copies an expert's weights and optimizer state over another's; with gate = true its row of the router and bias, too." MOE_WHERE_TEXT},
    {"reinit", on_all_ranks<simple<9>>, "router:reinit {layer =, expert =, gate = false, seed =}: draws an expert's weights anew as at the beginning (other numbers, unless seed is the configuration's) and forgets its optimizer state." MOE_WHERE_TEXT},
    {"forward", router_forward_of, "router:forward(x): of one layer, model.layers[i].router: its decision for x [T, d_model] or [B, S, d_model], the residual stream: {ids int64 [T, K], weights [T, K], hidden [T, d_model]}."},
    {"hook", on_all_ranks<hook>,
     "router:hook(point, f, {layer =, replay = true}): \"pre_topk\": f(s) gives other scores [T, E] (fields of s: scores, logits, bias, layer, step (steps done), training, tokens); \"post_topk\": f(s) gives ids, weights [T, K] (s.ids, s.weights, s.scores …; nil leaves one as it is). "
     "Called wherever the router decides, in evaluation too, once per decision, never in a recomputation; the gradient goes through as if a constant was added. Draws inside follow from seed, step and layer. f is stored as source with the upvalues and globals that it reads, plain values copied now (what it writes must be a global, and stays the session's); replay = false takes any function as it is, and the run cannot be replayed. An error in f undoes the step and says the hook's place, its layer and the step. Returns a handle."
     "\nExample: local m = moe.model(moe.config \"cpu_tiny\":with { model = { num_layers = 2, vocab_size = 64, mla = { d_model = 64 } } }); m.router:hook(\"pre_topk\", function(s) return s.scores + 0.01 * moe.randn_like(s.scores) end)"},
};
const Binding kFields[] = {
    {"balance", field_balance, "router.balance = moe.balance.aux { alpha = 1e-3 } | .aux_free { speed = 1e-3 } | .none() | function(counts, bias, m) … return bias end: how the experts' load is evened out from now on; an event, run:undo() takes it back. Read: what is in force. A function gets one layer's global counts int64 [E], its bias float64 [E] and m = {layer, step} after each step, and gives the next bias."},
    {"score", field_score, "router.score = function(logits, m) … return scores end: scores [T, E] from logits with their gradient, in place of scoring_func; nil takes that again. Called again in a recomputation. Read: its name."},
};
const Binding kMeta[] = {
    {"__tostring", text, "tostring(router): its interventions in force."},
    {"__newindex", on_all_ranks<assign_to_router>, "router.balance = …, router.score = …"},
};
const Binding kBalance[] = {
    {"aux", balance<0>, "moe.balance.aux {alpha = 1e-3, scope = \"sequence\"}: an auxiliary loss, over each \"sequence\", each micro-\"batch\" or the \"global\" batch; a selection bias stays where it is.\nExample: print(moe.balance.aux { alpha = 1e-2 })"},
    {"aux_free", balance<1>, "moe.balance.aux_free {speed = 1e-3, rule = \"sign\"}: a selection bias moved by each step's counts, no loss. rule: \"sign\", \"magnitude\", \"centred\".\nExample: print(moe.balance.aux_free { speed = 1e-2 })"},
    {"none", balance<2>, "moe.balance.none(): neither losses nor a moving bias (which stays where it is).\nExample: print(moe.balance.none())"},
    {"custom", balance_custom, "moe.balance.custom(f, {replay = true}): the bias by a function(counts, bias, m) of counts int64 [E], bias float64 [E] and m = {layer, step}, which gives the next bias.\nExample: print(moe.balance.custom(function(counts, bias) return bias end).kind)"},
};
}  // namespace

int router_of_model(lua_State* L) {
    ModelValue& of = model_to_change(L, 1);
    push<RouterValue>(L, {of});
    return 1;
}

void open_interventions(lua_State* L);

void open_router(lua_State* L) {
    lua_newtable(L);
    set_functions(L, "moe.balance.", kBalance);
    set_help(L, -1, "moe.balance", "moe.balance: ways to even out the experts' load, for run.model.router.balance = …: aux, aux_free, none, custom.");
    lua_setfield(L, -2, "balance");
    register_type<RouterValue>(L, {.name = nullptr, .help = "router: interventions in the routers of a model. Those of a run are events of its log, can be undone, saved and replayed.", .methods = kMethods, .fields = kFields, .meta = kMeta});
    open_interventions(L);
}
}  // namespace moe::lua
