#include "lua/bind/data.h"

#include "lua/bind/bind.h"
#include "lua/bind/config.h"
#include "lua/bind/control.h"
#include "lua/bind/tensor.h"

#include <ATen/ATen.h>

namespace moe::lua {

std::optional<data::Batch> DataValue::next() {
    if (num_tokens > 0 && taken >= num_tokens) return {};
    data::Batch b = loader->next(batch_size, 0, batch_size);
    taken += b.ids.numel();
    return b;
}
void DataValue::reset() {
    loader->restore(start);
    taken = 0;
}

DataValue& check_data(lua_State* L, int index) {
    if (!test_box<DataValue>(L, index)) {
        lua_getglobal(L, "moe");
        lua_getfield(L, -1, "data");
        lua_pushvalue(L, index);
        lua_call(L, 1, 1);
        lua_replace(L, index);
        lua_pop(L, 1);
    }
    return check<DataValue>(L, index, "data");
}

namespace {
DataValue& self_data(lua_State* L) { return self<DataValue>(L); }

int open_data_of(lua_State* L) {
    ConfigValue c = check_config(L, 1, "config");
    Options o(L, 2, {"validation", "tokens", "batch_size", "seq_length"});
    Config config = *c.config;
    config.training.seq_length = o.integer("seq_length", config.training.seq_length);
    DataValue d;
    d.validation = o.boolean("validation", false);
    d.num_tokens = o.integer("tokens", 0);
    d.batch_size = o.integer("batch_size", std::max<int64_t>(1, config.training.micro_batch_size));
    MOE_CHECK(d.num_tokens >= 0, usage, "moe.open_data: tokens", std::to_string(d.num_tokens), "1 or more", "");
    MOE_CHECK(d.batch_size >= 1 && config.training.seq_length >= 1, usage, "moe.open_data: batch_size, seq_length", fmt::format("{}, {}", d.batch_size, config.training.seq_length), "1 or more", "");
    d.tokenizer = data::open_tokenizer(config.data.tokenizer);
    if (!config.model.vocab_size) config.model.vocab_size = d.tokenizer->vocab_size();
    d.loader = data::open_loader(config, d.validation);
    d.start = d.loader->state();
    d.config = std::make_shared<const Config>(std::move(config));
    push<DataValue>(L, std::move(d));
    return 1;
}

int push_batch(lua_State* L, const data::Batch& b) {
    push_ordered_table(L, {"ids", "targets", "domain", "doc_start"});
    auto set = [&](const char* name, const at::Tensor& t) { push_tensor(L, t), lua_setfield(L, -2, name); };
    set("ids", b.ids);
    set("targets", b.targets);
    set("domain", b.domain);
    set("doc_start", b.doc_start);
    return 1;
}

int next_batch(lua_State* L) {
    throw_if_interrupted(L);
    auto b = self_data(L).next();
    return b ? push_batch(L, *b) : (lua_pushnil(L), 1);
}

/// Upvalues: the data, batches left (−1: up to the end).
int iterate(lua_State* L) {
    int64_t left = lua_tointeger(L, upvalue(2));
    lua_settop(L, 0);
    if (left == 0) return lua_pushnil(L), 1;
    lua_pushinteger(L, left < 0 ? left : left - 1);
    lua_replace(L, upvalue(2));
    lua_pushvalue(L, upvalue(1));
    return next_batch(L);
}
int batches(lua_State* L) {
    auto& d = self_data(L);
    int64_t count = lua_isnoneornil(L, 2) ? -1 : check_integer(L, 2, "count");
    MOE_CHECK(count >= 0 || d.num_tokens > 0, usage, "data:batches", "no count, of data without an end", "d:batches(n), or moe.data(…, {tokens =})", "");
    lua_settop(L, 1);
    lua_pushinteger(L, count);
    push_function(L, {"next", iterate, "next batch of d:batches."}, "data:batches.next", 2);
    return 1;
}

int reset(lua_State* L) {
    self_data(L).reset();
    lua_settop(L, 1);
    return 1;
}

int decode(lua_State* L) {
    auto& d = self_data(L);
    at::Tensor ids = lua_istable(L, 2) ? tensor_from_table(L, 2, at::kLong) : check_tensor(L, 2, "ids");
    MOE_CHECK(at::isIntegralType(ids.scalar_type(), false), dtype, "data:decode: ids", c10::toString(ids.scalar_type()), "integers", "");
    ids = ids.to(at::kCPU, at::kLong).flatten().contiguous();
    push_string(L, d.tokenizer->decode(std::span(ids.const_data_ptr<int64_t>(), size_t(ids.numel()))));
    return 1;
}
int encode(lua_State* L) {
    auto& d = self_data(L);
    std::vector<int64_t> ids;
    d.tokenizer->encode(check_string(L, 2, "text"), ids);
    return push_tensor(L, at::tensor(ids, at::kLong));
}

int field_domains(lua_State* L) {
    lua_newtable(L);
    lua_Integer i = 0;
    for (auto& name : self_data(L).loader->domains()) {
        push_string(L, name);
        lua_rawseti(L, -2, ++i);
    }
    return 1;
}
int field_seq_length(lua_State* L) { return lua_pushinteger(L, self_data(L).config->training.seq_length), 1; }
int field_batch_size(lua_State* L) { return lua_pushinteger(L, self_data(L).batch_size), 1; }
int field_vocab_size(lua_State* L) { return lua_pushinteger(L, self_data(L).tokenizer->vocab_size()), 1; }
int field_num_tokens(lua_State* L) {
    auto& d = self_data(L);
    int64_t n = d.num_tokens > 0 ? d.num_tokens : d.loader->tokens_per_epoch();
    return n < 0 ? lua_pushnil(L) : lua_pushinteger(L, n), 1;
}
int field_data_config(lua_State* L) {
    push<ConfigValue>(L, {self_data(L).config, nullptr});
    return 1;
}
int data_text(lua_State* L) {
    auto* box = test_box<DataValue>(L, 1);
    if (!box || !*box) return lua_pushliteral(L, "data (freed)"), 1;
    auto& d = **box;
    std::string names;
    for (auto& name : d.loader->domains()) names += (names.empty() ? "" : ", ") + name;
    bool is_whole = d.num_tokens % (d.batch_size * d.config->training.seq_length) == 0;
    std::string in_all = d.num_tokens == 0 ? "" : fmt::format(", {} in all{}", d.num_tokens, is_whole ? "" : ", rounded up to whole batches");
    push_string(L, fmt::format("data: {}, batches of {} x {} tokens{}", names, d.batch_size, d.config->training.seq_length, in_all));
    return 1;
}

const Binding kFunctions[] = {
    {"open_data", open_data_of,
     "moe.open_data(config, {validation = false, tokens =, batch_size =, seq_length =}): the data that a configuration names, as batches; moe.data is the shorter way. It ends after `tokens`, rounded up to whole batches, else never: what is used up begins again."},
};
const Binding kMethods[] = {
    {"next", next_batch, "d:next(): the next batch {ids, targets int64, domain int32 (−1: padding), doc_start int32}, each [batch_size, seq_length]; nil at the end.\nExample: print(moe.data(\"synthetic\"):next().ids.shape[2])"},
    {"batches", batches, "for b in d:batches(n) do … end: the next n batches, or all up to the end.\nExample: for b in moe.data(\"synthetic\", { tokens = 64, seq_length = 32, batch_size = 1 }):batches() do print(b.ids:sum():item()) end"},
    {"reset", reset, "d:reset(): begins again with the first batch. Returns d."},
    {"decode", decode, "d:decode(ids): text of token ids, a tensor or a list.\nExample: local d = moe.data(\"synthetic\") print(d:decode(d:encode(\"experts\")))"},
    {"encode", encode, "d:encode(text): token ids, int64 [time]."},
};
const Binding kFields[] = {
    {"domains", field_domains, "d.domains: names of the domains."},
    {"seq_length", field_seq_length, "d.seq_length: positions of a sequence."},
    {"batch_size", field_batch_size, "d.batch_size: sequences of a batch."},
    {"vocab_size", field_vocab_size, "d.vocab_size: of the tokenizer."},
    {"num_tokens", field_num_tokens, "d.num_tokens: tokens up to the end, or of an epoch; nil where documents never end."},
    {"config", field_data_config, "d.config: the configuration that it was opened by."},
};
const Binding kMeta[] = {{"__tostring", data_text, "tostring(d): one line about it."}};
}  // namespace

void open_datasets(lua_State* L) {
    set_functions(L, "moe.", kFunctions);
    register_type<DataValue>(L, {.name = nullptr, .help = "data: batches of token ids with a domain for each; moe.data makes one.", .methods = kMethods, .fields = kFields, .meta = kMeta});
}
}  // namespace moe::lua
