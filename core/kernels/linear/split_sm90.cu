#include "core/kernels/linear/split_sm90.h"

#include "core/kernels/common/device_sm90.cuh"

namespace moe::kernels::sm90 {
namespace {
constexpr int kThreads = 256;

__global__ void kernel(Split p) {
    const int64_t n = p.rows * p.cols;
    for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x) {
        float left = p.x[i];
        const int64_t to = i / p.cols * p.stride + i % p.cols;
        for (int k = 0; k < 3; ++k) {
            const __nv_bfloat16 part = __float2bfloat16(left);
            left = isfinite(__bfloat162float(part)) ? left - __bfloat162float(part) : 0.0f;
            if (p.part[k]) static_cast<__nv_bfloat16*>(p.part[k])[to] = part;
        }
    }
}
}  // namespace

cudaError_t split(const Split& p, cudaStream_t stream) {
    if (p.rows * p.cols == 0) return cudaSuccess;
    kernel<<<loop_blocks(p.rows * p.cols, kThreads), kThreads, 0, stream>>>(p);
    return cudaGetLastError();
}
}  // namespace moe::kernels::sm90
