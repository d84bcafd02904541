// Tensors: elementwise functions, logic, reductions, products of several tensors, and changes in place.
#include "core/tensor/check.h"
#include "lua/bind/tensor.h"

#include <ATen/ATen.h>

namespace moe::lua {
namespace {
using at::Tensor;

Tensor& t(lua_State* L) { return self_tensor(L); }

template <Tensor (*F)(const Tensor&)>
int function(lua_State* L) {
    return push_tensor(L, F(t(L)));
}
Tensor silu(const Tensor& x) { return at::silu(x); }
Tensor softplus(const Tensor& x) { return at::softplus(x); }
Tensor finite(const Tensor& x) { return at::isfinite(x); }
Tensor rounded(const Tensor& x) { return at::round(x); }
Tensor reciprocal(const Tensor& x) { return as_float(x).reciprocal(); }

Tensor maximum(const Tensor& a, const Tensor& b) { return at::maximum(a, b); }
Tensor minimum(const Tensor& a, const Tensor& b) { return at::minimum(a, b); }
Tensor power(const Tensor& a, const Tensor& b) { return at::pow(a, b); }
Tensor logical_and(const Tensor& a, const Tensor& b) { return at::logical_and(a, b); }
Tensor logical_or(const Tensor& a, const Tensor& b) { return at::logical_or(a, b); }
Tensor logical_xor(const Tensor& a, const Tensor& b) { return at::logical_xor(a, b); }
Tensor atan2(const Tensor& a, const Tensor& b) { return at::atan2(a, b); }

int gelu(lua_State* L) {
    std::string form = lua_isnoneornil(L, 2) ? "none" : check_string(L, 2, "form");
    MOE_CHECK(form == "none" || form == "tanh", usage, running(L) + ": form", '"' + form + '"', "none or tanh", "");
    return push_tensor(L, at::gelu(t(L), form));
}

/// The bounds of a clamp as tensors, undefined for nil.
std::pair<std::optional<Tensor>, std::optional<Tensor>> bounds(lua_State* L) {
    MOE_CHECK(!is_nothing(L, 2) || !is_nothing(L, 3), usage, running(L), "no bound", "a lowest value, a largest, or both", "");
    std::optional<Tensor> low, high;
    if (!is_nothing(L, 2)) low = operand(L, 2);
    if (!is_nothing(L, 3)) high = operand(L, 3);
    return {low, high};
}
int clamp(lua_State* L) {
    auto [low, high] = bounds(L);
    return push_tensor(L, at::clamp(t(L), low, high));
}

// --- reductions ---

void not_empty(lua_State* L) { MOE_CHECK(t(L).numel() > 0, shape, running(L), shape_text(t(L).sizes()), "at least one element", ""); }

/// all(x) without a dim, along(x, dims, keepdim) with one or a table of them.
template <class All, class Along>
int reduce(lua_State* L, All all, Along along) {
    Tensor& x = t(L);
    if (is_nothing(L, 2)) return push_tensor(L, all(x));
    Options o(L, 3, {"keepdim"});
    return push_tensor(L, along(x, dims_argument(L, 2, x), o.boolean("keepdim", false)));
}
/// The same for ops that take one dim.
template <class All, class Along>
int reduce_one(lua_State* L, All all, Along along) {
    Tensor& x = t(L);
    if (is_nothing(L, 2)) return push_tensor(L, all(x));
    Options o(L, 3, {"keepdim"});
    return push_tensor(L, along(x, dim_argument(L, 2, x), o.boolean("keepdim", false)));
}
using Dims = at::IntArrayRef;

int sum(lua_State* L) {
    return reduce(L, [](const Tensor& x) { return x.sum(); }, [](const Tensor& x, Dims d, bool k) { return x.sum(d, k); });
}
int mean(lua_State* L) {
    return reduce(L, [](const Tensor& x) { return as_float(x).mean(); }, [](const Tensor& x, Dims d, bool k) { return as_float(x).mean(d, k); });
}
int prod(lua_State* L) {
    return reduce_one(L, [](const Tensor& x) { return x.prod(); }, [](const Tensor& x, int64_t d, bool k) { return x.prod(d, k); });
}
int logsumexp(lua_State* L) {
    return reduce(L, [](const Tensor& x) { return as_float(x).flatten().logsumexp(0); }, [](const Tensor& x, Dims d, bool k) { return as_float(x).logsumexp(d, k); });
}
int amax(lua_State* L) {
    not_empty(L);
    return reduce(L, [](const Tensor& x) { return x.amax(); }, [](const Tensor& x, Dims d, bool k) { return x.amax(d, k); });
}
int amin(lua_State* L) {
    not_empty(L);
    return reduce(L, [](const Tensor& x) { return x.amin(); }, [](const Tensor& x, Dims d, bool k) { return x.amin(d, k); });
}
template <bool Root>
int spread(lua_State* L) {
    Tensor x = as_float(t(L));
    bool whole = is_nothing(L, 2);
    Options o(L, 3, {"keepdim", "correction"});
    at::OptionalIntArrayRef dims;
    std::vector<int64_t> list;
    if (!whole) dims = list = dims_argument(L, 2, x);
    at::Scalar correction(o.number("correction", 1));
    return push_tensor(L, Root ? at::std(x, dims, correction, o.boolean("keepdim", false)) : at::var(x, dims, correction, o.boolean("keepdim", false)));
}
int norm(lua_State* L) {
    Tensor x = as_float(t(L));
    Options o(L, 3, {"keepdim", "p"});
    at::Scalar p(o.number("p", 2));
    if (is_nothing(L, 2)) return push_tensor(L, at::norm(x.flatten(), p, {0}, false));
    return push_tensor(L, at::norm(x, p, dims_argument(L, 2, x), o.boolean("keepdim", false)));
}

/// Values and ids along a dim; the value of all without one.
template <class All, class Along>
int reduce_with_ids(lua_State* L, All all, Along along) {
    not_empty(L);
    Tensor& x = t(L);
    if (is_nothing(L, 2)) return push_tensor(L, all(x));
    Options o(L, 3, {"keepdim"});
    auto [values, ids] = along(x, dim_argument(L, 2, x), o.boolean("keepdim", false));
    push_tensor(L, values);
    return push_tensor(L, ids) + 1;
}
int largest(lua_State* L) {
    if (test_box<Tensor>(L, 2)) return binary<maximum>(L);
    return reduce_with_ids(L, [](const Tensor& x) { return x.max(); }, [](const Tensor& x, int64_t d, bool k) { return x.max(d, k); });
}
int smallest(lua_State* L) {
    if (test_box<Tensor>(L, 2)) return binary<minimum>(L);
    return reduce_with_ids(L, [](const Tensor& x) { return x.min(); }, [](const Tensor& x, int64_t d, bool k) { return x.min(d, k); });
}
int median(lua_State* L) {
    return reduce_with_ids(L, [](const Tensor& x) { return x.median(); }, [](const Tensor& x, int64_t d, bool k) { return x.median(d, k); });
}
int argmax(lua_State* L) {
    not_empty(L);
    return reduce_one(L, [](const Tensor& x) { return x.argmax(); }, [](const Tensor& x, int64_t d, bool k) { return x.argmax(d, k); });
}
int argmin(lua_State* L) {
    not_empty(L);
    return reduce_one(L, [](const Tensor& x) { return x.argmin(); }, [](const Tensor& x, int64_t d, bool k) { return x.argmin(d, k); });
}
/// A Lua boolean of all elements: a 0-d tensor would count as true in an if, whatever it holds.
template <bool All>
int truth(lua_State* L) {
    Tensor& x = t(L);
    if (is_nothing(L, 2)) return lua_pushboolean(L, (All ? x.all() : x.any()).item<bool>()), 1;
    Options o(L, 3, {"keepdim"});
    std::vector<int64_t> d = dims_argument(L, 2, x);
    bool k = o.boolean("keepdim", false);
    return push_tensor(L, All ? at::all(x, at::OptionalIntArrayRef(d), k) : at::any(x, at::OptionalIntArrayRef(d), k));
}
int cumsum(lua_State* L) { return push_tensor(L, t(L).cumsum(dim_argument(L, 2, t(L)))); }
int cumprod(lua_State* L) { return push_tensor(L, t(L).cumprod(dim_argument(L, 2, t(L)))); }
int softmax(lua_State* L) {
    Tensor x = as_float(t(L));
    return push_tensor(L, x.softmax(dim_argument(L, 2, x)));
}
int log_softmax(lua_State* L) {
    Tensor x = as_float(t(L));
    return push_tensor(L, x.log_softmax(dim_argument(L, 2, x)));
}

// --- products ---

int outer(lua_State* L) {
    Tensor &a = t(L), &b = check_tensor(L, 2, "b");
    MOE_CHECK(a.dim() == 1 && b.dim() == 1, shape, running(L), shape_text(a.sizes()) + " and " + shape_text(b.sizes()), "two vectors", "");
    return push_tensor(L, at::outer(a, b));
}
int einsum(lua_State* L) {
    std::string equation = check_string(L, 1, "equation");
    std::vector<Tensor> list;
    for (int i = 2; i <= lua_gettop(L); ++i) list.push_back(check_tensor(L, i, "operand"));
    MOE_CHECK(!list.empty(), usage, running(L), "no operand", "tensors after the equation", "");
    return push_tensor(L, at::einsum(equation, list));
}
int where(lua_State* L) {
    Tensor& condition = check_tensor(L, 1, "condition");
    Tensor a = operand(L, 2), b = operand(L, 3);
    if (!do_expand(condition, a)) throw_unexpandable(L, condition, a);
    if (!do_expand(condition, b)) throw_unexpandable(L, condition, b);
    return push_tensor(L, at::where(condition.to(at::kBool), a, b));
}

// --- in place: t is returned ---

int itself(lua_State* L) { return lua_settop(L, 1), 1; }
/// t is wide enough for what it is given.
Tensor operand_into(lua_State* L, const Tensor& x) {
    Tensor b = operand(L, 2);
    if (!at::is_expandable_to(b.sizes(), x.sizes())) {
        MOE_THROW(shape, running(L), shape_text(b.sizes()) + " into " + shape_text(x.sizes()), "sizes that broadcast to t's, which cannot change", "");
    }
    return b;
}
int add_(lua_State* L) {
    Options o(L, 3, {"alpha"});
    Tensor& x = t(L);
    x.add_(operand_into(L, x), o.has("alpha") ? at::Scalar(o.number("alpha", 1)) : at::Scalar(1));
    return itself(L);
}
int sub_(lua_State* L) { return t(L).sub_(operand_into(L, t(L))), itself(L); }
int mul_(lua_State* L) { return t(L).mul_(operand_into(L, t(L))), itself(L); }
int div_(lua_State* L) { return t(L).div_(operand_into(L, t(L))), itself(L); }
int zero_(lua_State* L) { return t(L).zero_(), itself(L); }
int fill_(lua_State* L) {
    if (lua_isboolean(L, 2)) {
        t(L).fill_(bool(lua_toboolean(L, 2)));
    } else {
        t(L).fill_(lua_isinteger(L, 2) ? at::Scalar(int64_t(lua_tointeger(L, 2))) : at::Scalar(check_number(L, 2, "value")));
    }
    return itself(L);
}
int clamp_(lua_State* L) {
    auto [low, high] = bounds(L);
    t(L).clamp_(low, high);
    return itself(L);
}

const Binding kFunctions[] = {
    {"sum", sum, "t:sum(dim, {keepdim = false}): sum over a dim, a table of dims, or of all elements.\nExample: print(moe.ones({2, 3}):sum(1))"},
    {"mean", mean, "t:mean(dim, {keepdim = false}): mean over a dim, a table of dims, or of all elements; of integers in float32."},
    {"prod", prod, "t:prod(dim, {keepdim = false}): product over a dim, or of all elements."},
    {"std", spread<true>, "t:std(dim, {keepdim = false, correction = 1}): standard deviation over n - correction, over dims or of all elements."},
    {"var", spread<false>, "t:var(dim, {keepdim = false, correction = 1}): variance over n - correction, over dims or of all elements."},
    {"max", largest, "t:max(): the largest element; t:max(dim, {keepdim = false}): the largest along a dim and their ids; t:max(other): elementwise.\nExample: print(moe.tensor({{1, 5}, {4, 2}}):max(1))"},
    {"min", smallest, "t:min(): the smallest element; t:min(dim, {keepdim = false}): the smallest along a dim and their ids; t:min(other): elementwise."},
    {"amax", amax, "t:amax(dim, {keepdim = false}): the largest along a dim, a table of dims, or of all."},
    {"amin", amin, "t:amin(dim, {keepdim = false}): the smallest along a dim, a table of dims, or of all."},
    {"median", median, "t:median(): the median, the lower one of two; t:median(dim, {keepdim = false}): medians along a dim and their ids."},
    {"argmax", argmax, "t:argmax(dim, {keepdim = false}): index of the largest along a dim, or of all elements in order; 0-based, int64."},
    {"argmin", argmin, "t:argmin(dim, {keepdim = false}): index of the smallest along a dim, or of all elements in order; 0-based, int64."},
    {"all", truth<true>, "t:all(): true where no element is 0; t:all(dim, {keepdim = false}): the same along a dim or dims, a bool tensor."},
    {"any", truth<false>, "t:any(): true where an element is not 0; t:any(dim, {keepdim = false}): the same along a dim or dims, a bool tensor."},
    {"cumsum", cumsum, "t:cumsum(dim): running sums along a dim.\nExample: print(moe.arange(4):cumsum(0))"},
    {"cumprod", cumprod, "t:cumprod(dim): running products along a dim."},
    {"logsumexp", logsumexp, "t:logsumexp(dim, {keepdim = false}): log of the sum of exp(t) over a dim, a table of dims, or all elements, without overflow."},
    {"norm", norm, "t:norm(dim, {p = 2, keepdim = false}): p-norm over a dim, a table of dims, or of all elements."},
    {"softmax", softmax, "t:softmax(dim): exp(t) / sum of exp(t) along a dim.\nExample: print(moe.tensor({1.0, 2.0}):softmax(-1))"},
    {"log_softmax", log_softmax, "t:log_softmax(dim): log of softmax, without overflow."},
    {"outer", outer, "a:outer(b): products of all pairs of two vectors [N] and [M] → [N, M]."},
    {"exp", unary<&Tensor::exp>, "t:exp(): elementwise."},
    {"expm1", unary<&Tensor::expm1>, "t:expm1(): elementwise exp(t) - 1, exact near 0."},
    {"log", unary<&Tensor::log>, "t:log(): elementwise natural logarithm."},
    {"log1p", unary<&Tensor::log1p>, "t:log1p(): elementwise log(1 + t), exact near 0."},
    {"log2", unary<&Tensor::log2>, "t:log2(): elementwise logarithm of base 2."},
    {"log10", unary<&Tensor::log10>, "t:log10(): elementwise logarithm of base 10."},
    {"sqrt", unary<&Tensor::sqrt>, "t:sqrt(): elementwise."},
    {"rsqrt", unary<&Tensor::rsqrt>, "t:rsqrt(): elementwise 1 / sqrt(t)."},
    {"square", unary<&Tensor::square>, "t:square(): elementwise t²."},
    {"reciprocal", function<reciprocal>, "t:reciprocal(): elementwise 1 / t."},
    {"abs", unary<&Tensor::abs>, "t:abs(): elementwise."},
    {"sign", unary<&Tensor::sign>, "t:sign(): elementwise -1, 0 or 1."},
    {"neg", unary<&Tensor::neg>, "t:neg(): elementwise -t."},
    {"sigmoid", unary<&Tensor::sigmoid>, "t:sigmoid(): elementwise 1 / (1 + exp(-t))."},
    {"relu", unary<&Tensor::relu>, "t:relu(): elementwise, 0 where t is negative."},
    {"gelu", gelu, "t:gelu(form): elementwise t times the normal distribution function of t; form \"tanh\": its approximation."},
    {"silu", function<silu>, "t:silu(): elementwise t times sigmoid(t)."},
    {"softplus", function<softplus>, "t:softplus(): elementwise log(1 + exp(t))."},
    {"tanh", unary<&Tensor::tanh>, "t:tanh(): elementwise."},
    {"sin", unary<&Tensor::sin>, "t:sin(): elementwise, radians."},
    {"cos", unary<&Tensor::cos>, "t:cos(): elementwise, radians."},
    {"tan", unary<&Tensor::tan>, "t:tan(): elementwise, radians."},
    {"atan2", binary<atan2>, "a:atan2(b): elementwise angle of the point (b, a), radians."},
    {"erf", unary<&Tensor::erf>, "t:erf(): elementwise error function."},
    {"floor", unary<&Tensor::floor>, "t:floor(): elementwise, rounded down."},
    {"ceil", unary<&Tensor::ceil>, "t:ceil(): elementwise, rounded up."},
    {"round", function<rounded>, "t:round(): elementwise, to the nearest integer, halves to even."},
    {"trunc", unary<&Tensor::trunc>, "t:trunc(): elementwise, towards 0."},
    {"pow", binary<power>, "a:pow(b): elementwise a ^ b."},
    {"maximum", binary<maximum>, "a:maximum(b): elementwise the larger; NaN where either is."},
    {"minimum", binary<minimum>, "a:minimum(b): elementwise the smaller; NaN where either is."},
    {"clamp", clamp, "t:clamp(low, high): elementwise, no less than low and no more than high; numbers or tensors, either may be nil.\nExample: print(moe.arange(5):clamp(1, 3))"},
    {"logical_and", binary<logical_and>, "a:logical_and(b): elementwise, a bool tensor."},
    {"logical_or", binary<logical_or>, "a:logical_or(b): elementwise, a bool tensor."},
    {"logical_xor", binary<logical_xor>, "a:logical_xor(b): elementwise, a bool tensor."},
    {"logical_not", unary<&Tensor::logical_not>, "t:logical_not(): elementwise, a bool tensor."},
    {"isnan", unary<&Tensor::isnan>, "t:isnan(): elementwise, a bool tensor."},
    {"isinf", unary<&Tensor::isinf>, "t:isinf(): elementwise, a bool tensor."},
    {"isfinite", function<finite>, "t:isfinite(): elementwise true where neither nan nor infinite, a bool tensor; t:is_finite() is one boolean."},
    {"add_", add_, "t:add_(b, {alpha = 1}): adds alpha · b, a tensor or a number, in place. Returns t."},
    {"sub_", sub_, "t:sub_(b): subtracts b in place. Returns t."},
    {"mul_", mul_, "t:mul_(b): multiplies by b in place. Returns t."},
    {"div_", div_, "t:div_(b): divides by b in place. Returns t."},
    {"zero_", zero_, "t:zero_(): sets every element to 0. Returns t."},
    {"fill_", fill_, "t:fill_(value): sets every element to a number or boolean. Returns t."},
    {"clamp_", clamp_, "t:clamp_(low, high): clamp in place. Returns t."},
};
const Binding kModule[] = {
    {"where", where, "moe.where(condition, a, b): elementwise a where the condition is not 0, else b; tensors or numbers, broadcast.\nExample: print(moe.where(moe.arange(4):gt(1), 1, -1))"},
    {"einsum", einsum, "moe.einsum(equation, a, b, …): sums of products by the names of dims, as in PyTorch.\nExample: print(moe.einsum(\"ij,jk->ik\", moe.ones {2, 3}, moe.ones {3, 4}))"},
};
}  // namespace

std::span<const Binding> tensor_math() { return kFunctions; }
std::span<const Binding> tensor_math_functions() { return kModule; }
}  // namespace moe::lua
