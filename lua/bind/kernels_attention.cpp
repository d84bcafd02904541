// moe.kernels: rotary tables, attention, decoding over a cache of latents, and the random draws of dropout.
#include "core/base/suggest.h"
#include "core/kernels/mla/attention.h"
#include "core/kernels/mla_decode/mla_decode.h"
#include "core/tensor/check.h"
#include "lua/bind/kernels.h"

#include <ATen/ATen.h>

#include <limits>

namespace moe::lua {
namespace {
using at::Tensor;
using namespace kernels;

constexpr std::pair<const char*, Purpose> kPurposes[] = {{"init", Purpose::init}, {"attention_dropout", Purpose::attention_dropout}, {"expert_dropout", Purpose::expert_dropout},
                                                         {"router_noise", Purpose::router_noise}};
Purpose purpose_named(lua_State* L, const std::string& name) {
    std::vector<std::string> names;
    std::string want;
    for (auto& [text, purpose] : kPurposes) {
        if (name == text) return purpose;
        names.emplace_back(text);
        want += (want.empty() ? "one of " : ", ") + names.back();
    }
    MOE_THROW(usage, running(L) + ": purpose", '"' + name + '"', want, did_you_mean(name, names));
}
/// A number of the key: 32 bits.
uint32_t key_number(lua_State* L, const Options& o, const char* name, uint32_t fallback) {
    int64_t value = o.integer(name, fallback);
    MOE_CHECK(value >= 0 && value <= std::numeric_limits<uint32_t>::max(), usage, running(L) + ": " + name, std::to_string(value), "0 … 2^32 − 1", "");
    return uint32_t(value);
}
}  // namespace

RandomRows random_rows(lua_State* L, const Options& o, RandomRows rows) {
    rows.key.seed = uint64_t(o.integer("seed", int64_t(rows.key.seed)));
    if (o.has("purpose")) rows.key.purpose = purpose_named(L, o.string("purpose", ""));
    rows.key.step = key_number(L, o, "step", rows.key.step), rows.key.layer = key_number(L, o, "layer", rows.key.layer);
    rows.first = o.integer("first", rows.first), rows.group = o.integer("group", rows.group), rows.stride = o.integer("stride", rows.stride);
    return rows;
}

namespace {
// --- draws ---

int call_dropout_mask(lua_State* L) {
    Options o(L, 4, {MOE_LUA_RANDOM_ROWS, "dtype", "device"});
    return push_tensor(L, dropout_mask(check_integer(L, 1, "R"), check_integer(L, 2, "C"), check_number(L, 3, "p"), random_rows(L, o, {}), option_dtype(o, "dtype", at::kFloat), option_device(o)));
}
int call_dropout(lua_State* L) {
    Options o(L, 3, {MOE_LUA_RANDOM_ROWS});
    Tensor &x = check_tensor(L, 1, "x"), y = dropout(x, check_number(L, 2, "p"), random_rows(L, o, {}));
    return push_tensor(L, y.is_same(x) ? x.clone() : y);
}
int call_normal_rows(lua_State* L) {
    Options o(L, 3, {MOE_LUA_RANDOM_ROWS, "dtype", "device"});
    return push_tensor(L, normal_rows(check_integer(L, 1, "R"), check_integer(L, 2, "C"), random_rows(L, o, {}), option_dtype(o, "dtype", at::kFloat), option_device(o)));
}

// --- attention ---

int call_rope_table(lua_State* L) {
    Options o(L, 3, {"theta", "factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "original_context", "dtype", "device"});
    YarnSettings y;
    y.factor = o.number("factor", y.factor), y.beta_fast = o.number("beta_fast", y.beta_fast), y.beta_slow = o.number("beta_slow", y.beta_slow);
    y.mscale = o.number("mscale", y.mscale), y.mscale_all_dim = o.number("mscale_all_dim", y.mscale_all_dim), y.original_context = o.integer("original_context", y.original_context);
    RopeTable table = rope_table(check_integer(L, 1, "S"), check_integer(L, 2, "rope"), o.number("theta", 10000), true, y, option_dtype(o, "dtype", at::kDouble), option_device(o));
    push_tensor(L, table.cos);
    push_tensor(L, table.sin);
    return 2;
}

MlaShape mla_shape(const Options& o, const Tensor& q) {
    MlaShape m;
    m.B = o.integer("B", 1);
    m.S = o.integer("S", m.B > 0 ? q.size(0) / m.B : 0);
    m.H = o.integer("H", m.H), m.G = o.integer("G", m.H);
    m.nope = o.integer("nope", m.nope), m.rope = o.integer("rope", m.rope), m.v = o.integer("v", m.v);
    m.softmax_scale = o.number("softmax_scale", m.softmax_scale), m.window = o.integer("window", m.window);
    return m;
}
int call_mla_attention(lua_State* L) {
    Options o(L, 3, {"k_rope", "cos", "sin", "interleaved", "B", "S", "H", "G", "nope", "rope", "v", "softmax_scale", "window", "doc_start", "p", MOE_LUA_RANDOM_ROWS});
    Tensor &q = check_tensor(L, 1, "q"), &kv = check_tensor(L, 2, "kv");
    check_dims("mla_attention", {"q", q}, 2);
    MlaShape m = mla_shape(o, q);
    RopeTable table{optional_tensor(L, o, "cos"), optional_tensor(L, o, "sin"), o.boolean("interleaved", true)};
    Tensor k_rope = optional_tensor(L, o, "k_rope"), doc_start = optional_tensor(L, o, "doc_start");
    double p = o.number("p", 0);
    RandomRows of_heads{{0, Purpose::attention_dropout}, 0, m.H, m.H};
    if (p == 0) return push_tensor(L, mla_attention(q, kv, k_rope, table, m, doc_start));
    return push_tensor(L, mla_attention_dropout(q, kv, k_rope, table, m, doc_start, p, random_rows(L, o, of_heads)));
}

// --- decoding ---

LatentCache::Format format_named(lua_State* L, const std::string& name) {
    if (name == "plain") return LatentCache::Format::plain;
    if (name == "fp8") return LatentCache::Format::fp8;
    MOE_THROW(usage, running(L) + ": format", '"' + name + '"', "plain or fp8", did_you_mean(name, {"plain", "fp8"}));
}
int call_make_cache_rows(lua_State* L) {
    Options o(L, 4, {"format", "dtype", "device"});
    auto format = format_named(L, o.string("format", "plain"));
    at::ScalarType dtype = option_dtype(o, "dtype", at::kFloat);
    return push_tensor(L, make_cache_rows(format, check_integer(L, 1, "num_blocks"), check_integer(L, 2, "latent"), check_integer(L, 3, "rope"), dtype, option_device(o)));
}
LatentCache cache_argument(lua_State* L, int index) {
    check_table(L, index, "cache");
    Options o(L, index, {"format", "latent", "rope", "rows", "block_table"});
    LatentCache cache;
    cache.format = format_named(L, o.string("format", "plain"));
    cache.latent = o.integer("latent", cache.latent), cache.rope = o.integer("rope", cache.rope);
    cache.rows = optional_tensor(L, o, "rows"), cache.block_table = optional_tensor(L, o, "block_table");
    return cache;
}
int call_append_latent(lua_State* L) {
    append_latent(cache_argument(L, 1), check_tensor(L, 2, "latent"), check_tensor(L, 3, "rope"), check_tensor(L, 4, "sequence"), check_tensor(L, 5, "position"));
    return lua_settop(L, 1), 1;
}
int call_mla_decode(lua_State* L) {
    MlaDecoded out = mla_decode(check_tensor(L, 1, "q_latent"), check_tensor(L, 2, "q_rope"), cache_argument(L, 3), check_tensor(L, 4, "lengths"), check_number(L, 5, "scale"));
    push_tensor(L, out.out);
    push_tensor(L, out.lse);
    return 2;
}

const Binding kFunctions[] = {
    {"dropout", call_dropout,
     "moe.kernels.dropout(x, p, {seed = 0, purpose = \"init\", step = 0, layer = 0, first = 0, group = 1, stride = 1}): x [R, C] with each element 0 with probability p, else over 1 − p. An\n"
     "element's draw depends on the key (seed, purpose, step, layer), its column and its row's number: first + r // group · stride + r % group.\n"
     "y = moe.kernels.dropout(moe.ones {4, 8}, 0.1, {seed = 7, step = 3})"},
    {"dropout_mask", call_dropout_mask,
     "moe.kernels.dropout_mask(R, C, p, {seed =, …, dtype = \"fp32\", device = \"cpu\"}): the multipliers [R, C] of dropout, fp32 or fp64; options as for dropout.\n"
     "mask = moe.kernels.dropout_mask(4, 8, 0.1, {seed = 7})"},
    {"normal_rows", call_normal_rows,
     "moe.kernels.normal_rows(R, C, {seed =, …, dtype = \"fp32\", device = \"cpu\"}): standard normal draws [R, C] by key, fp32 or fp64; options as for dropout.\n"
     "noise = moe.kernels.normal_rows(4, 8, {seed = 7, purpose = \"router_noise\"})"},
    {"rope_table", call_rope_table,
     "moe.kernels.rope_table(S, rope, {theta = 10000, factor = 1, beta_fast = 32, beta_slow = 1, mscale = 1, mscale_all_dim = 0, original_context = 4096, dtype = \"fp64\", device = \"cpu\"}):\n"
     "cos and sin [S, rope / 2] of the rotary embedding for positions 0 … S − 1; factor above 1: YaRN.\n"
     "cos, sin = moe.kernels.rope_table(16, 8)"},
    {"mla_attention", call_mla_attention,
     "moe.kernels.mla_attention(q, kv, {H =, nope =, rope = 0, v =, G = H, B = 1, S = T / B, k_rope =, cos =, sin =, interleaved = true, softmax_scale = 1, window = 0, doc_start =, p = 0, seed = 0, …}):\n"
     "causal attention; q [T, H · (nope + rope)] and k_rope [T, rope] not yet rotated, kv [T, G · (nope + v)], T = B · S → [T, H · v]. doc_start int32 [B, S]: the first position that a token sees.\n"
     "p: probabilities dropped, with dropout's options (purpose attention_dropout, a row a token and head).\n"
     "out = moe.kernels.mla_attention(moe.randn {6, 2 * 4}, moe.randn {6, 2 * (4 + 3)}, {H = 2, nope = 4, v = 3, softmax_scale = 0.5})"},
    {"make_cache_rows", call_make_cache_rows,
     "moe.kernels.make_cache_rows(num_blocks, latent, rope, {format = \"plain\", dtype = \"fp32\", device = \"cpu\"}): rows of an empty cache: [num_blocks, 64, latent + rope], or bytes for format \"fp8\".\n"
     "rows = moe.kernels.make_cache_rows(4, 512, 64, {dtype = \"bf16\"})"},
    {"append_latent", call_append_latent,
     "moe.kernels.append_latent(cache, latent, rope, sequence, position): writes latent [T, L] and rope [T, R] as row position[t] of sequence sequence[t] (int32 [T]; negative: left out).\n"
     "cache = {rows =, block_table = int32 [B, M], latent = L, rope = R, format = \"plain\"}; token t of sequence b lies in row t % 64 of block block_table[b][t // 64]. Returns cache.\n"
     "moe.kernels.append_latent(cache, moe.randn {1, 8}, moe.randn {1, 4}, moe.zeros({1}, {dtype = \"int32\"}), moe.zeros({1}, {dtype = \"int32\"}))"},
    {"mla_decode", call_mla_decode,
     "moe.kernels.mla_decode(q_latent, q_rope, cache, lengths, scale): attention of Q new tokens a sequence over the cache: out [B, Q, H, L] and lse [B, Q, H] (logarithm of the sum of e^score).\n"
     "q_latent [B, Q, H, L], q_rope [B, Q, H, R]; lengths int32 [B], the new tokens included; cache as for append_latent. On a GPU its block numbers are not checked.\n"
     "out, lse = moe.kernels.mla_decode(moe.randn {1, 1, 2, 8}, moe.randn {1, 1, 2, 4}, cache, moe.ones({1}, {dtype = \"int32\"}), 0.5)"},
};
}  // namespace

void add_attention_kernels(lua_State* L) { set_kernels(L, kFunctions); }
}  // namespace moe::lua
