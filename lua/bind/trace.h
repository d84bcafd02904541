// What the router did with a set of tokens, in Lua.
#pragma once
#include "core/data/tokenizer.h"
#include "core/routing/trace.h"
#include "lua/bind/lua.h"

#include <memory>

namespace moe::lua {

struct TraceValue {
    std::shared_ptr<routing::Trace> trace;
    std::shared_ptr<data::Tokenizer> tokenizer;
    int64_t seq_length = 0;      ///< a context never crosses the start of a sequence
};
template <>
struct TypeName<TraceValue> {
    static constexpr const char* value = "trace";
};

}  // namespace moe::lua
