#include "core/tensor/check.h"

#include <fmt/ranges.h>

#include <algorithm>

namespace moe {
namespace {
std::string label(std::string_view op, std::string_view name) { return fmt::format("{}: {}", op, name); }

/// "[T, 16]" as wanted sizes; "any" stands for a free one.
std::string wanted_text(std::initializer_list<int64_t> sizes) {
    std::string text;
    for (int64_t n : sizes) text += (text.empty() ? "" : ", ") + (n < 0 ? std::string("any") : std::to_string(n));
    return "[" + text + "]";
}
void check_defined(std::string_view op, Named t) {
    MOE_CHECK(t.tensor.defined(), shape, label(op, t.name), "an undefined tensor", "a tensor", "");
}
}  // namespace

std::string shape_text(at::IntArrayRef sizes) { return fmt::format("[{}]", fmt::join(sizes.begin(), sizes.end(), ", ")); }

std::string dtype_text(at::ScalarType dtype) {
    switch (dtype) {
        case at::kDouble: return "float64";
        case at::kFloat: return "float32";
        case at::kHalf: return "float16";
        case at::kBFloat16: return "bfloat16";
        case at::kLong: return "int64";
        case at::kInt: return "int32";
        case at::kShort: return "int16";
        case at::kChar: return "int8";
        case at::kByte: return "uint8";
        case at::kBool: return "bool";
        case at::kFloat8_e4m3fn: return "float8_e4m3fn";
        case at::kFloat8_e5m2: return "float8_e5m2";
        default: return c10::toString(dtype);
    }
}

std::string describe(const Tensor& t) {
    if (!t.defined()) return "undefined";
    return fmt::format("{} {} {}", dtype_text(t.scalar_type()), shape_text(t.sizes()), t.device().str());
}

void check_shape(std::string_view op, Named t, std::initializer_list<int64_t> sizes) {
    check_defined(op, t);
    bool same = t.tensor.dim() == int64_t(sizes.size()) &&
                std::equal(sizes.begin(), sizes.end(), t.tensor.sizes().begin(), [](int64_t want, int64_t got) { return want < 0 || want == got; });
    MOE_CHECK(same, shape, label(op, t.name), shape_text(t.tensor.sizes()), wanted_text(sizes), "");
}

void check_dims(std::string_view op, Named t, int64_t dims) {
    check_defined(op, t);
    MOE_CHECK(t.tensor.dim() == dims, shape, label(op, t.name), shape_text(t.tensor.sizes()), fmt::format("{} dims", dims), "");
}

void check_dtype(std::string_view op, Named t, std::initializer_list<at::ScalarType> dtypes) {
    check_defined(op, t);
    if (std::find(dtypes.begin(), dtypes.end(), t.tensor.scalar_type()) != dtypes.end()) return;
    std::string want;
    for (auto d : dtypes) want += (want.empty() ? "" : " or ") + dtype_text(d);
    MOE_THROW(dtype, label(op, t.name), dtype_text(t.tensor.scalar_type()), want, "");
}

void check_float(std::string_view op, Named t) { check_dtype(op, t, {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf}); }
void check_wide_float(std::string_view op, Named t) { check_dtype(op, t, {at::kDouble, at::kFloat}); }
void check_main_float(std::string_view op, Named t) { check_dtype(op, t, {at::kDouble, at::kFloat, at::kBFloat16}); }

void check_same_dtype(std::string_view op, Named a, Named b) {
    check_defined(op, a);
    check_defined(op, b);
    MOE_CHECK(a.tensor.scalar_type() == b.tensor.scalar_type(), dtype, fmt::format("{}: dtypes of {} and {} differ", op, a.name, b.name),
              dtype_text(a.tensor.scalar_type()) + " and " + dtype_text(b.tensor.scalar_type()), "one dtype", "");
}

void check_same_device(std::string_view op, Named a, Named b) {
    check_defined(op, a);
    check_defined(op, b);
    MOE_CHECK(a.tensor.device() == b.tensor.device(), device, fmt::format("{}: devices of {} and {} differ", op, a.name, b.name),
              a.tensor.device().str() + " and " + b.tensor.device().str(), "one device", "");
}

void check_inner(std::string_view op, Named a, int64_t dim_a, Named b, int64_t dim_b) {
    check_defined(op, a);
    check_defined(op, b);
    bool same = dim_a < a.tensor.dim() && dim_b < b.tensor.dim() && a.tensor.size(dim_a) == b.tensor.size(dim_b);
    MOE_CHECK(same, shape, fmt::format("{}: inner dims differ", op), shape_text(a.tensor.sizes()) + " x " + shape_text(b.tensor.sizes()),
              fmt::format("{}.size({}) == {}.size({})", a.name, dim_a, b.name, dim_b), "");
}

void check_contiguous(std::string_view op, Named t) {
    check_defined(op, t);
    MOE_CHECK(t.tensor.is_contiguous(), shape, label(op, t.name), fmt::format("strides {}", shape_text(t.tensor.strides())), "a contiguous tensor", "call :contiguous() first");
}
}  // namespace moe
