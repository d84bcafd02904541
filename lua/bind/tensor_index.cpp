// t[i], t["1:3"], t[mask], t[ids], t{i, j}: parts of a tensor, read and written.
#include "core/tensor/check.h"
#include "lua/bind/tensor.h"

#include <ATen/ATen.h>
#include <ATen/TensorIndexing.h>

#include <charconv>

namespace moe::lua {
namespace {
using at::Tensor;
using at::indexing::Slice;
using at::indexing::TensorIndex;
using Indices = std::vector<TensorIndex>;

constexpr const char* kWant = "an index a dim: an integer, a range \"1:3\" or \"::2\", \"…\" for the dims between, \"new\" for a dim of size 1, a mask, or ids";

/// A name such as "shape" is no range: those start with a digit, a sign, a colon, dots or a comma.
bool is_range_text(std::string_view text) {
    size_t at = text.find_first_not_of(' ');
    if (at == std::string_view::npos) return false;
    text.remove_prefix(at);
    return std::string_view("0123456789-:.,").find(text[0]) != std::string_view::npos || text.starts_with("…") || text == "new" || text.starts_with("new,") || text.starts_with("new ");
}

std::string_view trimmed(std::string_view text) {
    while (!text.empty() && text.front() == ' ') text.remove_prefix(1);
    while (!text.empty() && text.back() == ' ') text.remove_suffix(1);
    return text;
}
[[noreturn]] void bad_range(lua_State* L, std::string_view part) { MOE_THROW(usage, "tensor[…]: range", '"' + std::string(part) + '"', kWant, ""); }

int64_t number_of(lua_State* L, std::string_view text, std::string_view part) {
    int64_t value = 0;
    auto [end, failed] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (failed != std::errc() || end != text.data() + text.size()) bad_range(L, part);
    return value;
}
TensorIndex range_part(lua_State* L, std::string_view part) {
    part = trimmed(part);
    if (part == "…" || part == "...") return at::indexing::Ellipsis;
    if (part == "new") return at::indexing::None;
    if (part.find(':') == std::string_view::npos) return number_of(L, part, part);
    std::optional<c10::SymInt> bounds[3];
    std::string_view rest = part;
    for (int i = 0;; ++i) {
        if (i == 3) bad_range(L, part);
        size_t colon = rest.find(':');
        std::string_view text = trimmed(rest.substr(0, colon));
        if (!text.empty()) bounds[i] = number_of(L, text, part);
        if (colon == std::string_view::npos) break;
        rest.remove_prefix(colon + 1);
    }
    MOE_CHECK(!bounds[2] || *bounds[2] > 0, usage, "tensor[…]: range", '"' + std::string(part) + '"', "a step above 0", "t:flip(dim) turns a dim round");
    return Slice(bounds[0], bounds[1], bounds[2]);
}
void add_ranges(lua_State* L, std::string_view text, Indices& out) {
    while (true) {
        size_t comma = text.find(',');
        out.push_back(range_part(L, text.substr(0, comma)));
        if (comma == std::string_view::npos) return;
        text.remove_prefix(comma + 1);
    }
}

Tensor ids_of(const Tensor& x, const Tensor& ids) {
    MOE_CHECK(at::isIntegralType(ids.scalar_type(), true), dtype, "tensor[ids]", describe(ids), "a mask of booleans, or ids of integers", "");
    // LibTorch takes uint8 for a mask, as it did before there were booleans.
    Tensor result = ids.scalar_type() == at::kBool || ids.scalar_type() == at::kLong ? ids : ids.to(at::kLong);
    return result.device() == x.device() ? result : result.to(x.device());
}
/// The value on the stack's top as an index of one dim (a text: of several).
void add_index(lua_State* L, const Tensor& x, Indices& out) {
    int index = lua_gettop(L);
    switch (lua_type(L, index)) {
        case LUA_TNUMBER: out.push_back(check_integer(L, index, "index")); return;
        case LUA_TSTRING: add_ranges(L, lua_tostring(L, index), out); return;
        case LUA_TTABLE: out.push_back(ids_of(x, tensor_from_table(L, index, lua_rawlen(L, index) ? std::optional<at::ScalarType>() : at::kLong))); return;
        default: break;
    }
    if (!test_box<Tensor>(L, index)) MOE_THROW(usage, "tensor[…]", got_text(L, index), kWant, "");
    out.push_back(ids_of(x, check_tensor(L, index, "index")));
}

/// A GPU's kernels would take ids out of range for the end of everything: they are looked at first.
void check_device_ids(const Tensor& x, const Indices& indices) {
    if (!x.is_cuda()) return;
    int64_t dim = 0, taken = 0;
    for (auto& i : indices) taken += i.is_tensor() && i.tensor().scalar_type() == at::kBool ? i.tensor().dim() : i.is_integer() || i.is_slice() || i.is_tensor();
    for (auto& i : indices) {
        if (i.is_ellipsis()) {
            dim += x.dim() - taken;
        } else if (i.is_tensor()) {
            bool mask = i.tensor().scalar_type() == at::kBool;
            if (!mask && dim >= 0 && dim < x.dim()) check_ids("tensor[ids]", i.tensor(), x.size(dim));
            dim += mask ? i.tensor().dim() : 1;
        } else {
            dim += i.is_integer() || i.is_slice();
        }
    }
}

/// The key at stack index `key` as indices: a table holds one for each dim.
Indices indices_of(lua_State* L, const Tensor& x, int key) {
    Indices out;
    if (lua_istable(L, key)) {
        lua_Integer n = lua_Integer(lua_rawlen(L, key));
        MOE_CHECK(n > 0 && n <= 64, usage, "tensor{…}", n ? std::to_string(n) + " indices" : "no index", kWant, "");
        for (lua_Integer i = 1; i <= n; ++i) {
            lua_rawgeti(L, key, i);
            add_index(L, x, out);
            lua_pop(L, 1);
        }
    } else {
        lua_pushvalue(L, key);
        add_index(L, x, out);
        lua_pop(L, 1);
    }
    check_device_ids(x, out);
    return out;
}

bool is_key(lua_State* L, int index) {
    if (lua_type(L, index) == LUA_TSTRING) {
        size_t size = 0;
        const char* text = lua_tolstring(L, index, &size);
        return is_range_text({text, size});
    }
    return lua_type(L, index) == LUA_TNUMBER || lua_istable(L, index) || test_box<Tensor>(L, index);
}
/// Row i of the first dim.
Tensor row(lua_State* L, const Tensor& x, int index) {
    int64_t i = check_integer(L, index, "index");
    MOE_CHECK(x.dim() > 0 && i >= -x.size(0) && i < x.size(0), shape, "tensor[i]", fmt::format("i = {} of {}", i, shape_text(x.sizes())),
              x.dim() ? fmt::format("0 … {}", x.size(0) - 1) : "a tensor with dims", "elements are 0-based, as in PyTorch");
    return x.select(0, i);
}
/// What is assigned: a tensor, a number, a boolean or a table of numbers, in x's dtype and on its device.
Tensor value_for(lua_State* L, const Tensor& x, int index) {
    if (lua_istable(L, index)) return tensor_from_table(L, index, x.scalar_type()).to(x.device());
    if (lua_isboolean(L, index)) return at::scalar_tensor(bool(lua_toboolean(L, index)), at::kBool).to(x.options());
    if (!test_box<Tensor>(L, index) && lua_type(L, index) != LUA_TNUMBER) bad_argument(L, index, "value", "a tensor, a number, a boolean or a table of numbers");
    return operand(L, index).to(x.options());
}
}  // namespace

int index_tensor(lua_State* L) {
    if (!is_key(L, 2)) return 0;
    Tensor& x = self_tensor(L);
    if (lua_type(L, 2) == LUA_TNUMBER) return push_tensor(L, row(L, x, 2));
    return push_tensor(L, x.index(indices_of(L, x, 2)));
}

int call_tensor(lua_State* L) {
    Tensor& x = self_tensor(L);
    if (lua_gettop(L) != 2 || !lua_istable(L, 2)) {
        int n = lua_gettop(L) - 1;
        lua_createtable(L, n, 0);
        for (int i = 1; i <= n; ++i) {
            lua_pushvalue(L, i + 1);
            lua_rawseti(L, -2, i);
        }
        lua_replace(L, 2);
        lua_settop(L, 2);
    }
    return push_tensor(L, x.index(indices_of(L, x, 2)));
}

int set_tensor(lua_State* L) {
    Tensor& x = self_tensor(L);
    if (lua_type(L, 2) == LUA_TSTRING && !is_key(L, 2)) {
        std::string name = lua_tostring(L, 2);
        if (set_autograd_field(L, x, name, 3)) return 0;
        MOE_THROW(usage, "tensor." + name + " = …", "a name", "an index: t[i] = value, t[\"1:3\"] = value; or requires_grad or grad", "");
    }
    if (!is_key(L, 2)) MOE_THROW(usage, "tensor[…] = …", got_text(L, 2), kWant, "");
    Tensor value = value_for(L, x, 3);
    if (lua_type(L, 2) == LUA_TNUMBER) {
        row(L, x, 2).copy_(value);
    } else {
        x.index_put_(indices_of(L, x, 2), value);
    }
    return 0;
}
}  // namespace moe::lua
