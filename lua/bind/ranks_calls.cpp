// What is said about a call, so that ranks can see whether theirs are the same, and values on their way to other ranks.
#include "lua/bind/ranks_calls.h"

#include "core/base/random.h"
#include "lua/bind/tensor.h"

#include <ATen/ATen.h>

#include <cstring>

namespace moe::lua {
namespace {
constexpr int kMostDepth = 50;
constexpr size_t kMostText = 60;
constexpr int64_t kMostBytes = 1 << 20, kSamples = 1 << 16;

// --- plain values as bytes ---

template <class T>
void append(std::string& out, T value) {
    out.append(reinterpret_cast<const char*>(&value), sizeof value);
}
template <class T>
T take(const std::string& bytes, size_t& at) {
    T value;
    std::memcpy(&value, bytes.data() + at, sizeof value);
    at += sizeof value;
    return value;
}

/// Throws (usage) for what has no meaning in another process.
void pack_value(lua_State* L, int index, std::string& out, int depth = 0) {
    index = lua_absindex(L, index);
    luaL_checkstack(L, 4, "values");
    int type = lua_type(L, index);
    out.push_back(char(type == LUA_TNUMBER && lua_isinteger(L, index) ? 'i' : '0' + type));
    if (type == LUA_TNIL) return;
    if (type == LUA_TBOOLEAN) return out.push_back(char(lua_toboolean(L, index)));
    if (type == LUA_TNUMBER) return lua_isinteger(L, index) ? append(out, lua_tointeger(L, index)) : append(out, lua_tonumber(L, index));
    if (type == LUA_TSTRING) {
        size_t size = 0;
        const char* data = lua_tolstring(L, index, &size);
        append(out, uint64_t(size));
        out.append(data, size);
        return;
    }
    MOE_CHECK(type == LUA_TTABLE && depth < kMostDepth, usage, running(L) + ": result", depth < kMostDepth ? got_text(L, index) : "a table inside itself", "numbers, texts, booleans and tables of them",
              "results go to all ranks: end the function without a return, or return what can go");
    size_t place = out.size();
    append(out, uint64_t(0));
    uint64_t count = 0;
    lua_pushnil(L);
    while (lua_next(L, index)) {
        pack_value(L, -2, out, depth + 1);
        pack_value(L, -1, out, depth + 1);
        lua_pop(L, 1);
        ++count;
    }
    std::memcpy(out.data() + place, &count, sizeof count);
}

void push_value(lua_State* L, const std::string& bytes, size_t& at) {
    luaL_checkstack(L, 4, "values");
    char type = bytes[at++];
    if (type == 'i') return lua_pushinteger(L, take<lua_Integer>(bytes, at));
    switch (type - '0') {
        case LUA_TNIL: return lua_pushnil(L);
        case LUA_TBOOLEAN: return lua_pushboolean(L, bytes[at++]);
        case LUA_TNUMBER: return lua_pushnumber(L, take<lua_Number>(bytes, at));
        case LUA_TSTRING: {
            auto size = take<uint64_t>(bytes, at);
            push_string(L, std::string_view(bytes).substr(at, size));
            at += size;
            return;
        }
        default: {
            auto count = take<uint64_t>(bytes, at);
            lua_newtable(L);
            for (uint64_t i = 0; i < count; ++i) {
                push_value(L, bytes, at);
                push_value(L, bytes, at);
                lua_rawset(L, -3);
            }
        }
    }
}
}  // namespace

std::string pack_from(lua_State* L, int first) {
    std::string out;
    for (int i = first, n = lua_gettop(L); i <= n; ++i) pack_value(L, i, out);
    return out;
}

int push_all(lua_State* L, const std::string& bytes) {
    int n = 0;
    for (size_t at = 0; at < bytes.size(); ++n) push_value(L, bytes, at);
    return n;
}

// --- calls ---

std::string at_place(lua_State* L, const std::string& what) {
    std::string place = lua_place(L);
    return place.empty() ? what : what + " at " + place;
}

namespace {
/// Numbers, texts and booleans as they are, those in tables of options too: what may be different in silence is only what cannot be compared.
std::string argument_text(lua_State* L, int index, bool inside) {
    int type = lua_type(L, index);
    if (type == LUA_TTABLE && !inside && !lua_rawlen(L, index)) {
        std::string text;
        if (lua_getmetatable(L, index)) return lua_pop(L, 1), "…";
        each_sorted(L, index, [&] {
            if (lua_type(L, -2) == LUA_TSTRING) text += (text.empty() ? "" : ", ") + to_string(L, -2) + " = " + argument_text(L, lua_gettop(L), true);
        });
        return "{" + text + "}";
    }
    if (type == LUA_TNUMBER || type == LUA_TBOOLEAN || type == LUA_TNIL) return to_string(L, index);
    if (type != LUA_TSTRING) return "…";
    std::string text = to_string(L, index);
    return '"' + (text.size() > kMostText ? text.substr(0, kMostText - 3) + "…" : text) + '"';
}

uint64_t mixed(uint64_t a, uint64_t b) {
    a = (a ^ (b + 0x9e3779b97f4a7c15u + (a << 6) + (a >> 2))) * 0xff51afd7ed558ccdu;
    return a ^ (a >> 32);
}
uint64_t digest_of_bytes(uint64_t sum, const char* bytes, int64_t count) {
    for (int64_t i = 0; i < count; i += 8) {
        uint64_t word = 0;
        std::memcpy(&word, bytes + i, size_t(std::min<int64_t>(8, count - i)));
        sum = mixed(sum, word);
    }
    return sum;
}
/// Of dtype, shape and, in the CPU's memory, values: all of up to 1 MiB, of more 65536 of them. To look into a GPU's would be to wait for it.
uint64_t digest_of_tensor(const at::Tensor& tensor) {
    uint64_t sum = LUA_TUSERDATA;
    if (!tensor.defined()) return sum;
    sum = mixed(mixed(sum, uint64_t(tensor.scalar_type())), uint64_t(tensor.dim()));
    for (int64_t size : tensor.sizes()) sum = mixed(sum, uint64_t(size));
    if (!tensor.device().is_cpu() || tensor.layout() != at::kStrided || tensor.numel() == 0) return sum;
    at::Tensor x = tensor.detach().resolve_conj().resolve_neg();
    int64_t bytes = int64_t(x.element_size()), n = x.numel();
    if (n * bytes <= kMostBytes) {
        x = x.contiguous();
        return digest_of_bytes(sum, static_cast<const char*>(x.const_data_ptr()), n * bytes);
    }
    for (int64_t k = 0; k < kSamples; ++k) {
        int64_t left = k * (n - 1) / (kSamples - 1), offset = 0;            // the first and the last are among them
        for (int64_t d = x.dim() - 1; d >= 0; --d) {
            offset += left % x.size(d) * x.stride(d);
            left /= x.size(d);
        }
        sum = digest_of_bytes(sum, static_cast<const char*>(x.const_data_ptr()) + offset * bytes, bytes);
    }
    return sum;
}

/// Whether a table with a metatable is data all the same: lists and ordered tables of moe's.
bool is_plain_table(lua_State* L, int index) {
    if (!lua_getmetatable(L, index)) return true;
    lua_getfield(L, -1, "__keys");
    lua_getfield(L, -2, "__name");
    bool plain = !lua_isnil(L, -2) || (lua_type(L, -1) == LUA_TSTRING && to_string(L, -1) == "moe.list");
    return lua_pop(L, 3), plain;
}

/// Of a plain value, in whatever order a table has its keys. What cannot be compared, such as a function, counts by its type; so do tensors where each rank has its own.
uint64_t digest_of(lua_State* L, int index, int depth, bool own_tensors) {
    index = lua_absindex(L, index);
    luaL_checkstack(L, 6, "values");
    int type = lua_type(L, index);
    auto sum = uint64_t(type);
    if (type == LUA_TBOOLEAN) return mixed(sum, uint64_t(lua_toboolean(L, index)));
    if (type == LUA_TNUMBER) {
        lua_Number x = lua_tonumber(L, index);
        if (lua_isinteger(L, index)) return mixed(sum + 100, uint64_t(lua_tointeger(L, index)));
        uint64_t bits = 0;
        if (x == x) std::memcpy(&bits, &x, sizeof bits);      // any nan is like another
        return mixed(sum, bits);
    }
    if (type == LUA_TSTRING) return mixed(sum, hash_name(to_string(L, index)));
    if (type == LUA_TUSERDATA && !own_tensors) {
        auto* tensor = test_box<at::Tensor>(L, index);
        return tensor && *tensor ? digest_of_tensor(**tensor) : sum;
    }
    if (type != LUA_TTABLE || depth >= kMostDepth) return sum;
    if (!is_plain_table(L, index)) {                          // of an object what is certainly data: a labelled array's tensor, a shape's numbers
        lua_pushliteral(L, "tensor");
        lua_rawget(L, index);
        if (test_box<at::Tensor>(L, -1)) sum = mixed(sum, digest_of(L, -1, depth + 1, own_tensors));
        lua_pop(L, 1);
        for (lua_Integer i = 1, n = lua_Integer(lua_rawlen(L, index)); i <= n; ++i) {
            if (lua_rawgeti(L, index, i) == LUA_TNUMBER) sum = mixed(sum, digest_of(L, -1, depth + 1, own_tensors));
            lua_pop(L, 1);
        }
        return sum;
    }
    lua_pushnil(L);
    while (lua_next(L, index)) {
        sum += mixed(digest_of(L, -2, depth + 1, own_tensors), digest_of(L, -1, depth + 1, own_tensors));
        lua_pop(L, 1);
    }
    return mixed(sum, 1);
}
/// Whether the first argument is the object itself.
bool is_method(lua_State* L) { return running_binding(L).find(':') != std::string::npos; }
}  // namespace

uint64_t digest_of_call(lua_State* L, bool own_tensors) {
    uint64_t sum = 0;
    for (int i = is_method(L) ? 2 : 1, n = lua_gettop(L); i <= n; ++i) sum = mixed(sum, digest_of(L, i, 0, own_tensors));
    return sum;
}

std::string call_text(lua_State* L) {
    int n = lua_gettop(L);
    luaL_checkstack(L, 10, "arguments");
    std::string name = running(L), text, blank = "…";
    if (size_t at = name.rfind(blank); at != std::string::npos) return name.replace(at, blank.size(), argument_text(L, n, false));      // an operator, an assignment
    if (name.ends_with(" <close>")) return name;
    for (int i = is_method(L) ? 2 : 1; i <= n; ++i) text += (text.empty() ? "" : ", ") + argument_text(L, i, false);
    return name + "(" + text + ")";
}
}  // namespace moe::lua
