// For *_cuda.cpp files whose kernels write the E4M3 copy of their rows.
#pragma once
#include "core/kernels/quantize/quantize_kernels.h"
#include "core/kernels/quantize/quantize_sm90.h"

#include <initializer_list>

namespace moe::kernels {
/// What a kernel that walks rows by 16 bytes is to fill: nothing where no copy is wanted or where `rows`, all that it reads and writes, do not start at multiples of 16 bytes or are no
/// whole number of them wide. Whoever calls it then fills the copy with fill_copy_cuda.
sm90::RowsCopy fused_copy(const QuantizedRows& copy, std::initializer_list<Tensor> rows);
}  // namespace moe::kernels
