// A model in Lua.
#pragma once
#include "core/model/model.h"
#include "core/train/run.h"
#include "lua/bind/lua.h"

#include <memory>
#include <mutex>

namespace moe::lua {

/// Shares the model with the run that owns it, where one does. A model without a run keeps its interventions itself.
struct ModelValue {
    std::shared_ptr<Model> model;
    std::shared_ptr<train::Run> run = {};
    std::shared_ptr<train::Interventions> own = {};
};
template <>
struct TypeName<ModelValue> {
    static constexpr const char* value = "model";
};

/// A run's step edge, held: no other thread is in a step of it. Null run: nothing.
using HeldEdge = std::unique_lock<train::StepEdge>;
/// Waits for the edge with the state's lock let go, until an interrupt. Take it before anything that a step of the run reads or writes.
HeldEdge hold_edge(lua_State* L, const std::shared_ptr<train::Run>& run);
/// A model that nobody else touches meanwhile.
struct LiveModel {
    ModelValue value;
    HeldEdge edge;
    Model* operator->() const { return value.model.get(); }
    Model& operator*() const { return *value.model; }
};
LiveModel live_model(lua_State* L, const ModelValue& value);

/// f(L), which computes with `of`. Where the model is cut over ranks all call it together, each with tensors of its own (its tokens), and a hook that fails on one of them fails on all once all
/// have computed. Of a model that each rank has whole, each may call it by itself.
int call_on_all_that_have(lua_State* L, const ModelValue& of, Function f);
/// The same, of a Value with a model `of` at index 1.
template <class Value, Function f>
int by_all_that_have(lua_State* L) {
    ModelValue of = self<Value>(L).of;
    return call_on_all_that_have(L, of, f);
}

/// Builds a model without data: vocabulary from the tokenizer where the configuration leaves it open, the device from
/// configuration and session. `dtype`: "fp64", "fp32", "bf16", or "" for training.use_*.
std::shared_ptr<Model> build_model(lua_State* L, const Config& config, const std::string& dtype, bool training);

}  // namespace moe::lua
