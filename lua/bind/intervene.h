// Interventions in Lua: what router.cpp, run.cpp and layers.cpp share.
#pragma once
#include "core/train/interventions.h"
#include "lua/bind/model.h"

namespace moe::lua {

struct RouterValue {
    ModelValue of;
    std::vector<int64_t> layers = {};     ///< that its calls mean where they name none; empty: all
};
template <>
struct TypeName<RouterValue> {
    static constexpr const char* value = "router";
};

/// An intervention that can be taken back.
struct HandleValue {
    ModelValue of;
    int64_t id = 0;
    std::string text;
};
template <>
struct TypeName<HandleValue> {
    static constexpr const char* value = "intervention";
};

/// Does an intervention and pushes its handle. Waits for the step edge of a run.
int intervene(lua_State* L, const ModelValue& of, const std::string& what, const train::Values& args);
/// The function at index (nil: null) as {function = …}; options.replay false keeps it out of the log.
train::Values function_arguments(lua_State* L, int index, bool replay);
/// The intervention's own owner: the run's, else the model's.
const train::Interventions& interventions_of(const ModelValue& of);
/// Of its hooks; null where it has none.
std::shared_ptr<train::HookFailures> failures_of(const ModelValue& of);
/// The model value at index with a place for its own interventions.
ModelValue& model_to_change(lua_State* L, int index);
/// Pushes run.events and the like from lines of events.jsonl.
void push_events(lua_State* L, const std::vector<std::string>& lines);
/// Reads {key = value} for run:set: keys of the configuration nested or with dots, or the last word of one that may change.
train::Values live_changes(lua_State* L, int index, const Config& config);

// Fields and methods of the model.
int router_of_model(lua_State* L);
int layers_of_model(lua_State* L);
int layer_of_model(lua_State* L);
/// router:forward(x), of layers.cpp.
int router_forward_of(lua_State* L);

void open_router(lua_State* L);
void open_layers(lua_State* L);

}  // namespace moe::lua
