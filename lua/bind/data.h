// Data sets in Lua.
#pragma once
#include "core/config/config.h"
#include "core/data/loader.h"
#include "core/data/tokenizer.h"
#include "lua/bind/lua.h"

#include <nlohmann/json.hpp>

#include <memory>

namespace moe::lua {

/// A stream of batches with an end, where one was asked for.
struct DataValue {
    std::shared_ptr<const Config> config;
    bool validation = false;
    std::shared_ptr<data::Loader> loader;
    std::shared_ptr<data::Tokenizer> tokenizer;
    nlohmann::json start;                 ///< the loader's state at the beginning
    int64_t batch_size = 1;
    int64_t num_tokens = 0, taken = 0;    ///< tokens to give, 0 for no end; tokens given

    /// Nothing at the end.
    std::optional<data::Batch> next();
    void reset();
    bool hides_documents() const { return config->data.packing && config->data.document_mask; }
};
template <>
struct TypeName<DataValue> {
    static constexpr const char* value = "data";
};

/// A data object, or what moe.data makes of the value at index; it is put in its place. Throws moe::Error (usage).
DataValue& check_data(lua_State* L, int index);

}  // namespace moe::lua
