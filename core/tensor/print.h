// Tensors as text, as the shell shows them.
#pragma once
#include <ATen/core/Tensor.h>

#include <string>

namespace moe {
using at::Tensor;

/// A header line with dtype, shape and device, then at most 8 rows of 8 values (the first and last three where there are
/// more; of a tensor of more than two dims the first matrix). An undefined tensor is "undefined". Copies the values shown to
/// the host. No newline at the end.
std::string to_text(const Tensor& t);

}  // namespace moe
