#include "lua/bind/tensor.h"

#include "core/base/suggest.h"
#include "core/tensor/check.h"
#include "core/tensor/print.h"
#include "lua/bind/bind.h"

#include <ATen/ATen.h>
#include <ATen/ScalarOps.h>

namespace moe::lua {
namespace {
struct NamedDtype {
    const char *name, *torch_name;
    at::ScalarType type;
};
constexpr NamedDtype kDtypes[] = {
    {"fp32", "float32", at::kFloat},  {"fp64", "float64", at::kDouble}, {"bf16", "bfloat16", at::kBFloat16}, {"fp16", "float16", at::kHalf}, {"int64", "long", at::kLong},
    {"int32", "int", at::kInt},       {"int16", "short", at::kShort},   {"int8", "int8", at::kChar},         {"uint8", "byte", at::kByte},   {"bool", "bool", at::kBool},
};

/// Shape and options of moe.zeros {4, 8} or moe.zeros(4, 8), each with a table of options last.
struct Made {
    std::vector<int64_t> shape;
    at::TensorOptions options;
    bool requires_grad = false;
    std::optional<at::Generator> generator;
};

/// Options at index: dtype and device, else those of `fallback`.
void read_options(lua_State* L, int index, Made& m, at::TensorOptions fallback) {
    m.options = fallback;
    if (lua_isnoneornil(L, index)) return;
    Options o(L, index, {"dtype", "device", "requires_grad", "generator"});
    if (o.has("dtype")) m.options = m.options.dtype(dtype_named(o.string("dtype", "")));
    if (o.has("device")) m.options = m.options.device(device_named(o.string("device", "")));
    m.requires_grad = o.boolean("requires_grad", false);
    m.generator = generator_option(o, m.options.device());
}

void check_sizes(lua_State* L, const std::vector<int64_t>& shape) {
    for (int64_t size : shape) {
        if (size < 0) MOE_THROW(shape, running(L) + ": shape", shape_text(shape), "sizes of 0 or more", "");
    }
}

Made made(lua_State* L, int first, at::ScalarType dtype = at::kFloat) {
    Made m;
    if (lua_type(L, first) == LUA_TNUMBER) {
        for (; lua_type(L, first) == LUA_TNUMBER; ++first) m.shape.push_back(check_integer(L, first, "size"));
    } else {
        m.shape = check_integers(L, first++, "shape");
    }
    check_sizes(L, m.shape);
    read_options(L, first, m, dtype);
    return m;
}
Made made_with(lua_State* L, int index, at::TensorOptions fallback) {
    Made m;
    read_options(L, index, m, fallback);
    return m;
}
/// As another tensor: moe.zeros_like(t, {dtype =, …}).
Made made_like(lua_State* L, int index) {
    at::Tensor& like = check_tensor(L, 1, "t");
    Made m = made_with(L, index, like.options());
    m.shape = like.sizes().vec();
    return m;
}
int give(lua_State* L, const Made& m, at::Tensor t) {
    if (m.requires_grad) t.set_requires_grad(true);
    return push_tensor(L, std::move(t));
}

// --- tables of numbers ---

struct Flat {
    std::vector<int64_t> shape;
    std::vector<double> values;
    std::vector<int64_t> integers;
    bool all_integers = true, all_booleans = true;
};

void add_value(lua_State* L, Flat& flat) {
    if (lua_isboolean(L, -1)) {
        flat.integers.push_back(lua_toboolean(L, -1));
        flat.values.push_back(lua_toboolean(L, -1));
        return;
    }
    flat.all_booleans = false;
    if (lua_type(L, -1) != LUA_TNUMBER) bad_argument(L, -1, "values", "numbers in nested tables");
    flat.all_integers = flat.all_integers && lua_isinteger(L, -1);
    flat.integers.push_back(lua_isinteger(L, -1) ? lua_tointeger(L, -1) : 0);
    flat.values.push_back(lua_tonumber(L, -1));
}

constexpr size_t kMostDims = 64;

/// Value on the stack's top.
void flatten(lua_State* L, Flat& flat, size_t depth) {
    if (!lua_istable(L, -1)) {
        if (depth != flat.shape.size()) MOE_THROW(shape, running(L), "rows of different depth", "nested tables of one shape", "");
        return add_value(L, flat);
    }
    MOE_CHECK(depth < kMostDims, shape, running(L), "a table that contains itself, or one nested deeper than 64", "nested tables of one shape", "");
    luaL_checkstack(L, 4, "nested table");
    auto n = int64_t(lua_rawlen(L, -1));
    if (depth == flat.shape.size()) {
        if (!flat.values.empty()) MOE_THROW(shape, running(L), "rows of different depth", "nested tables of one shape", "");
        flat.shape.push_back(n);
    }
    if (flat.shape[depth] != n) {
        MOE_THROW(shape, running(L), fmt::format("rows of {} and of {} values", flat.shape[depth], n), "nested tables of one shape", "");
    }
    for (lua_Integer i = 1; i <= n; ++i) {
        lua_rawgeti(L, -1, i);
        flatten(L, flat, depth + 1);
        lua_pop(L, 1);
    }
}

// --- functions ---

int make_tensor(lua_State* L) {
    bool copy = test_box<at::Tensor>(L, 1);
    Options o(L, 2, {"dtype", "device", "requires_grad"});
    std::optional<at::ScalarType> dtype;
    if (o.has("dtype")) dtype = dtype_named(o.string("dtype", ""));
    at::Tensor t = copy ? check_tensor(L, 1, "values").detach().clone() : tensor_from_table(L, 1, dtype);
    if (dtype) t = t.to(*dtype);
    if (o.has("device")) t = t.to(device_named(o.string("device", "")));
    if (o.boolean("requires_grad", false)) t.set_requires_grad(true);
    return push_tensor(L, t);
}

int zeros(lua_State* L) {
    Made m = made(L, 1);
    return give(L, m, at::zeros(m.shape, m.options));
}
int ones(lua_State* L) {
    Made m = made(L, 1);
    return give(L, m, at::ones(m.shape, m.options));
}
int empty(lua_State* L) {
    Made m = made(L, 1);
    return give(L, m, at::empty(m.shape, m.options));
}
int randn(lua_State* L) {
    Made m = made(L, 1);
    return give(L, m, at::randn(m.shape, m.generator, m.options));
}
int rand(lua_State* L) {
    Made m = made(L, 1);
    return give(L, m, at::rand(m.shape, m.generator, m.options));
}
int randint(lua_State* L) {
    int64_t low = check_integer(L, 1, "low"), high = check_integer(L, 2, "high");
    MOE_CHECK(low < high, usage, "moe.randint", fmt::format("[{}, {})", low, high), "low < high", "");
    Made m = made(L, 3, at::kLong);
    return give(L, m, at::randint(low, high, m.shape, m.generator, m.options));
}
int randperm(lua_State* L) {
    int64_t n = check_integer(L, 1, "n");
    MOE_CHECK(n >= 0, usage, "moe.randperm: n", std::to_string(n), "0 or more", "");
    Made m = made_with(L, 2, at::kLong);
    return give(L, m, at::randperm(n, m.generator, m.options));
}
int full(lua_State* L) {
    std::vector<int64_t> shape = check_integers(L, 1, "shape");
    check_sizes(L, shape);
    if (lua_isboolean(L, 2)) {
        Made m = made_with(L, 3, at::kBool);
        return give(L, m, at::full(shape, bool(lua_toboolean(L, 2)), m.options));
    }
    bool integer = lua_isinteger(L, 2);
    double value = check_number(L, 2, "value");
    Made m = made_with(L, 3, integer ? at::kLong : at::kFloat);
    return give(L, m, integer ? at::full(shape, lua_tointeger(L, 2), m.options) : at::full(shape, value, m.options));
}
int arange(lua_State* L) {
    int n = 1;
    while (n < 3 && lua_type(L, n + 1) == LUA_TNUMBER) ++n;
    bool integer = true;
    for (int i = 1; i <= n; ++i) integer = integer && lua_isinteger(L, i);
    Made m = made_with(L, n + 1, integer ? at::kLong : at::kFloat);
    double start = n > 1 ? check_number(L, 1, "start") : 0, end = check_number(L, n > 1 ? 2 : 1, "end"), step = n > 2 ? check_number(L, 3, "step") : 1;
    MOE_CHECK(step != 0 && (end - start) / step >= 0, usage, "moe.arange", fmt::format("from {} to {} by {}", start, end, step), "a step that leads from start to end", "");
    return give(L, m, integer ? at::arange(int64_t(start), int64_t(end), int64_t(step), m.options) : at::arange(start, end, step, m.options));
}
int linspace(lua_State* L) {
    double start = check_number(L, 1, "start"), end = check_number(L, 2, "end");
    int64_t steps = check_integer(L, 3, "steps");
    MOE_CHECK(steps >= 0, usage, "moe.linspace: steps", std::to_string(steps), "0 or more", "");
    Made m = made_with(L, 4, at::kFloat);
    return give(L, m, at::linspace(start, end, steps, m.options));
}
int eye(lua_State* L) {
    int64_t n = check_integer(L, 1, "n"), columns = lua_type(L, 2) == LUA_TNUMBER ? check_integer(L, 2, "m") : n;
    MOE_CHECK(n >= 0 && columns >= 0, usage, "moe.eye", fmt::format("{} x {}", n, columns), "0 or more", "");
    Made m = made_with(L, lua_type(L, 2) == LUA_TNUMBER ? 3 : 2, at::kFloat);
    return give(L, m, at::eye(n, columns, m.options));
}
int zeros_like(lua_State* L) {
    Made m = made_like(L, 2);
    return give(L, m, at::zeros(m.shape, m.options));
}
int ones_like(lua_State* L) {
    Made m = made_like(L, 2);
    return give(L, m, at::ones(m.shape, m.options));
}
int full_like(lua_State* L) {
    Made m = made_like(L, 3);
    return give(L, m, at::full(m.shape, check_number(L, 2, "value"), m.options));
}
int rand_like(lua_State* L) {
    Made m = made_like(L, 2);
    return give(L, m, at::rand(m.shape, m.generator, m.options));
}
int randn_like(lua_State* L) {
    Made m = made_like(L, 2);
    return give(L, m, at::randn(m.shape, m.generator, m.options));
}

int list_of(lua_State* L, std::vector<at::Tensor>& list) {
    check_table(L, 1, "tensors");
    for (lua_Integer i = 1, n = lua_Integer(lua_rawlen(L, 1)); i <= n; ++i) {
        lua_rawgeti(L, 1, i);
        list.push_back(check_tensor(L, -1, fmt::format("tensors[{}]", i).c_str()));
        lua_pop(L, 1);
    }
    if (list.empty()) bad_argument(L, 1, "tensors", "a list of at least one tensor");
    return int(lua_isnoneornil(L, 2) ? 0 : check_integer(L, 2, "dim"));
}
int stack(lua_State* L) {
    std::vector<at::Tensor> list;
    int dim = list_of(L, list);
    return push_tensor(L, at::stack(list, dim));
}
int cat(lua_State* L) {
    std::vector<at::Tensor> list;
    int dim = list_of(L, list);
    return push_tensor(L, at::cat(list, dim));
}
#define MADE "{dtype =, device =, requires_grad = false}"
#define DRAWN "{dtype =, device =, requires_grad = false, generator =}"
const Binding kFunctions[] = {
    {"tensor", make_tensor,
     "moe.tensor(values, " MADE "): a tensor of nested tables of numbers: int64 where all are integers, bool of booleans, else float32. Of a tensor: a copy.\n"
     "Example: print(moe.tensor {{1, 2.5}, {3, 4}})"},
    {"zeros", zeros, "moe.zeros({4, 8}, " MADE "), moe.zeros(4, 8): a tensor of zeros, float32 unless dtype says.\nExample: print(moe.zeros({2, 3}, {dtype = \"bf16\"}))"},
    {"ones", ones, "moe.ones({4, 8}, " MADE "): a tensor of ones.\nExample: print(moe.ones {2, 3})"},
    {"empty", empty, "moe.empty({4, 8}, " MADE "): a tensor of whatever was in the memory.\nExample: print(moe.empty({2, 3}).shape)"},
    {"full", full, "moe.full({4, 8}, value, " MADE "): a tensor of one value: int64 of an integer, bool of a boolean, else float32.\nExample: print(moe.full({2, 3}, 0.5))"},
    {"rand", rand, "moe.rand({4, 8}, " DRAWN "): uniform in [0, 1).\nExample: print(moe.rand {2, 3})"},
    {"randn", randn, "moe.randn({4, 8}, " DRAWN "): normal, mean 0, deviation 1.\nExample: print(moe.randn({2, 3}, {generator = moe.generator(1)}))"},
    {"randint", randint, "moe.randint(low, high, {4, 8}, " DRAWN "): integers low … high − 1, int64.\nExample: print(moe.randint(0, 10, {2, 3}))"},
    {"randperm", randperm, "moe.randperm(n, " DRAWN "): 0 … n − 1 in random order, int64 [n].\nExample: print(moe.randperm(5))"},
    {"arange", arange, "moe.arange(end), moe.arange(start, end, step, " MADE "): start, start + step … below end; int64 of integers.\nExample: print(moe.arange(0, 1, 0.25))"},
    {"linspace", linspace, "moe.linspace(start, end, steps, " MADE "): evenly spaced numbers, both ends included.\nExample: print(moe.linspace(0, 1, 5))"},
    {"eye", eye, "moe.eye(n, m, " MADE "): ones on the diagonal of [n, m] (m = n unless given).\nExample: print(moe.eye(3))"},
    {"zeros_like", zeros_like, "moe.zeros_like(t, " MADE "): zeros of t's shape, dtype and device.\nExample: print(moe.zeros_like(moe.arange(3)))"},
    {"ones_like", ones_like, "moe.ones_like(t, " MADE "): ones of t's shape, dtype and device.\nExample: print(moe.ones_like(moe.arange(3)))"},
    {"full_like", full_like, "moe.full_like(t, value, " MADE "): one value in t's shape, dtype and device.\nExample: print(moe.full_like(moe.arange(3), 7))"},
    {"rand_like", rand_like, "moe.rand_like(t, " DRAWN "): uniform draws of t's shape, dtype and device.\nExample: print(moe.rand_like(moe.zeros {3}))"},
    {"randn_like", randn_like, "moe.randn_like(t, " DRAWN "): normal draws of t's shape, dtype and device.\nExample: print(moe.randn_like(moe.zeros {3}))"},
    {"stack", stack, "moe.stack({a, b, …}, dim): tensors of one shape along a new dim (0 unless given).\nExample: print(moe.stack {moe.zeros {2}, moe.ones {2}})"},
    {"cat", cat, "moe.cat({a, b, …}, dim): tensors one after another along a dim (0 unless given).\nExample: print(moe.cat {moe.zeros {2}, moe.ones {1}})"},
};

/// __tostring of a shape: "[2, 4, 7]".
int print_shape(lua_State* L) {
    push_string(L, shape_text(check_integers(L, 1, "shape")));
    return 1;
}
int field_shape(lua_State* L) {
    push_integers(L, self<at::Tensor>(L).sizes());
    lua_createtable(L, 0, 1);
    lua_pushcfunction(L, print_shape);
    lua_setfield(L, -2, "__tostring");
    lua_setmetatable(L, -2);
    return 1;
}
int field_dtype(lua_State* L) {
    push_string(L, dtype_text(self<at::Tensor>(L).scalar_type()));
    return 1;
}
int field_device(lua_State* L) {
    push_string(L, self<at::Tensor>(L).device().str());
    return 1;
}
int field_transposed(lua_State* L) {
    auto& t = self<at::Tensor>(L);
    MOE_CHECK(t.dim() == 2, shape, "tensor.T", shape_text(t.sizes()), "a matrix", "transpose(a, b) swaps two dims of any tensor");
    return push_tensor(L, t.t());
}
const Binding kFields[] = {
    {"shape", field_shape, "t.shape: sizes of the dims, a table."},
    {"dtype", field_dtype, "t.dtype: \"float32\", \"bfloat16\", \"int64\" …"},
    {"device", field_device, "t.device: \"cpu\", \"cuda:0\"."},
    {"T", field_transposed, "t.T: the transposed matrix, a view."},
};

/// What the guard adds to LibTorch's errors: the first tensors among the arguments, or in a list that is one.
std::string tensors_of_call(lua_State* L) {
    constexpr int kMost = 4;
    std::string text;
    int n = 0;
    auto add = [&](int index) {
        auto* box = test_box<at::Tensor>(L, index);
        if (box && *box && (*box)->defined() && n < kMost) text += (n++ ? ", " : "") + describe(**box);
    };
    for (int i = 1, top = lua_gettop(L); i <= top; ++i) {
        add(i);
        for (int k = 1; lua_istable(L, i) && k <= kMost; ++k) {
            lua_rawgeti(L, i, k);
            add(-1);
            lua_pop(L, 1);
        }
    }
    return text;
}

std::span<const Binding> all_methods() {
    static const std::vector<Binding> all = [] {
        std::vector<Binding> list;
        for (auto part : {tensor_methods(), tensor_math(), tensor_choice(), tensor_shapes(), tensor_random(), tensor_autograd()}) list.insert(list.end(), part.begin(), part.end());
        return list;
    }();
    return all;
}
std::span<const Binding> all_fields() {
    static const std::vector<Binding> all = [] {
        std::vector<Binding> list(std::begin(kFields), std::end(kFields));
        for (auto& field : tensor_autograd_fields()) list.push_back(field);
        return list;
    }();
    return all;
}
}  // namespace

int push_tensor(lua_State* L, at::Tensor t) {
    // A view owns nothing: only storage that nothing else holds counts. Small ones are told together: a step of the collector for each would cost more than they do; and at less
    // than the 450 bytes that they have beside Lua's, for a cycle of the collector costs by what lives.
    constexpr size_t kObjectBytes = 128, kToldBytes = 64 << 10;
    static thread_local size_t untold = 0;
    untold += kObjectBytes + (t.defined() && t.has_storage() && t.storage().use_count() == 1 ? t.nbytes() : 0);
    push<at::Tensor>(L, std::move(t));
    if (untold >= kToldBytes) {
        lua_gc(L, LUA_GCSTEP, int(std::min<size_t>(untold >> 10, 1 << 20)));
        untold = 0;
    }
    return 1;
}
int push_tensors(lua_State* L, const std::vector<at::Tensor>& list) {
    lua_createtable(L, int(list.size()), 0);
    for (size_t i = 0; i < list.size(); ++i) {
        push_tensor(L, list[i]);
        lua_rawseti(L, -2, lua_Integer(i + 1));
    }
    return 1;
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

int64_t dim_argument(lua_State* L, int index, const at::Tensor& x) {
    int64_t dim = check_integer(L, index, "dim"), n = std::max<int64_t>(x.dim(), 1);
    MOE_CHECK(dim >= -n && dim < n, shape, running(L) + ": dim", fmt::format("{} of {}", dim, shape_text(x.sizes())), fmt::format("{} … {}", -n, n - 1), "dims are 0-based");
    return dim;
}
std::vector<int64_t> dims_argument(lua_State* L, int index, const at::Tensor& x) {
    if (!lua_istable(L, index)) return {dim_argument(L, index, x)};
    std::vector<int64_t> dims;
    for (lua_Integer i = 1, n = lua_Integer(lua_rawlen(L, index)); i <= n; ++i) {
        lua_rawgeti(L, index, i);
        dims.push_back(dim_argument(L, lua_gettop(L), x));
        lua_pop(L, 1);
    }
    return dims;
}
std::vector<int64_t> sizes_argument(lua_State* L, int index) {
    if (lua_istable(L, index)) return check_integers(L, index, "shape");
    std::vector<int64_t> shape;
    for (int i = index; i <= lua_gettop(L) && lua_type(L, i) == LUA_TNUMBER; ++i) shape.push_back(check_integer(L, i, "size"));
    return shape;
}
at::Tensor operand(lua_State* L, int index) {
    if (auto* box = test_box<at::Tensor>(L, index); box && *box) return **box;
    if (lua_type(L, index) == LUA_TNUMBER) {
        return lua_isinteger(L, index) ? at::native::wrapped_scalar_tensor(int64_t(lua_tointeger(L, index))) : at::native::wrapped_scalar_tensor(lua_tonumber(L, index));
    }
    if (!test_box<at::Tensor>(L, index)) bad_argument(L, index, index == 1 ? "left" : "right", "a tensor or a number");
    return check_tensor(L, index, "operand");
}
bool do_expand(const at::Tensor& a, const at::Tensor& b) {
    at::IntArrayRef x = a.sizes(), y = b.sizes();
    if (x == y) return true;
    for (size_t i = 1; i <= std::min(x.size(), y.size()); ++i) {
        int64_t p = x[x.size() - i], q = y[y.size() - i];
        if (p != q && p != 1 && q != 1) return false;
    }
    return true;
}
void throw_unexpandable(lua_State* L, const at::Tensor& a, const at::Tensor& b) {
    MOE_THROW(shape, running(L), shape_text(a.sizes()) + " and " + shape_text(b.sizes()), "equal sizes, or 1, in each dim from the last on", "");
}
void check_ids(const char* op, const at::Tensor& ids, int64_t size) {
    if (!ids.is_cuda() || ids.numel() == 0 || !at::isIntegralType(ids.scalar_type(), false)) return;
    auto [least, most] = at::aminmax(ids);
    int64_t low = least.item<int64_t>(), high = most.item<int64_t>();
    MOE_CHECK(low >= -size && high < size, shape, op, fmt::format("ids {} … {}", low, high), fmt::format("ids below {}", size), "they are 0-based");
}

at::Tensor& check_tensor(lua_State* L, int index, const char* name) { return check<at::Tensor>(L, index, name); }

at::ScalarType dtype_named(const std::string& name) {
    std::vector<std::string> names;
    for (auto& d : kDtypes) {
        if (name == d.name || name == d.torch_name) return d.type;
        names.emplace_back(d.name);
    }
    std::string want;
    for (auto& n : names) want += (want.empty() ? "" : ", ") + n;
    MOE_THROW(dtype, "dtype", '"' + name + '"', "one of " + want, did_you_mean(name, names));
}

at::Device device_named(const std::string& name) {
    try {
        at::Device device(name);
        if (device.is_cpu() || (device.is_cuda() && at::hasCUDA())) return device;
    } catch (const c10::Error&) {
        // The message below says it better than LibTorch's list of back ends.
    }
    MOE_THROW(device, "device", '"' + name + '"', at::hasCUDA() ? "cpu or cuda" : "cpu: this machine or build has no CUDA device", "");
}

at::Tensor tensor_from_table(lua_State* L, int index, std::optional<at::ScalarType> dtype) {
    Flat flat;
    lua_pushvalue(L, index);
    if (!lua_istable(L, -1) && lua_type(L, -1) != LUA_TNUMBER) bad_argument(L, index, "values", "a number or nested tables of numbers");
    flatten(L, flat, 0);
    lua_pop(L, 1);
    bool integers = flat.all_integers && !flat.values.empty();
    at::Tensor t = integers ? at::tensor(flat.integers, at::kLong) : at::tensor(flat.values, at::kDouble);
    at::ScalarType inferred = !integers ? at::kFloat : flat.all_booleans ? at::kBool : at::kLong;
    return t.to(dtype.value_or(inferred)).reshape(flat.shape);
}

void open_tensor(lua_State* L) {
    describe_arguments = tensors_of_call;
    set_functions(L, "moe.", tensor_math_functions());
    set_functions(L, "moe.", kFunctions);
    register_type<at::Tensor>(L, {.name = nullptr,
                                  .help = "tensor: numbers on a device; names, shapes and dims as in PyTorch, dims and elements 0-based. t[i] is row i, t[\"1:3\"] and t[\"…, ::2, -1\"] are parts (views),\n"
                                          "t[mask] and t[ids] pick rows or elements (copies), t{i, j} and t[{i, j}] take one index a dim; all can be assigned to.\n"
                                          "Example: local t = moe.arange(12):reshape {3, 4}; t[\":, 1\"] = 0; print(t{2, \"1:\"}, t[t:gt(5)])",
                                  .methods = all_methods(),
                                  .fields = all_fields(),
                                  .meta = tensor_operators(),
                                  .index = index_tensor});
}
}  // namespace moe::lua
