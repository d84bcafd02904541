// A model in Lua.
#pragma once
#include "core/model/model.h"
#include "lua/bind/lua.h"

#include <memory>

namespace moe::lua {

/// Shares the model with the run that owns it, where one does.
struct ModelValue {
    std::shared_ptr<Model> model;
};
template <>
struct TypeName<ModelValue> {
    static constexpr const char* value = "model";
};

/// Builds a model without data: vocabulary from the tokenizer where the configuration leaves it open, the device from
/// configuration and session. `dtype`: "fp64", "fp32", "bf16", or "" for training.use_*.
std::shared_ptr<Model> build_model(lua_State* L, const Config& config, const std::string& dtype, bool training);

}  // namespace moe::lua
