// Master weights. Where weights are bf16 and the master type is fp32, the master is not kept beside the weight but made of it: two bytes more instead of four, and an
// update reads and writes less.
#pragma once
#include <ATen/core/Tensor.h>

#include <utility>

namespace moe {
using at::Tensor;

/// x, any float dtype, as a weight of this dtype. To bf16 it is rounded to nearest, of two as near to the one farther from zero (so that what is left fits 16 bits), by way
/// of fp32; otherwise as Tensor::to does.
Tensor rounded(const Tensor& x, at::ScalarType dtype);

/// fp32 x as a bf16 weight and the int16 rest: bits of x = bits of the weight · 2^16 + rest. A NaN becomes the NaN without a payload.
std::pair<Tensor, Tensor> split_master(const Tensor& x);
/// The x that split_master was given, bit for bit.
Tensor joined_master(const Tensor& weight, const Tensor& rest);

/// The master weights of some elements, and the compute weights that follow them: views of what a store keeps.
struct Master {
    Tensor data;                      ///< in the master type; or int16: the rest of `value`
    Tensor value;                     ///< compute weights; undefined where `data` is them
    bool is_split() const;
    at::ScalarType dtype() const { return is_split() ? at::kFloat : data.scalar_type(); }
    /// The masters: `data` itself, or a new tensor where they are split.
    Tensor read() const;
    /// Sets masters and weights from a tensor of the same sizes, any float dtype, any device.
    void write(const Tensor& from) const;
    /// Elements [begin, begin + count) of flat ones; the same elements in another shape.
    Master narrow(int64_t begin, int64_t count) const;
    Master view(at::IntArrayRef shape) const;
};
}  // namespace moe
