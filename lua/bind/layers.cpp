// Layers of a model and their parts as functions of a tensor.
#include "lua/bind/bind.h"
#include "lua/bind/intervene.h"
#include "lua/bind/ranks.h"
#include "lua/bind/tensor.h"

#include "core/tensor/check.h"

#include <ATen/ATen.h>

namespace moe::lua {
struct LayersValue {
    ModelValue of;
};
struct LayerValue {
    ModelValue of;
    int64_t layer = 0;
};
/// Segments of one layer: "attention", "experts", ….
struct PartValue {
    ModelValue of;
    int64_t layer = 0;
    std::string kind;
};
template <>
struct TypeName<LayersValue> {
    static constexpr const char* value = "layers";
};
template <>
struct TypeName<LayerValue> {
    static constexpr const char* value = "layer";
};
template <>
struct TypeName<PartValue> {
    static constexpr const char* value = "part of a layer";
};

namespace {
int64_t num_layers(const Model& m) { return m.config().model.num_layers + m.config().training.mtp_depth(); }

int64_t check_layer(lua_State* L, int index, const Model& m, const char* op) {
    int64_t layer = check_integer(L, index, "layer");
    MOE_CHECK(layer >= 0 && layer < num_layers(m), usage, op, std::to_string(layer), fmt::format("0 to {}", num_layers(m) - 1), "layers are counted from 0");
    return layer;
}

std::string kind_of(const std::string& segment) { return segment.substr(segment.rfind('.') + 1); }

/// The segments of a layer, in order, from the one of kind `from` to that of kind `to`; "" for all.
std::pair<size_t, size_t> segments_of(const Model& m, int64_t layer, const std::string& from, const std::string& to, const std::string& op) {
    auto& all = m.segments();
    size_t begin = all.size(), end = 0;
    for (size_t s = 0; s < all.size(); ++s) {
        if (all[s].layer != layer) continue;
        std::string kind = kind_of(all[s].name);
        if (begin == all.size() && (from.empty() || kind == from)) begin = s;
        if (begin < all.size() && (to.empty() || kind == to)) end = s + 1;
    }
    MOE_CHECK(begin < end, state, op, fmt::format("layer {}", layer), from.empty() ? "a layer of this rank" : "a layer with " + from, "dense layers have feed_forward, the others router, experts and perhaps shared_experts");
    return {begin, end};
}

/// Runs segments on x [T, D] or [B, S, D]; returns all slots.
std::map<std::string, at::Tensor> run_on(lua_State* L, Model& m, const at::Tensor& x, std::pair<size_t, size_t> range, const char* slot, MicroBatch& batch) {
    int64_t D = m.config().model.mla.d_model;
    MOE_CHECK((x.dim() == 2 || x.dim() == 3) && x.size(-1) == D && x.numel() > 0, shape, running(L) + ": x", shape_text(x.sizes()), fmt::format("[T, {}] or [B, S, {}]", D, D), "");
    MOE_CHECK(at::isFloatingType(x.scalar_type()), dtype, running(L) + ": x", dtype_text(x.scalar_type()), "a float dtype", "");
    int64_t B = x.dim() == 3 ? x.size(0) : 1, S = x.size(-2);
    MOE_CHECK(m.mesh().tp.size() == 1, state, running(L), fmt::format("{} tensor-parallel ranks", m.mesh().tp.size()), "a model that is whole on this rank", "");
    batch = m.micro_batch(at::zeros({B, S}, at::kLong), {}, {}, {});
    at::AutoGradMode grad(x.requires_grad());
    if (x.requires_grad()) m.store().sink().immediate();
    std::map<std::string, at::Tensor> slots = {{slot, x.to(m.options().device, m.options().precision.compute).reshape({B * S, D})}};
    m.run_segments(batch, range.first, range.second, slots);
    return slots;
}

at::Tensor input(lua_State* L, const LiveModel& live) {
    at::Tensor x = check_tensor(L, 2, "x");
    if (x.requires_grad() && live.value.run) live.value.run->forget_grads();
    return x;
}

int layer_forward(lua_State* L) {
    LayerValue v = self<LayerValue>(L);
    LiveModel live = live_model(L, v.of);
    at::Tensor x = input(L, live);
    MicroBatch batch;
    auto slots = run_on(L, *live, x, segments_of(*live, v.layer, "", "", "layer:forward"), "residual", batch);
    return push_tensor(L, slots.at("residual").reshape(x.sizes()));
}

int part_forward(lua_State* L) {
    PartValue v = self<PartValue>(L);
    LiveModel live = live_model(L, v.of);
    at::Tensor x = input(L, live);
    MicroBatch batch;
    if (v.kind == "shared_experts") {
        auto slots = run_on(L, *live, x, segments_of(*live, v.layer, v.kind, v.kind, "forward"), "hidden", batch);
        return push_tensor(L, slots.at("shared").reshape(x.sizes()));
    }
    bool experts = v.kind == "experts";
    auto slots = run_on(L, *live, x, segments_of(*live, v.layer, experts ? "route" : v.kind, experts ? "combine" : v.kind, "forward"), "residual", batch);
    return push_tensor(L, slots.at("residual").reshape(x.sizes()));
}

int router_forward(lua_State* L) {
    RouterValue v = self<RouterValue>(L);
    LiveModel live = live_model(L, v.of);
    MOE_CHECK(v.layers.size() == 1, usage, "router:forward", "the routers of all layers", "one layer's: model.layers[3].router", "");
    at::Tensor x = input(L, live);
    MicroBatch batch;
    auto slots = run_on(L, *live, x, segments_of(*live, v.layers[0], "route", "route", "router:forward"), "residual", batch);
    push_ordered_table(L, {"ids", "weights", "hidden"});
    push_tensor(L, batch.routed.at(v.layers[0]).chosen_TK);
    lua_setfield(L, -2, "ids");
    push_tensor(L, slots.at("weights"));
    lua_setfield(L, -2, "weights");
    push_tensor(L, slots.at("hidden"));
    lua_setfield(L, -2, "hidden");
    return 1;
}

int push_part(lua_State* L, const char* kind) {
    LayerValue v = self<LayerValue>(L);
    segments_of(*v.of.model, v.layer, kind, kind, std::string("layer.") + kind);
    push<PartValue>(L, {v.of, v.layer, kind});
    return 1;
}
int field_attention(lua_State* L) { return push_part(L, "attention"); }
int field_experts(lua_State* L) { return push_part(L, "experts"); }
int field_feed_forward(lua_State* L) { return push_part(L, "feed_forward"); }
int field_shared(lua_State* L) { return push_part(L, "shared_experts"); }
int field_router(lua_State* L) {
    LayerValue v = self<LayerValue>(L);
    segments_of(*v.of.model, v.layer, "route", "route", "layer.router");
    push<RouterValue>(L, {v.of, {v.layer}});
    return 1;
}
int field_index(lua_State* L) { return lua_pushinteger(L, self<LayerValue>(L).layer), 1; }
int field_weights(lua_State* L) {
    LayerValue v = self<LayerValue>(L);
    LiveModel live = live_model(L, v.of);
    std::string prefix = fmt::format("model.layers.{}.", v.layer);
    std::vector<std::string> names;
    for (auto& name : live->store().names())
        if (name.starts_with(prefix)) names.push_back(name.substr(prefix.size()));
    push_ordered_table(L, names);
    for (auto& name : names) {
        push_tensor(L, live->store().value(prefix + name));
        lua_setfield(L, -2, name.c_str());
    }
    return 1;
}
int layer_text(lua_State* L) {
    auto* box = test_box<LayerValue>(L, 1);
    if (!box || !*box) return lua_pushliteral(L, "layer (freed)"), 1;
    std::string parts;
    for (auto& s : (*box)->of.model->segments())
        if (s.layer == (*box)->layer) parts += (parts.empty() ? "" : ", ") + kind_of(s.name);
    push_string(L, fmt::format("layer {}: {}", (*box)->layer, parts));
    return 1;
}
int part_text(lua_State* L) {
    auto* box = test_box<PartValue>(L, 1);
    if (!box || !*box) return lua_pushliteral(L, "part of a layer (freed)"), 1;
    push_string(L, fmt::format("{} of layer {}", (*box)->kind, (*box)->layer));
    return 1;
}

/// layers[i]; other keys are unknown.
int index_layers(lua_State* L) {
    LayersValue v = self<LayersValue>(L);
    if (lua_type(L, 2) != LUA_TNUMBER) return 0;
    push<LayerValue>(L, {v.of, check_layer(L, 2, *v.of.model, "model.layers")});
    return 1;
}
int length_of_layers(lua_State* L) { return lua_pushinteger(L, num_layers(*self<LayersValue>(L).of.model)), 1; }
int layers_text(lua_State* L) {
    auto* box = test_box<LayersValue>(L, 1);
    if (!box || !*box) return lua_pushliteral(L, "layers (freed)"), 1;
    push_string(L, fmt::format("{} layers: [0] to [{}]", num_layers(*(*box)->of.model), num_layers(*(*box)->of.model) - 1));
    return 1;
}

const Binding kLayerMethods[] = {{"forward", by_all_that_have<LayerValue, layer_forward>, "layer:forward(x): the whole layer on x [T, d_model] or [B, S, d_model] (documents: one a sequence), the residual stream before and after it. With a gradient where x:requires_grad_(); the weights' go to .grad of the model's parameters, and a run's next step begins without them.\nExample: local m = moe.model(moe.config \"cpu_tiny\":with { model = { num_layers = 2, vocab_size = 64, mla = { d_model = 64 } } }); print(m.layers[0]:forward(moe.randn { 4, m.config.model.mla.d_model }).shape)"}};
const Binding kLayerFields[] = {
    {"attention", field_attention, "layer.attention: its attention block; :forward(x)."},
    {"router", field_router, "layer.router: its router: :forward(x), and the interventions of model.router in this layer alone."},
    {"experts", field_experts, "layer.experts: router, experts (shared ones, too) and what goes around them; :forward(x)."},
    {"feed_forward", field_feed_forward, "layer.feed_forward: the block of a dense layer; :forward(x)."},
    {"shared_experts", field_shared, "layer.shared_experts: the shared experts on hidden states (router:forward(x).hidden); :forward(h)."},
    {"index", field_index, "layer.index: its number, from 0."},
    {"parameters", by_all_that_have<LayerValue, field_weights>, "layer.parameters: name → tensor (a view of the weights), without the layer's prefix."},
};
const Binding kLayerMeta[] = {{"__tostring", layer_text, "tostring(layer): its parts."}};
const Binding kPartMethods[] = {{"forward", by_all_that_have<PartValue, part_forward>, "part:forward(x): this part on x [T, d_model] or [B, S, d_model]: the residual stream before it gives the one after it (shared_experts: hidden states give their sum's part). With a gradient where x requires one."}};
const Binding kPartMeta[] = {{"__tostring", part_text, "tostring(part): which it is."}};
const Binding kLayersMeta[] = {{"__len", length_of_layers, "#model.layers: how many, MTP modules included."}, {"__tostring", layers_text, "tostring(layers): how many."}};
}  // namespace

int router_forward_of(lua_State* L) { return by_all_that_have<RouterValue, router_forward>(L); }

int layers_of_model(lua_State* L) {
    push<LayersValue>(L, {model_to_change(L, 1)});
    return 1;
}
int layer_of_model(lua_State* L) {
    ModelValue& of = model_to_change(L, 1);
    push<LayerValue>(L, {of, check_layer(L, 2, *of.model, "model:layer")});
    return 1;
}

void open_layers(lua_State* L) {
    register_type<LayersValue>(L, {.name = nullptr, .help = "layers: a model's layers, layers[i] from 0; for i = 0, #layers - 1 do … end.", .methods = {}, .fields = {}, .meta = kLayersMeta, .index = index_layers});
    register_type<LayerValue>(L, {.name = nullptr, .help = "layer: one layer of a model: attention, then feed_forward or router and experts.", .methods = kLayerMethods, .fields = kLayerFields, .meta = kLayerMeta});
    register_type<PartValue>(L, {.name = nullptr, .help = "part of a layer: attention, feed_forward, experts or shared_experts, callable with :forward(x).", .methods = kPartMethods, .fields = {}, .meta = kPartMeta});
}
}  // namespace moe::lua
