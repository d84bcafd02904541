// Checks of shapes, dtypes and devices. Messages carry the actual values: "linear: x: got [4, 8], want [any, 16]".
#pragma once
#include "core/base/error.h"

#include <ATen/core/Tensor.h>

#include <initializer_list>
#include <string>
#include <string_view>

namespace moe {
using at::Tensor;

/// "[4, 8]".
std::string shape_text(at::IntArrayRef sizes);
/// "float32", "bfloat16", "int64": names as in PyTorch.
std::string dtype_text(at::ScalarType dtype);
/// "float32 [4, 8] cpu"; "undefined" for an undefined tensor.
std::string describe(const Tensor& t);

/// A tensor as messages name it. The tensor must outlive the check.
struct Named {
    std::string_view name;
    const Tensor& tensor;
};

/// Throws (shape) unless the tensor is defined and has these sizes; a negative size stands for any.
void check_shape(std::string_view op, Named t, std::initializer_list<int64_t> sizes);
/// Throws (shape) unless the tensor is defined and has this many dims.
void check_dims(std::string_view op, Named t, int64_t dims);
/// Throws (dtype) unless the tensor has one of these dtypes.
void check_dtype(std::string_view op, Named t, std::initializer_list<at::ScalarType> dtypes);
/// Throws (dtype) unless fp64, fp32, bf16 or fp16: what every op computes in.
void check_float(std::string_view op, Named t);
/// Throws (dtype) unless fp64 or fp32: statistics, routing weights, master weights.
void check_wide_float(std::string_view op, Named t);
/// Throws (dtype) unless fp64, fp32 or bf16: main gradients and moments. Half's range is too small to add up in.
void check_main_float(std::string_view op, Named t);
/// Throws (dtype) where two tensors' dtypes differ.
void check_same_dtype(std::string_view op, Named a, Named b);
/// Throws (device) where two tensors' devices differ.
void check_same_device(std::string_view op, Named a, Named b);
/// Throws (shape) where a.size(dim_a) and b.size(dim_b) differ, as an inner dim of a product must not:
/// "matmul: inner dims differ: got [4, 8] x [4, 8], want a.size(1) == b.size(0)".
void check_inner(std::string_view op, Named a, int64_t dim_a, Named b, int64_t dim_b);
/// Throws (shape) unless the tensor is contiguous: flat passes over storage.
void check_contiguous(std::string_view op, Named t);

}  // namespace moe
