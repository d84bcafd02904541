// Methods and operators of tensors. Each is a line in a list: name, function, help.
#include "core/tensor/check.h"
#include "core/tensor/print.h"
#include "lua/bind/tensor.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <functional>

namespace moe::lua {
namespace {
using at::Tensor;

Tensor& t(lua_State* L) { return self_tensor(L); }

/// binary for operators: two tensors, the common case, are not copied.
template <Tensor (*F)(const Tensor&, const Tensor&)>
int operate(lua_State* L) {
    auto *a = test_box<Tensor>(L, 1), *b = test_box<Tensor>(L, 2);
    if (!a || !b || !*a || !*b) return binary<F>(L);
    if (!do_expand(**a, **b)) throw_unexpandable(L, **a, **b);
    return push_tensor(L, F(**a, **b));
}

template <class T, class Op>
void write_small(Tensor& out, const Tensor& a, const Tensor& b) {
    auto *x = a.const_data_ptr<T>(), *y = b.const_data_ptr<T>();
    std::transform(x, x + a.numel(), y, out.mutable_data_ptr<T>(), Op());
}
/// operate, with small tensors done here, over a spent one: what LibTorch does around four additions costs a hundred times as much. One rounding of IEEE 754 each, so bit for bit LibTorch's.
template <Tensor (*F)(const Tensor&, const Tensor&), class Op>
int operate_small(lua_State* L) {
    auto *a = test_box<Tensor>(L, 1), *b = test_box<Tensor>(L, 2);
    Tensor spent = a && b && *a && *b ? take_spent(**a, **b) : Tensor();
    if (!spent.defined()) return operate<F>(L);
    (spent.scalar_type() == at::kFloat ? write_small<float, Op> : write_small<double, Op>)(spent, **a, **b);
    return push_tensor(L, std::move(spent));
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

const Binding kOperators[] = {
    {"__add", operate_small<add, std::plus<>>, "a + b: elementwise, with PyTorch's broadcasting."},
    {"__sub", operate_small<subtract, std::minus<>>, "a - b: elementwise."},
    {"__mul", operate_small<multiply, std::multiplies<>>, "a * b: elementwise; a:matmul(b) is the matrix product."},
    {"__div", operate_small<divide, std::divides<>>, "a / b: elementwise."},
    {"__idiv", operate<floor_divide>, "a // b: elementwise quotient, rounded down."},
    {"__mod", operate<remainder>, "a % b: elementwise remainder, with the sign of b."},
    {"__pow", operate<power>, "a ^ b: elementwise power."},
    {"__unm", unary<&Tensor::neg>, "-a: elementwise."},
    {"__lt", ordered, "a < b: an error with a hint; a:lt(b) compares elements."},
    {"__le", ordered, "a <= b: an error with a hint; a:le(b) compares elements."},
    {"__eq", same, "a == b: true for the same tensor; a:eq(b) compares elements, a:allclose(b) values."},
    {"__concat", concat, "text .. a: appends the printed tensor."},
    {"__len", length, "#a: size of dim 0."},
    {"__tostring", text, "tostring(a): header with dtype, shape and device, then at most 8 x 8 values."},
    {"__newindex", set_tensor, "a[i] = value, a[\"1:3\"] = value, a[mask] = 0, a[{i, \"::2\"}] = value: sets elements, broadcasting a tensor, a number or a table of numbers. Indices as in a[i]."},
    {"__call", call_tensor, "a{i, j}, a(i, j): the element or part by an index a dim, as a[{i, j}]: integers, range texts, index lists, masks.\nExample: print(moe.arange(12):reshape {3, 4}{1, \"::2\"})"},
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

int reshape(lua_State* L) {
    std::vector<int64_t> shape = sizes_argument(L, 2);
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
/// t:to("bf16", "cuda"), t:to(other).
int convert(lua_State* L) {
    Tensor x = t(L);
    if (lua_gettop(L) < 2) bad_argument(L, 2, "dtype or device", "a dtype, a device or a tensor that has both");
    for (int i = 2; i <= lua_gettop(L); ++i) {
        if (test_box<Tensor>(L, i)) {
            x = x.to(check_tensor(L, i, "other").options());
            continue;
        }
        std::string name = check_string(L, i, "dtype or device");
        x = name.starts_with("cpu") || name.starts_with("cuda") ? x.to(device_named(name)) : x.to(dtype_named(name));
    }
    return push_tensor(L, x);
}
template <at::ScalarType D>
int convert_to(lua_State* L) {
    return push_tensor(L, t(L).to(D));
}
int to_cpu(lua_State* L) { return push_tensor(L, t(L).cpu()); }
int to_cuda(lua_State* L) { return push_tensor(L, t(L).to(device_named(lua_isnoneornil(L, 2) ? "cuda" : "cuda:" + std::to_string(check_integer(L, 2, "device"))))); }

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
int equal(lua_State* L) {
    Tensor &a = t(L), &b = check_tensor(L, 2, "b");
    lua_pushboolean(L, a.sizes() == b.sizes() && a.scalar_type() == b.scalar_type() && at::equal(a, b.to(a.device())));
    return 1;
}
int save(lua_State* L) {
    std::string path = check_string(L, 2, "path");
    MOE_CHECK(path.ends_with(".npy"), usage, "tensor:save: path", '"' + path + '"', "a file name that ends in .npy", "moe.save_safetensors(path, {name = t}) keeps several, of any dtype");
    save_as_npy("tensor:save", path, t(L));
    lua_settop(L, 1);
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
    {"to", convert, "t:to(\"bf16\"), t:to(\"cuda\"), t:to(\"fp32\", \"cpu\"), t:to(other): converted to a dtype, moved to a device, or both as another tensor is."},
    {"float", convert_to<at::kFloat>, "t:float(): in float32."},
    {"double", convert_to<at::kDouble>, "t:double(): in float64."},
    {"half", convert_to<at::kHalf>, "t:half(): in float16."},
    {"bfloat16", convert_to<at::kBFloat16>, "t:bfloat16(): in bfloat16."},
    {"int", convert_to<at::kInt>, "t:int(): in int32, towards zero."},
    {"long", convert_to<at::kLong>, "t:long(): in int64, towards zero."},
    {"bool", convert_to<at::kBool>, "t:bool(): true where an element is not 0."},
    {"cpu", to_cpu, "t:cpu(): on the host."},
    {"cuda", to_cuda, "t:cuda(), t:cuda(1): on a GPU."},
    {"item", item, "t:item(): the number of a tensor with one element."},
    {"to_table", to_table, "t:to_table(): nested Lua tables of numbers, 1-based."},
    {"allclose", allclose, "a:allclose(b, {rtol = 1e-5, atol = 1e-8}): true where all |a - b| <= atol + rtol * |b|."},
    {"equal", equal, "a:equal(b): true where dtype, shape and all numbers are the same (nan equals nothing).\nExample: print(moe.arange(3):equal(moe.arange(3)))"},
    {"save", save, "t:save(\"x.npy\"): writes t as NumPy's .npy, which moe.load_npy reads; bfloat16, which NumPy has not, only after t:float(). Returns t.\n"
     "Example: local path = os.tmpname() .. \".npy\"; moe.arange(3):save(path); print(moe.load_npy(path)); os.remove(path)"},
    {"is_finite", is_finite, "t:is_finite(): true where no element is nan or infinite."},
    {"copy_", copy_from, "t:copy_(from): overwrites t's numbers. Returns t."},
    {"clone", clone, "t:clone(): a copy."},
    {"contiguous", contiguous, "t:contiguous(): t, or a copy with its elements in order."},
};
}  // namespace

std::span<const Binding> tensor_methods() { return kMethods; }
std::span<const Binding> tensor_operators() { return kOperators; }
}  // namespace moe::lua
