// For tests that need a GPU: `if (!moe::test::has_gpu()) return;` as their first line.
#pragma once
#include <ATen/Context.h>

#include <cstdio>

namespace moe::test {
/// Whether this build has CUDA parts and the machine a device; prints "skipped: no GPU" where not.
inline bool has_gpu() {
#ifdef MOE_WITH_CUDA
    if (at::hasCUDA() && at::getNumGPUs() > 0) return true;
#endif
    std::puts("skipped: no GPU");
    return false;
}
}  // namespace moe::test
