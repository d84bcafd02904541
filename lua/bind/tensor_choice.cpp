// Tensors: order, selection by ids and masks, counting.
#include "core/tensor/check.h"
#include "lua/bind/tensor.h"

#include <ATen/ATen.h>

namespace moe::lua {
namespace {
using at::Tensor;

Tensor& t(lua_State* L) { return self_tensor(L); }
int64_t last_dim_unless(lua_State* L, int index) { return is_nothing(L, index) ? -1 : dim_argument(L, index, t(L)); }
Tensor& ids_argument(lua_State* L, int index, int64_t dim, const char* name = "ids") {
    Tensor &ids = check_tensor(L, index, name), &x = t(L);
    check_dtype(running(L), {name, ids}, {at::kLong, at::kInt});
    if (x.dim() > 0) check_ids(name, ids, x.size(dim));
    return ids;
}

int topk(lua_State* L) {
    Tensor& x = t(L);
    int64_t k = check_integer(L, 2, "k"), dim = last_dim_unless(L, 3);
    Options o(L, 4, {"largest", "sorted"});
    MOE_CHECK(x.dim() > 0 && k >= 0 && k <= x.size(dim), shape, running(L), fmt::format("k = {} of {}", k, shape_text(x.sizes())), "k within the dim's size", "");
    auto [values, ids] = x.topk(k, dim, o.boolean("largest", true), o.boolean("sorted", true));
    push_tensor(L, values);
    return push_tensor(L, ids) + 1;
}
int sort(lua_State* L) {
    Options o(L, 3, {"descending"});
    auto [values, ids] = at::sort(t(L), std::optional<bool>(true), last_dim_unless(L, 2), o.boolean("descending", false));
    push_tensor(L, values);
    return push_tensor(L, ids) + 1;
}
int argsort(lua_State* L) {
    Options o(L, 3, {"descending"});
    return push_tensor(L, at::argsort(t(L), true, last_dim_unless(L, 2), o.boolean("descending", false)));
}

int gather(lua_State* L) {
    int64_t dim = dim_argument(L, 2, t(L));
    return push_tensor(L, t(L).gather(dim, ids_argument(L, 3, dim).to(at::kLong)));
}
/// The source of a scatter in t's dtype; a number stands for itself everywhere.
Tensor source(lua_State* L, int index, const Tensor& ids) {
    Tensor x = operand(L, index).to(t(L).options());
    return x.dim() == 0 ? x.expand(ids.sizes()) : x;
}
int scatter(lua_State* L) {
    int64_t dim = dim_argument(L, 2, t(L));
    Tensor ids = ids_argument(L, 3, dim).to(at::kLong);
    return push_tensor(L, t(L).scatter(dim, ids, source(L, 4, ids)));
}
int scatter_add(lua_State* L) {
    int64_t dim = dim_argument(L, 2, t(L));
    Tensor ids = ids_argument(L, 3, dim).to(at::kLong);
    return push_tensor(L, t(L).scatter_add(dim, ids, source(L, 4, ids)));
}
int scatter_add_(lua_State* L) {
    int64_t dim = dim_argument(L, 2, t(L));
    Tensor ids = ids_argument(L, 3, dim).to(at::kLong);
    t(L).scatter_add_(dim, ids, source(L, 4, ids));
    return lua_settop(L, 1), 1;
}
int index_select(lua_State* L) {
    int64_t dim = dim_argument(L, 2, t(L));
    return push_tensor(L, t(L).index_select(dim, ids_argument(L, 3, dim)));
}
int index_add(lua_State* L) {
    int64_t dim = dim_argument(L, 2, t(L));
    return push_tensor(L, t(L).index_add(dim, ids_argument(L, 3, dim), check_tensor(L, 4, "source").to(t(L).options())));
}

Tensor mask_argument(lua_State* L, int index) {
    Tensor& mask = check_tensor(L, index, "mask");
    check_dtype(running(L), {"mask", mask}, {at::kBool});
    if (!do_expand(mask, t(L))) throw_unexpandable(L, t(L), mask);
    return mask;
}
int masked_fill(lua_State* L) {
    Tensor mask = mask_argument(L, 2);
    return push_tensor(L, t(L).masked_fill(mask, operand(L, 3).to(t(L).options())));
}
int masked_fill_(lua_State* L) {
    Tensor mask = mask_argument(L, 2);
    t(L).masked_fill_(mask, operand(L, 3).to(t(L).options()));
    return lua_settop(L, 1), 1;
}
int masked_select(lua_State* L) { return push_tensor(L, t(L).masked_select(mask_argument(L, 2))); }
int nonzero(lua_State* L) { return push_tensor(L, t(L).nonzero()); }

// --- counting ---

int unique(lua_State* L) {
    auto [values, inverse, counts] = at::_unique2(t(L), true, true, true);
    push_tensor(L, values);
    push_tensor(L, counts);
    return push_tensor(L, inverse) + 2;
}
int bincount(lua_State* L) {
    Tensor& x = t(L);
    check_dims(running(L), {"ids", x}, 1);
    MOE_CHECK(at::isIntegralType(x.scalar_type(), false), dtype, running(L), describe(x), "integers", "");
    Options o(L, 3, {"weights"});
    int64_t least = is_nothing(L, 2) ? 0 : check_integer(L, 2, "minlength");
    MOE_CHECK(least >= 0, usage, running(L) + ": minlength", std::to_string(least), "0 or more", "");
    MOE_CHECK(x.numel() == 0 || x.min().item<int64_t>() >= 0, shape, running(L), "an id below 0", "ids of 0 or more", "");
    std::optional<Tensor> weights;
    o.push("weights");
    if (!lua_isnil(L, -1)) weights = check_tensor(L, -1, "weights");
    return push_tensor(L, at::bincount(x, weights, least));
}
int histc(lua_State* L) {
    int64_t bins = check_integer(L, 2, "bins");
    MOE_CHECK(bins > 0, usage, running(L) + ": bins", std::to_string(bins), "1 or more", "");
    double low = is_nothing(L, 3) ? 0 : check_number(L, 3, "low"), high = is_nothing(L, 4) ? 0 : check_number(L, 4, "high");
    return push_tensor(L, at::histc(as_float(t(L)), bins, low, high));
}
int one_hot(lua_State* L) {
    Tensor& x = t(L);
    check_dtype(running(L), {"ids", x}, {at::kLong, at::kInt});
    int64_t classes = is_nothing(L, 2) ? (x.numel() ? x.max().item<int64_t>() + 1 : 0) : check_integer(L, 2, "classes");
    MOE_CHECK(classes >= 0, usage, running(L) + ": classes", std::to_string(classes), "0 or more", "");
    if (x.numel()) {
        int64_t low = x.min().item<int64_t>(), high = x.max().item<int64_t>();
        MOE_CHECK(low >= 0 && high < classes, shape, running(L), fmt::format("ids {} … {}", low, high), fmt::format("0 … {}", classes - 1), "");
    }
    std::vector<int64_t> shape = x.sizes().vec();
    shape.push_back(classes);
    return push_tensor(L, at::zeros(shape, x.options().dtype(at::kLong)).scatter_(-1, x.to(at::kLong).unsqueeze(-1), 1));
}

const Binding kFunctions[] = {
    {"topk", topk, "t:topk(k, dim, {largest = true, sorted = true}): the k largest along a dim (the last unless given) and their ids.\nExample: print(moe.tensor({3, 1, 2}):topk(2))"},
    {"sort", sort, "t:sort(dim, {descending = false}): sorted along a dim (the last unless given), equal ones in their order, and their ids.\nExample: print(moe.tensor({3, 1, 2}):sort())"},
    {"argsort", argsort, "t:argsort(dim, {descending = false}): the ids that sort gives."},
    {"gather", gather, "t:gather(dim, ids): elements at ids along a dim; ids int64 of t's dims → ids' shape.\nExample: print(moe.tensor({{1, 2}, {3, 4}}):gather(1, moe.tensor {{1}, {0}}))"},
    {"scatter", scatter, "t:scatter(dim, ids, source): a copy of t with source (a tensor of ids' shape, or a number) at ids along a dim."},
    {"scatter_add", scatter_add, "t:scatter_add(dim, ids, source): a copy of t with source added at ids along a dim.\nExample: print(moe.zeros({3}):scatter_add(0, moe.tensor {0, 2, 2}, 1))"},
    {"scatter_add_", scatter_add_, "t:scatter_add_(dim, ids, source): scatter_add in place. Returns t."},
    {"index_select", index_select, "t:index_select(dim, ids): slices of a dim by a vector of ids."},
    {"index_add", index_add, "t:index_add(dim, ids, source): a copy of t with the slices of source added to slices ids of a dim."},
    {"masked_fill", masked_fill, "t:masked_fill(mask, value): a copy with value (a number or 0-d tensor) where the bool mask is true."},
    {"masked_fill_", masked_fill_, "t:masked_fill_(mask, value): masked_fill in place. Returns t."},
    {"masked_select", masked_select, "t:masked_select(mask): the elements where the bool mask is true, a vector."},
    {"nonzero", nonzero, "t:nonzero(): indices of the elements that are not 0, int64 [N, dims]."},
    {"unique", unique, "t:unique(): the different values, sorted; how often each occurs; and for each element of t its value's place.\nExample: print(moe.tensor({3, 1, 3}):unique())"},
    {"bincount", bincount, "t:bincount(minlength, {weights =}): how often each id 0, 1, … occurs in a vector of integers, or the sum of its weights.\nExample: print(moe.tensor({0, 2, 2}):bincount(4))"},
    {"histc", histc, "t:histc(bins, low, high): counts in bins of equal width between low and high (t's own range unless given)."},
    {"one_hot", one_hot, "t:one_hot(classes): int64 of t's shape and a last dim of classes: 1 at the id, else 0.\nExample: print(moe.tensor({2, 0}):one_hot(3))"},
};
}  // namespace

std::span<const Binding> tensor_choice() { return kFunctions; }
}  // namespace moe::lua
