// A factor that the host may not know.
#pragma once
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>

namespace moe {

/// A number, or a 0-d float64 tensor beside the tensors that it multiplies: one that changes from step to step while a recorded graph of
/// kernels stays the same.
struct Factor {
    double number = 1;
    at::Tensor tensor;            ///< where defined it is the factor and `number` means nothing

    Factor() = default;
    Factor(double value) : number(value) {}
    explicit Factor(at::Tensor value) : tensor(std::move(value)) {}
    /// The value; waits for the device where that has it.
    double value() const { return tensor.defined() ? tensor.item<double>() : number; }
    Factor operator*(double other) const { return tensor.defined() ? Factor(tensor * other) : Factor(number * other); }
};
inline at::Tensor scaled(const at::Tensor& x, const Factor& f) { return f.tensor.defined() ? x * f.tensor : x * f.number; }

}  // namespace moe
