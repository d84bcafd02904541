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
    int64_t tokens_asked = 0;    ///< for; what comes is whole batches. 0: none, or not known
};
template <>
struct TypeName<TraceValue> {
    static constexpr const char* value = "trace";
};

/// One line that shows a token: its text, or <id>.
std::string token_text(const TraceValue& t, int64_t id);
/// A routed layer at index. Throws moe::Error (usage, config).
int64_t layer_argument(lua_State* L, int index, const routing::Trace& t);
/// Methods of the type from trace_analysis.cpp.
std::span<const Binding> trace_analysis_methods();
/// Options of model:trace and run:trace beside those that say how much: weights, file, memory. Of several ranks the first writes the file.
routing::TraceOptions trace_options(const Options& o, const dist::Mesh& mesh);
/// The methods model:trace and model:expert_outputs, from trace_model.cpp.
int model_trace(lua_State* L);
int model_expert_outputs(lua_State* L);

}  // namespace moe::lua
