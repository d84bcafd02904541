#include "lua/bind/tensor.h"

#include "core/base/suggest.h"
#include "core/tensor/check.h"
#include "core/tensor/print.h"
#include "lua/bind/bind.h"

#include <ATen/ATen.h>

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
};

at::TensorOptions tensor_options(lua_State* L, int index, at::ScalarType fallback) {
    Options o(L, index, {"dtype", "device"});
    at::TensorOptions options(o.has("dtype") ? dtype_named(o.string("dtype", "")) : fallback);
    return options.device(o.has("device") ? device_named(o.string("device", "")) : at::Device(at::kCPU));
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
    m.options = tensor_options(L, first, dtype);
    return m;
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

/// Value on the stack's top.
void flatten(lua_State* L, Flat& flat, size_t depth) {
    if (!lua_istable(L, -1)) {
        if (depth != flat.shape.size()) MOE_THROW(shape, running(L), "rows of different depth", "nested tables of one shape", "");
        return add_value(L, flat);
    }
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

int new_tensor(lua_State* L) {
    Options o(L, 2, {"dtype", "device"});
    std::optional<at::ScalarType> dtype;
    if (o.has("dtype")) dtype = dtype_named(o.string("dtype", ""));
    at::Tensor t = test_box<at::Tensor>(L, 1) ? check_tensor(L, 1, "values").clone() : tensor_from_table(L, 1, dtype);
    if (dtype) t = t.to(*dtype);
    if (o.has("device")) t = t.to(device_named(o.string("device", "")));
    return push_tensor(L, t);
}

int zeros(lua_State* L) {
    Made m = made(L, 1);
    return push_tensor(L, at::zeros(m.shape, m.options));
}
int ones(lua_State* L) {
    Made m = made(L, 1);
    return push_tensor(L, at::ones(m.shape, m.options));
}
int randn(lua_State* L) {
    Made m = made(L, 1);
    return push_tensor(L, at::randn(m.shape, m.options));
}
int rand(lua_State* L) {
    Made m = made(L, 1);
    return push_tensor(L, at::rand(m.shape, m.options));
}
int randint(lua_State* L) {
    int64_t low = check_integer(L, 1, "low"), high = check_integer(L, 2, "high");
    MOE_CHECK(low < high, usage, "moe.randint", fmt::format("[{}, {})", low, high), "low < high", "");
    Made m = made(L, 3, at::kLong);
    return push_tensor(L, at::randint(low, high, m.shape, m.options));
}
int full(lua_State* L) {
    std::vector<int64_t> shape = check_integers(L, 1, "shape");
    check_sizes(L, shape);
    bool integer = lua_isinteger(L, 2);
    double value = check_number(L, 2, "value");
    auto options = tensor_options(L, 3, integer ? at::kLong : at::kFloat);
    return push_tensor(L, integer ? at::full(shape, lua_tointeger(L, 2), options) : at::full(shape, value, options));
}
int arange(lua_State* L) {
    int n = 1;
    while (n < 3 && lua_type(L, n + 1) == LUA_TNUMBER) ++n;
    bool integer = true;
    for (int i = 1; i <= n; ++i) integer = integer && lua_isinteger(L, i);
    auto options = tensor_options(L, n + 1, integer ? at::kLong : at::kFloat);
    double start = n > 1 ? check_number(L, 1, "start") : 0, end = check_number(L, n > 1 ? 2 : 1, "end"), step = n > 2 ? check_number(L, 3, "step") : 1;
    MOE_CHECK(step != 0 && (end - start) / step >= 0, usage, "moe.arange", fmt::format("from {} to {} by {}", start, end, step), "a step that leads from start to end", "");
    if (integer) return push_tensor(L, at::arange(int64_t(start), int64_t(end), int64_t(step), options));
    return push_tensor(L, at::arange(start, end, step, options));
}
int zeros_like(lua_State* L) { return push_tensor(L, at::zeros_like(check_tensor(L, 1, "t"))); }
int randn_like(lua_State* L) { return push_tensor(L, at::randn_like(check_tensor(L, 1, "t"))); }

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
int seed(lua_State* L) {
    at::manual_seed(uint64_t(check_integer(L, 1, "seed")));
    return 0;
}

const Binding kFunctions[] = {
    {"tensor", new_tensor, "moe.tensor(values, {dtype =, device =}): a tensor of nested tables of numbers: int64 where all are integers, bool of booleans, else float32."},
    {"zeros", zeros, "moe.zeros({4, 8}, {dtype =, device =}): a tensor of zeros, float32 unless dtype says."},
    {"ones", ones, "moe.ones({4, 8}, {dtype =, device =}): a tensor of ones."},
    {"full", full, "moe.full({4, 8}, value, {dtype =, device =}): a tensor of one value."},
    {"rand", rand, "moe.rand({4, 8}, {dtype =, device =}): uniform in [0, 1)."},
    {"randn", randn, "moe.randn({4, 8}, {dtype =, device =}): normal, mean 0, deviation 1."},
    {"randint", randint, "moe.randint(low, high, {4, 8}, {dtype =, device =}): integers low … high − 1, int64."},
    {"arange", arange, "moe.arange(end), moe.arange(start, end, step, {dtype =}): start, start + step … below end."},
    {"zeros_like", zeros_like, "moe.zeros_like(t): zeros of t's shape, dtype and device."},
    {"randn_like", randn_like, "moe.randn_like(t): normal draws of t's shape, dtype and device."},
    {"stack", stack, "moe.stack({a, b, …}, dim): tensors of one shape along a new dim (0 unless given)."},
    {"cat", cat, "moe.cat({a, b, …}, dim): tensors one after another along a dim (0 unless given)."},
    {"seed", seed, "moe.seed(n): sets the generator of moe.rand, moe.randn and moe.randint. Models and data have seeds of their own in the configuration."},
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

int index_tensor(lua_State* L) {
    if (lua_type(L, 2) != LUA_TNUMBER) return 0;
    auto& t = self<at::Tensor>(L);
    int64_t i = check_integer(L, 2, "index");
    MOE_CHECK(t.dim() > 0 && i >= -t.size(0) && i < t.size(0), shape, "tensor[i]", fmt::format("i = {} of {}", i, shape_text(t.sizes())),
              t.dim() ? fmt::format("0 … {}", t.size(0) - 1) : "a tensor with dims", "elements are 0-based, as in PyTorch");
    return push_tensor(L, t.select(0, i));
}
}  // namespace

int push_tensor(lua_State* L, at::Tensor t) {
    // A view owns nothing: only storage that nothing else holds counts.
    size_t kib = t.defined() && t.has_storage() && t.storage().use_count() == 1 ? t.nbytes() / 1024 : 0;
    push<at::Tensor>(L, std::move(t));
    if (kib) lua_gc(L, LUA_GCSTEP, int(std::min<size_t>(kib, 1 << 20)));
    return 1;
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
    set_functions(L, "moe.", kFunctions);
    register_type<at::Tensor>(L, {.name = nullptr,
                                  .help = "tensor: numbers on a device; names, shapes and dims as in PyTorch, dims and elements 0-based. t[i] is row i.",
                                  .methods = tensor_methods(),
                                  .fields = kFields,
                                  .meta = tensor_operators(),
                                  .index = index_tensor});
}
}  // namespace moe::lua
