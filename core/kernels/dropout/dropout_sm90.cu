// A thread draws four columns of a row: the words of core/base/random.h, bit for bit. Letters: R rows, C columns.
#include "core/kernels/dropout/dropout_sm90.h"

#include "core/kernels/common/device_sm90.cuh"

namespace moe::kernels::sm90 {
namespace {
constexpr int kThreads = 256;

struct Words { uint32_t at[4]; };

/// Philox 4x32-10, as in core/base/random.h.
__device__ inline Words draw(const Draws& p, int64_t row, uint32_t block) {
    const auto number = uint64_t(p.first + row / p.group * p.stride + row % p.group);
    uint32_t c0 = uint32_t(number), c1 = p.step, c2 = p.layer | block << 16, c3 = p.purpose | uint32_t(number >> 32) << 20;
    uint32_t k0 = uint32_t(p.seed), k1 = uint32_t(p.seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint32_t ah = __umulhi(0xD2511F53u, c0), al = 0xD2511F53u * c0, bh = __umulhi(0xCD9E8D57u, c2), bl = 0xCD9E8D57u * c2;
        c0 = bh ^ c1 ^ k0, c1 = bl, c2 = ah ^ c3 ^ k1, c3 = al;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

template <class T> __global__ void mask_kernel(Draws p, uint32_t threshold, T keep) {
    const int64_t blocks = (p.C + 3) / 4;
    for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < p.R * blocks; i += int64_t(gridDim.x) * blockDim.x) {
        const int64_t row = i / blocks, column = i % blocks * 4;
        const Words words = draw(p, row, uint32_t(column / 4));
        T* out = static_cast<T*>(p.out) + row * p.C + column;
        for (int k = 0; k < 4 && column + k < p.C; ++k) out[k] = words.at[k] < threshold ? T(0) : keep;
    }
}

template <class T> __global__ void normal_kernel(Draws p) {
    const int64_t blocks = (p.C + 3) / 4;
    for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < p.R * blocks; i += int64_t(gridDim.x) * blockDim.x) {
        const int64_t row = i / blocks, column = i % blocks * 4;
        const Words words = draw(p, row, uint32_t(column / 4));
        T* out = static_cast<T*>(p.out) + row * p.C + column;
        for (int k = 0; k < 4 && column + k < p.C; k += 2) {
            const double radius = sqrt(-2 * log((words.at[k] + 1.0) * 0x1p-32));
            double s, c;
            sincospi(2 * (words.at[k + 1] * 0x1p-32), &s, &c);
            out[k] = T(radius * c);
            if (column + k + 1 < p.C) out[k + 1] = T(radius * s);
        }
    }
}
}  // namespace

cudaError_t dropout_mask(const Draws& p, uint32_t threshold, double keep, cudaStream_t stream) {
    if (p.R == 0 || p.C == 0) return cudaSuccess;
    const unsigned blocks = loop_blocks(p.R * ((p.C + 3) / 4), kThreads);
    if (p.fp64) mask_kernel<double><<<blocks, kThreads, 0, stream>>>(p, threshold, keep);
    else mask_kernel<float><<<blocks, kThreads, 0, stream>>>(p, threshold, float(keep));
    return cudaGetLastError();
}

cudaError_t normal_rows(const Draws& p, cudaStream_t stream) {
    if (p.R == 0 || p.C == 0) return cudaSuccess;
    const unsigned blocks = loop_blocks(p.R * ((p.C + 3) / 4), kThreads);
    if (p.fp64) normal_kernel<double><<<blocks, kThreads, 0, stream>>>(p);
    else normal_kernel<float><<<blocks, kThreads, 0, stream>>>(p);
    return cudaGetLastError();
}
}  // namespace moe::kernels::sm90
