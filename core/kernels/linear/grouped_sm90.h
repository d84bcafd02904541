// Launcher that grouped_linear's weight gradient needs.
#pragma once
#include "core/kernels/common/sm90.h"

namespace moe::kernels::sm90 {

/// sum [groups, size] += part [groups, size] for every group g with ends[g] > ends[g − 1] (ends[−1] is `first`); the part of an
/// empty group is not read.
struct AddGroups {
    int64_t groups, size;
    int first;
    const int* ends;              ///< [groups] on the device
    const void* part;             ///< bf16
    void* sum;
    Dtype sum_dtype;              ///< fp32, fp64 or bf16
};
cudaError_t add_groups(const AddGroups& p, cudaStream_t stream);

}  // namespace moe::kernels::sm90
