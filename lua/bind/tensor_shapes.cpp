// Tensors: other shapes and orders of the same numbers.
#include "core/tensor/check.h"
#include "lua/bind/tensor.h"

#include <ATen/ATen.h>

namespace moe::lua {
namespace {
using at::Tensor;

Tensor& t(lua_State* L) { return self_tensor(L); }

/// Dims as a table or as numbers from index 2 on.
std::vector<int64_t> dims_from(lua_State* L) {
    if (lua_istable(L, 2)) return dims_argument(L, 2, t(L));
    std::vector<int64_t> dims;
    for (int i = 2; i <= lua_gettop(L); ++i) dims.push_back(dim_argument(L, i, t(L)));
    return dims;
}

int flip(lua_State* L) { return push_tensor(L, t(L).flip(dims_from(L))); }
int roll(lua_State* L) {
    std::vector<int64_t> shifts = lua_istable(L, 2) ? check_integers(L, 2, "shifts") : std::vector<int64_t>{check_integer(L, 2, "shifts")}, dims;
    if (!is_nothing(L, 3)) dims = dims_argument(L, 3, t(L));
    return push_tensor(L, t(L).roll(shifts, dims));
}
int permute(lua_State* L) {
    std::vector<int64_t> dims = dims_from(L);
    MOE_CHECK(int64_t(dims.size()) == t(L).dim(), shape, running(L), fmt::format("{} dims for {}", dims.size(), shape_text(t(L).sizes())), "every dim once", "");
    return push_tensor(L, t(L).permute(dims));
}
int squeeze(lua_State* L) { return push_tensor(L, is_nothing(L, 2) ? t(L).squeeze() : t(L).squeeze(dims_argument(L, 2, t(L)))); }
int unsqueeze(lua_State* L) {
    int64_t dim = check_integer(L, 2, "dim"), n = t(L).dim() + 1;
    MOE_CHECK(dim >= -n && dim < n, shape, running(L) + ": dim", fmt::format("{} for {}", dim, shape_text(t(L).sizes())), fmt::format("{} … {}", -n, n - 1), "");
    return push_tensor(L, t(L).unsqueeze(dim));
}
int expand(lua_State* L) { return push_tensor(L, t(L).expand(sizes_argument(L, 2))); }
int expand_as(lua_State* L) { return push_tensor(L, t(L).expand_as(check_tensor(L, 2, "other"))); }
int tile(lua_State* L) {
    std::vector<int64_t> times = sizes_argument(L, 2);
    for (int64_t n : times) MOE_CHECK(n >= 0, usage, running(L), shape_text(times), "0 or more times a dim", "");
    return push_tensor(L, t(L).tile(times));
}
int repeat_interleave(lua_State* L) {
    int64_t times = check_integer(L, 2, "times");
    MOE_CHECK(times >= 0, usage, running(L) + ": times", std::to_string(times), "0 or more", "");
    std::optional<int64_t> dim;
    if (!is_nothing(L, 3)) dim = dim_argument(L, 3, t(L));
    return push_tensor(L, t(L).repeat_interleave(times, dim));
}
int flatten(lua_State* L) {
    int64_t first = is_nothing(L, 2) ? 0 : dim_argument(L, 2, t(L)), last = is_nothing(L, 3) ? -1 : dim_argument(L, 3, t(L));
    return push_tensor(L, t(L).flatten(first, last));
}
int split(lua_State* L) {
    int64_t dim = is_nothing(L, 3) ? 0 : dim_argument(L, 3, t(L));
    if (lua_istable(L, 2)) {
        std::vector<int64_t> sizes = check_integers(L, 2, "sizes");
        return push_tensors(L, t(L).split_with_sizes(sizes, dim));
    }
    int64_t size = check_integer(L, 2, "size");
    MOE_CHECK(size > 0, usage, running(L) + ": size", std::to_string(size), "1 or more, or a table of sizes", "");
    return push_tensors(L, t(L).split(size, dim));
}
int chunk(lua_State* L) {
    int64_t n = check_integer(L, 2, "n"), dim = is_nothing(L, 3) ? 0 : dim_argument(L, 3, t(L));
    MOE_CHECK(n > 0, usage, running(L) + ": n", std::to_string(n), "1 or more", "");
    return push_tensors(L, t(L).chunk(n, dim));
}
int unbind(lua_State* L) { return push_tensors(L, t(L).unbind(is_nothing(L, 2) ? 0 : dim_argument(L, 2, t(L)))); }
int triu(lua_State* L) { return push_tensor(L, t(L).triu(is_nothing(L, 2) ? 0 : check_integer(L, 2, "diagonal"))); }
int tril(lua_State* L) { return push_tensor(L, t(L).tril(is_nothing(L, 2) ? 0 : check_integer(L, 2, "diagonal"))); }
int diag(lua_State* L) { return push_tensor(L, at::diag(t(L), is_nothing(L, 2) ? 0 : check_integer(L, 2, "diagonal"))); }

const Binding kFunctions[] = {
    {"flip", flip, "t:flip(dim, …): the elements of each dim in reverse order."},
    {"roll", roll, "t:roll(shifts, dims): elements moved on by shifts, those pushed out coming in at the other end; without dims over all in order.\nExample: print(moe.arange(5):roll(2))"},
    {"permute", permute, "t:permute {2, 0, 1}: dims in another order, a view."},
    {"squeeze", squeeze, "t:squeeze(dim): without a dim of size 1 (or a table of them); without dim, without all of them. A view."},
    {"unsqueeze", unsqueeze, "t:unsqueeze(dim): with a dim of size 1 put in before dim. A view."},
    {"expand", expand, "t:expand {4, -1}: dims of size 1 seen as larger, a view that holds one copy; -1: as it is.\nExample: print(moe.arange(3):expand {2, 3})"},
    {"expand_as", expand_as, "t:expand_as(other): expand to another's shape."},
    {"tile", tile, "t:tile {2, 3}: copies side by side, so many times a dim (PyTorch's repeat, a word of Lua's own)."},
    {"repeat_interleave", repeat_interleave, "t:repeat_interleave(times, dim): each element so many times in a row; without dim of all elements in order."},
    {"flatten", flatten, "t:flatten(first, last): dims first … last (all unless given) as one."},
    {"split", split, "t:split(size, dim): a list of parts of a size, or of a table of sizes, along a dim (0 unless given). Views.\nExample: print(#moe.arange(5):split(2))"},
    {"chunk", chunk, "t:chunk(n, dim): a list of n parts of about one size along a dim (0 unless given). Views."},
    {"unbind", unbind, "t:unbind(dim): a list of the slices of a dim (0 unless given). Views."},
    {"triu", triu, "t:triu(diagonal): a copy with 0 below a diagonal (0: the main one, 1: the next above)."},
    {"tril", tril, "t:tril(diagonal): a copy with 0 above a diagonal (0: the main one, -1: the next below)."},
    {"diag", diag, "t:diag(diagonal): the diagonal of a matrix, or the matrix that has a vector as its diagonal."},
};
}  // namespace

std::span<const Binding> tensor_shapes() { return kFunctions; }
}  // namespace moe::lua
