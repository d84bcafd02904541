// Methods and operators of tensors. Each is a line in a list: name, function, help.
#include "core/tensor/check.h"
#include "core/tensor/print.h"
#include "lua/bind/tensor.h"

#include <ATen/ATen.h>
#include <ATen/ScalarOps.h>

namespace moe::lua {
namespace {
using at::Tensor;

Tensor& t(lua_State* L) { return self<Tensor>(L); }

/// A dim in PyTorch's range, negative ones from the end.
int64_t dim_argument(lua_State* L, int index, const Tensor& x) {
    int64_t dim = check_integer(L, index, "dim"), n = std::max<int64_t>(x.dim(), 1);
    MOE_CHECK(dim >= -n && dim < n, shape, running(L) + ": dim", fmt::format("{} of {}", dim, shape_text(x.sizes())), fmt::format("{} … {}", -n, n - 1), "dims are 0-based");
    return dim;
}

/// A tensor, or a number as a tensor that does not widen the other's type.
Tensor operand(lua_State* L, int index) {
    if (lua_type(L, index) == LUA_TNUMBER) {
        return lua_isinteger(L, index) ? at::native::wrapped_scalar_tensor(int64_t(lua_tointeger(L, index))) : at::native::wrapped_scalar_tensor(lua_tonumber(L, index));
    }
    if (!test_box<Tensor>(L, index)) bad_argument(L, index, index == 1 ? "left" : "right", "a tensor or a number");
    return check_tensor(L, index, "operand");
}

template <Tensor (*F)(const Tensor&, const Tensor&)>
int binary(lua_State* L) {
    Tensor a = operand(L, 1), b = operand(L, 2);
    try {
        return push_tensor(L, F(a, b));
    } catch (const c10::Error&) {
        bool shapes = !at::is_expandable_to(a.sizes(), b.sizes()) && !at::is_expandable_to(b.sizes(), a.sizes());
        if (!shapes) throw;
        MOE_THROW(shape, running(L), shape_text(a.sizes()) + " and " + shape_text(b.sizes()), "equal sizes, or 1, in each dim from the last on", "");
    }
}

template <Tensor (Tensor::*F)() const>
int unary(lua_State* L) {
    return push_tensor(L, (t(L).*F)());
}

Tensor power(const Tensor& a, const Tensor& b) { return at::pow(a, b); }
Tensor divide(const Tensor& a, const Tensor& b) { return at::div(a, b); }
Tensor add(const Tensor& a, const Tensor& b) { return at::add(a, b); }
Tensor subtract(const Tensor& a, const Tensor& b) { return at::sub(a, b); }
Tensor multiply(const Tensor& a, const Tensor& b) { return at::mul(a, b); }
Tensor floor_divide(const Tensor& a, const Tensor& b) { return at::floor_divide(a, b); }
Tensor remainder(const Tensor& a, const Tensor& b) { return at::remainder(a, b); }
Tensor equal_to(const Tensor& a, const Tensor& b) { return at::eq(a, b); }
Tensor not_equal_to(const Tensor& a, const Tensor& b) { return at::ne(a, b); }
Tensor less(const Tensor& a, const Tensor& b) { return at::lt(a, b); }
Tensor less_equal(const Tensor& a, const Tensor& b) { return at::le(a, b); }
Tensor greater(const Tensor& a, const Tensor& b) { return at::gt(a, b); }
Tensor greater_equal(const Tensor& a, const Tensor& b) { return at::ge(a, b); }
Tensor maximum(const Tensor& a, const Tensor& b) { return at::maximum(a, b.to(a.scalar_type())); }
Tensor minimum(const Tensor& a, const Tensor& b) { return at::minimum(a, b.to(a.scalar_type())); }

int ordered(lua_State* L) {
    MOE_THROW(usage, "tensor < tensor", "two tensors", "a:lt(b) or a:gt(b)", "< and > always give one boolean in Lua; a:lt(b) compares elements");
}

int same(lua_State* L) {
    auto *a = test_box<Tensor>(L, 1), *b = test_box<Tensor>(L, 2);
    lua_pushboolean(L, a && b && *a && *b && (*a)->is_same(**b));
    return 1;
}

int concat(lua_State* L) {
    push_string(L, to_string(L, 1) + to_string(L, 2));
    return 1;
}

int length(lua_State* L) {
    MOE_CHECK(t(L).dim() > 0, shape, "#tensor", "a tensor without dims", "one with dims", "t:item() is its number");
    lua_pushinteger(L, t(L).size(0));
    return 1;
}

int text(lua_State* L) {
    auto* box = test_box<Tensor>(L, 1);
    push_string(L, box && *box ? to_text(**box) : "tensor (freed)");
    return 1;
}

int set_element(lua_State* L) {
    if (lua_type(L, 2) != LUA_TNUMBER) MOE_THROW(usage, "tensor." + to_string(L, 2) + " = …", "a name", "an index: t[i] = value", "");
    Tensor& x = t(L);
    int64_t i = check_integer(L, 2, "index");
    MOE_CHECK(x.dim() > 0 && i >= -x.size(0) && i < x.size(0), shape, "tensor[i]", fmt::format("i = {} of {}", i, shape_text(x.sizes())), "an index within the first dim", "elements are 0-based");
    x.select(0, i).copy_(operand(L, 3));
    return 0;
}

const Binding kOperators[] = {
    {"__add", binary<add>, "a + b: elementwise, with PyTorch's broadcasting."},
    {"__sub", binary<subtract>, "a - b: elementwise."},
    {"__mul", binary<multiply>, "a * b: elementwise; a:matmul(b) is the matrix product."},
    {"__div", binary<divide>, "a / b: elementwise."},
    {"__idiv", binary<floor_divide>, "a // b: elementwise quotient, rounded down."},
    {"__mod", binary<remainder>, "a % b: elementwise remainder, with the sign of b."},
    {"__pow", binary<power>, "a ^ b: elementwise power."},
    {"__unm", unary<&Tensor::neg>, "-a: elementwise."},
    {"__lt", ordered, "a < b: an error with a hint; a:lt(b) compares elements."},
    {"__le", ordered, "a <= b: an error with a hint; a:le(b) compares elements."},
    {"__eq", same, "a == b: true for the same tensor; a:eq(b) compares elements, a:allclose(b) values."},
    {"__concat", concat, "text .. a: appends the printed tensor."},
    {"__len", length, "#a: size of dim 0."},
    {"__tostring", text, "tostring(a): header with dtype, shape and device, then at most 6 x 6 values."},
    {"__newindex", set_element, "a[i] = value: sets row i, broadcasting."},
};

int size(lua_State* L) {
    if (lua_isnoneornil(L, 2)) {
        push_integers(L, t(L).sizes());
    } else {
        lua_pushinteger(L, t(L).size(dim_argument(L, 2, t(L))));
    }
    return 1;
}
int dims(lua_State* L) { return lua_pushinteger(L, t(L).dim()), 1; }
int numel(lua_State* L) { return lua_pushinteger(L, t(L).numel()), 1; }

int matmul(lua_State* L) {
    Tensor &a = t(L), &b = check_tensor(L, 2, "b");
    if (a.dim() > 0 && b.dim() > 0) check_inner("matmul", {"a", a}, a.dim() - 1, {"b", b}, b.dim() == 1 ? 0 : b.dim() - 2);
    check_same_dtype("matmul", {"a", a}, {"b", b});
    return push_tensor(L, a.matmul(b));
}

template <class All, class Along>
int reduce(lua_State* L, All all, Along along) {
    Tensor& x = t(L);
    if (lua_isnoneornil(L, 2)) return push_tensor(L, all(x));
    Options o(L, 3, {"keepdim"});
    return push_tensor(L, along(x, dim_argument(L, 2, x), o.boolean("keepdim", false)));
}
Tensor as_float(const Tensor& x) { return at::isIntegralType(x.scalar_type(), true) ? x.to(at::kFloat) : x; }
void not_empty(lua_State* L) { MOE_CHECK(t(L).numel() > 0, shape, running(L), shape_text(t(L).sizes()), "at least one element", ""); }

int sum(lua_State* L) {
    return reduce(L, [](const Tensor& x) { return x.sum(); }, [](const Tensor& x, int64_t d, bool k) { return x.sum(d, k); });
}
int mean(lua_State* L) {
    return reduce(L, [](const Tensor& x) { return as_float(x).mean(); }, [](const Tensor& x, int64_t d, bool k) { return as_float(x).mean(d, k); });
}
int maximum_of(lua_State* L) {
    if (test_box<Tensor>(L, 2)) return binary<maximum>(L);
    not_empty(L);
    return reduce(L, [](const Tensor& x) { return x.max(); }, [](const Tensor& x, int64_t d, bool k) { return x.amax(d, k); });
}
int minimum_of(lua_State* L) {
    if (test_box<Tensor>(L, 2)) return binary<minimum>(L);
    not_empty(L);
    return reduce(L, [](const Tensor& x) { return x.min(); }, [](const Tensor& x, int64_t d, bool k) { return x.amin(d, k); });
}
int argmax(lua_State* L) {
    not_empty(L);
    return reduce(L, [](const Tensor& x) { return x.argmax(); }, [](const Tensor& x, int64_t d, bool k) { return x.argmax(d, k); });
}
int norm(lua_State* L) {
    return reduce(L, [](const Tensor& x) { return as_float(x).norm(); }, [](const Tensor& x, int64_t d, bool k) { return as_float(x).norm(at::Scalar(2), d, k); });
}
int softmax(lua_State* L) {
    Tensor x = as_float(t(L));
    return push_tensor(L, x.softmax(dim_argument(L, 2, x)));
}
int topk(lua_State* L) {
    Tensor& x = t(L);
    int64_t k = check_integer(L, 2, "k"), dim = lua_isnoneornil(L, 3) ? -1 : dim_argument(L, 3, x);
    MOE_CHECK(x.dim() > 0 && k >= 0 && k <= x.size(dim), shape, running(L), fmt::format("k = {} of {}", k, shape_text(x.sizes())), "k within the dim's size", "");
    auto [values, ids] = x.topk(k, dim);
    push_tensor(L, values);
    push_tensor(L, ids);
    return 2;
}

/// Sizes from a table or from numbers; one may be −1.
std::vector<int64_t> sizes_argument(lua_State* L) {
    if (lua_istable(L, 2)) return check_integers(L, 2, "shape");
    std::vector<int64_t> shape;
    for (int i = 2; i <= lua_gettop(L); ++i) shape.push_back(check_integer(L, i, "size"));
    return shape;
}
int reshape(lua_State* L) {
    std::vector<int64_t> shape = sizes_argument(L);
    Tensor& x = t(L);
    try {
        return push_tensor(L, x.reshape(shape));
    } catch (const c10::Error&) {
        MOE_THROW(shape, running(L), shape_text(shape) + " for " + shape_text(x.sizes()), fmt::format("sizes whose product is {}, one of them may be -1", x.numel()), "");
    }
}
int view(lua_State* L) {
    Tensor& x = t(L);
    MOE_CHECK(x.is_contiguous(), shape, running(L), "a tensor that is not contiguous", "a contiguous one", "reshape copies where it must");
    return reshape(L);
}
int transpose(lua_State* L) {
    Tensor& x = t(L);
    return push_tensor(L, x.transpose(dim_argument(L, 2, x), dim_argument(L, 3, x)));
}
int select(lua_State* L) {
    Tensor& x = t(L);
    int64_t dim = dim_argument(L, 2, x), i = check_integer(L, 3, "index");
    MOE_CHECK(x.dim() > 0 && i >= -x.size(dim) && i < x.size(dim), shape, running(L), fmt::format("index {} of dim {} of {}", i, dim, shape_text(x.sizes())), "an index within the dim", "elements are 0-based");
    return push_tensor(L, x.select(dim, i));
}
int narrow(lua_State* L) {
    Tensor& x = t(L);
    int64_t dim = dim_argument(L, 2, x), start = check_integer(L, 3, "start"), count = check_integer(L, 4, "count");
    MOE_CHECK(x.dim() > 0 && start >= 0 && count >= 0 && start + count <= x.size(dim), shape, running(L),
              fmt::format("start {}, count {} of dim {} of {}", start, count, dim, shape_text(x.sizes())), "a part of the dim", "");
    return push_tensor(L, x.narrow(dim, start, count));
}
int convert(lua_State* L) {
    std::string name = check_string(L, 2, "dtype or device");
    if (name.starts_with("cpu") || name.starts_with("cuda")) return push_tensor(L, t(L).to(device_named(name)));
    return push_tensor(L, t(L).to(dtype_named(name)));
}

void push_number(lua_State* L, const at::Scalar& s) {
    if (s.isBoolean()) {
        lua_pushboolean(L, s.toBool());
    } else if (s.isIntegral(false)) {
        lua_pushinteger(L, s.toLong());
    } else {
        lua_pushnumber(L, s.toDouble());
    }
}
int item(lua_State* L) {
    MOE_CHECK(t(L).numel() == 1, shape, running(L), shape_text(t(L).sizes()), "one element", "to_table() gives all of them");
    push_number(L, t(L).item());
    return 1;
}
void push_nested(lua_State* L, const Tensor& x) {
    luaL_checkstack(L, 4, "tensor of many dims");
    if (x.dim() == 0) return push_number(L, x.item());
    lua_createtable(L, int(x.size(0)), 0);
    for (int64_t i = 0; i < x.size(0); ++i) {
        push_nested(L, x[i]);
        lua_rawseti(L, -2, i + 1);
    }
}
int to_table(lua_State* L) {
    push_nested(L, t(L).cpu());
    return 1;
}
int allclose(lua_State* L) {
    Tensor &a = t(L), &b = check_tensor(L, 2, "b");
    Options o(L, 3, {"rtol", "atol"});
    MOE_CHECK(a.sizes() == b.sizes(), shape, running(L), shape_text(a.sizes()) + " and " + shape_text(b.sizes()), "equal shapes", "");
    lua_pushboolean(L, at::allclose(a, b.to(a.options()), o.number("rtol", 1e-5), o.number("atol", 1e-8)));
    return 1;
}
int copy_from(lua_State* L) {
    Tensor &a = t(L), &b = check_tensor(L, 2, "from");
    MOE_CHECK(a.sizes() == b.sizes(), shape, running(L), shape_text(b.sizes()), shape_text(a.sizes()), "");
    a.copy_(b);
    lua_settop(L, 1);
    return 1;
}
int clone(lua_State* L) { return push_tensor(L, t(L).clone()); }
int contiguous(lua_State* L) { return push_tensor(L, t(L).contiguous()); }
int is_finite(lua_State* L) { return lua_pushboolean(L, at::isfinite(t(L)).all().item<bool>()), 1; }

const Binding kMethods[] = {
    {"size", size, "t:size(dim): size of a dim; without one, all as a table."},
    {"dim", dims, "t:dim(): number of dims."},
    {"numel", numel, "t:numel(): number of elements."},
    {"matmul", matmul, "a:matmul(b): matrix product, batched over leading dims."},
    {"sum", sum, "t:sum(dim, {keepdim =}): sum over a dim, or of all elements."},
    {"mean", mean, "t:mean(dim, {keepdim =}): mean over a dim, or of all elements."},
    {"max", maximum_of, "t:max(dim, {keepdim =}): largest along a dim, or of all; t:max(other): elementwise."},
    {"min", minimum_of, "t:min(dim, {keepdim =}): smallest along a dim, or of all; t:min(other): elementwise."},
    {"argmax", argmax, "t:argmax(dim, {keepdim =}): index of the largest, 0-based."},
    {"topk", topk, "t:topk(k, dim): the k largest along a dim (the last unless given) and their indices."},
    {"softmax", softmax, "t:softmax(dim): exp(t) / sum of exp(t) along a dim."},
    {"exp", unary<&Tensor::exp>, "t:exp(): elementwise."},
    {"log", unary<&Tensor::log>, "t:log(): elementwise natural logarithm."},
    {"sqrt", unary<&Tensor::sqrt>, "t:sqrt(): elementwise."},
    {"abs", unary<&Tensor::abs>, "t:abs(): elementwise."},
    {"sigmoid", unary<&Tensor::sigmoid>, "t:sigmoid(): elementwise 1 / (1 + exp(-t))."},
    {"norm", norm, "t:norm(dim, {keepdim =}): root of the sum of squares, along a dim or of all."},
    {"eq", binary<equal_to>, "a:eq(b): elementwise a == b, a bool tensor."},
    {"ne", binary<not_equal_to>, "a:ne(b): elementwise a ~= b."},
    {"lt", binary<less>, "a:lt(b): elementwise a < b."},
    {"le", binary<less_equal>, "a:le(b): elementwise a <= b."},
    {"gt", binary<greater>, "a:gt(b): elementwise a > b."},
    {"ge", binary<greater_equal>, "a:ge(b): elementwise a >= b."},
    {"view", view, "t:view {4, -1}: the same numbers in another shape; t must be contiguous."},
    {"reshape", reshape, "t:reshape {4, -1}: the same numbers in another shape, copied where needed."},
    {"transpose", transpose, "t:transpose(a, b): swaps two dims, a view."},
    {"select", select, "t:select(dim, i): slice i of a dim, a view without that dim."},
    {"narrow", narrow, "t:narrow(dim, start, count): a part of a dim, a view."},
    {"to", convert, "t:to(\"bf16\"), t:to(\"cuda\"): converted to a dtype or moved to a device."},
    {"item", item, "t:item(): the number of a tensor with one element."},
    {"to_table", to_table, "t:to_table(): nested Lua tables of numbers, 1-based."},
    {"allclose", allclose, "a:allclose(b, {rtol = 1e-5, atol = 1e-8}): true where all |a - b| <= atol + rtol * |b|."},
    {"is_finite", is_finite, "t:is_finite(): true where no element is nan or infinite."},
    {"copy_", copy_from, "t:copy_(from): overwrites t's numbers. Returns t."},
    {"clone", clone, "t:clone(): a copy."},
    {"contiguous", contiguous, "t:contiguous(): t, or a copy with its elements in order."},
};
}  // namespace

std::span<const Binding> tensor_methods() { return kMethods; }
std::span<const Binding> tensor_operators() { return kOperators; }
}  // namespace moe::lua
