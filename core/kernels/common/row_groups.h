// Rows sorted by group: what the grouped products and the sort that feeds them share.
#pragma once
#include <ATen/core/Tensor.h>

namespace moe::kernels {

/// Rows offsets[e] … offsets[e+1] belong to group e; offsets[0] = 0.
struct RowGroups {
    at::Tensor offsets_E1;       ///< [E + 1]: int64 on the host, or int32 on the device, whose values the host never reads
    int64_t align = 1;           ///< every offset is a multiple of it

    RowGroups() = default;
    RowGroups(at::Tensor offsets, int64_t alignment = 1) : offsets_E1(std::move(offsets)), align(alignment) {}
    int64_t size() const { return offsets_E1.numel() - 1; }
};

}  // namespace moe::kernels
