// Tensors in Lua: names, shapes and dims as in PyTorch, dims 0-based.
#pragma once
#include "lua/bind/lua.h"

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

namespace moe::lua {

template <>
struct TypeName<at::Tensor> {
    static constexpr const char* value = "tensor";
};

// --- small tensors that Lua has let go: spent.cpp ---

/// Keeps a small contiguous float32 or float64 tensor of the CPU that nothing else holds for take_spent(); any other one is freed. Making and freeing a tensor of four numbers costs more than all else in adding two such.
void keep_spent(at::Tensor t);
/// A tensor of a's dtype (float32 or float64) and sizes for a result of a and b, its values anything; undefined where none is kept, or a and b differ in dtype or size, or are not small, contiguous, of the CPU and without gradient.
at::Tensor take_spent(const at::Tensor& a, const at::Tensor& b);

template <>
inline int collect<at::Tensor>(lua_State* L) {
    auto* box = test_box<at::Tensor>(L, 1);
    if (!box) bad_argument(L, 1, "self", "a tensor", "call methods with a colon: x:free()");
    if (*box) keep_spent(std::move(**box));
    box->reset();
    return 0;
}

/// Pushes a tensor and tells Lua's collector its bytes, so that a loop over large tensors does not fill the memory.
int push_tensor(lua_State* L, at::Tensor t);
/// The tensor at index. Throws moe::Error (usage; state for a freed one).
at::Tensor& check_tensor(lua_State* L, int index, const char* name);
/// "fp32", "float32", "bf16", "int64", … Throws moe::Error (dtype) with the nearest name.
at::ScalarType dtype_named(const std::string& name);
/// "cpu", "cuda", "cuda:1". Throws moe::Error (device).
at::Device device_named(const std::string& name);
/// Writes NumPy's .npy. Throws (dtype) for bfloat16 and (io); `op` names who asked.
void save_as_npy(const std::string& op, const std::string& path, const at::Tensor& t);
/// Nested tables of numbers (or booleans) as a tensor: float32 unless every number is an integer (int64), or `dtype` says.
at::Tensor tensor_from_table(lua_State* L, int index, std::optional<at::ScalarType> dtype);

// --- arguments of methods; self is at index 1 ---

inline at::Tensor& self_tensor(lua_State* L) { return self<at::Tensor>(L); }
/// A dim in PyTorch's range, negative ones from the end. Throws (shape).
int64_t dim_argument(lua_State* L, int index, const at::Tensor& x);
/// One dim or a table of dims.
std::vector<int64_t> dims_argument(lua_State* L, int index, const at::Tensor& x);
/// A tensor, or a number as a tensor that does not widen the other's type.
at::Tensor operand(lua_State* L, int index);
/// Sizes from a table at index, or from the numbers from there on.
std::vector<int64_t> sizes_argument(lua_State* L, int index);
/// Throws (shape) where an id in `ids` is not in -size … size − 1. Only looks at ids on a GPU, where a kernel would fail later and for good; on the CPU the op itself checks.
void check_ids(const char* op, const at::Tensor& ids, int64_t size);
/// Integers as they are in a float dtype: means, norms and logarithms of counts.
inline at::Tensor as_float(const at::Tensor& x) { return at::isIntegralType(x.scalar_type(), true) ? x.to(at::kFloat) : x; }
/// Pushes 0-d values as a Lua number or boolean.
void push_number(lua_State* L, const at::Scalar& s);
/// Pushes a list of tensors, 1-based.
int push_tensors(lua_State* L, const std::vector<at::Tensor>& list);

/// t:method() of a member function without arguments.
template <at::Tensor (at::Tensor::*F)() const>
int unary(lua_State* L) {
    return push_tensor(L, (self_tensor(L).*F)());
}
/// Elementwise with broadcasting, numbers on either side. Throws (shape) where the sizes do not fit.
[[noreturn]] void throw_unexpandable(lua_State* L, const at::Tensor& a, const at::Tensor& b);
bool do_expand(const at::Tensor& a, const at::Tensor& b);
template <at::Tensor (*F)(const at::Tensor&, const at::Tensor&)>
int binary(lua_State* L) {
    at::Tensor a = operand(L, 1), b = operand(L, 2);
    if (!do_expand(a, b)) throw_unexpandable(L, a, b);
    return push_tensor(L, F(a, b));
}

// --- reading and writing elements: tensor_index.cpp ---

/// t[key], with t at 1 and the key at 2; no value where the key is no index.
int index_tensor(lua_State* L);
/// t(i, j, …) and t{i, j, …}.
int call_tensor(lua_State* L);
/// t[key] = value, with the value at 3. Throws where the key is no index.
int set_tensor(lua_State* L);

/// Methods, fields and operators of the type, a list a file.
std::span<const Binding> tensor_operators();
std::span<const Binding> tensor_methods();
std::span<const Binding> tensor_math();
std::span<const Binding> tensor_math_functions();     ///< of the table moe
std::span<const Binding> tensor_choice();
std::span<const Binding> tensor_shapes();
std::span<const Binding> tensor_random();
std::span<const Binding> tensor_autograd();
std::span<const Binding> tensor_autograd_fields();
/// t.grad = value and t.requires_grad = value; false for another name.
bool set_autograd_field(lua_State* L, at::Tensor& t, const std::string& name, int value);

/// A generator among named arguments, the default one where there is none. Throws (device) where it is of another device.
std::optional<at::Generator> generator_option(const Options& options, at::Device device);

}  // namespace moe::lua
