// The quantisation of rows for device code: what rows_kernel does, and kernels that make rows in passing.
#pragma once
#include "core/kernels/common/device_sm90.cuh"
#include "core/kernels/quantize/quantize_sm90.h"

#include <cuda_fp8.h>

namespace moe::kernels::sm90 {
constexpr int kScaleColumns = 128, kCopyPart = 8;        // elements that share a scale along a row; elements of one thread, side by side

struct RowScale { float scale, inverse; };
/// Of the bits of the largest |x|. As integers they are in the order of the values, with infinity above all and NaN above that: a maximum that loses neither.
__device__ inline RowScale scale_of(unsigned bits) {
    const float largest = __uint_as_float(bits), scale = largest < 0x1p-100f ? 1.f : largest / 448.f;
    return {scale, 1.f / scale};
}
/// Two and eight values times `inverse`, the first lowest.
__device__ inline unsigned to_e4m3(float low, float high, float inverse) { return __nv_cvt_float2_to_fp8x2(make_float2(low * inverse, high * inverse), __NV_SATFINITE, __NV_E4M3); }
__device__ inline uint2 to_e4m3(const float (&at)[kCopyPart], float inverse) {
    unsigned pair[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) pair[i] = to_e4m3(at[2 * i], at[2 * i + 1], inverse);
    return make_uint2(pair[0] | pair[1] << 16, pair[2] | pair[3] << 16);
}

/// |x| of two bf16 as integers, the lower 15 bits of each, for __vmaxu2; and the bits of the larger as those of an fp32.
__device__ inline unsigned sizes_of(unsigned two) { return two & 0x7fff7fffu; }
__device__ inline unsigned larger_of(unsigned sizes) { return max(sizes & 0xffff0000u, sizes << 16); }

/// Writes the copy of 8 values of a row from `column` on, a multiple of 8. All lanes of a warp call it together: 16 of them side by side, from a lane that is a multiple of 16, hold a block of
/// columns that share a scale. Lanes past the row's end are not `inside`: theirs is not written, and does not count. The columns of a block must start at a multiple of 128.
template <class T> __device__ inline void copy_part(const Vector<T, kCopyPart>& v, bool inside, int64_t row, int64_t column, int64_t columns, const RowsCopy& to) {
    static_assert(std::is_same_v<T, __nv_bfloat16>);
    uint4 words = reinterpret_cast<const uint4&>(v);
    unsigned two = inside ? __vmaxu2(__vmaxu2(sizes_of(words.x), sizes_of(words.y)), __vmaxu2(sizes_of(words.z), sizes_of(words.w))) : 0;
#pragma unroll
    for (int lane = 8; lane; lane /= 2) two = __vmaxu2(two, __shfl_xor_sync(0xffffffffu, two, lane));
    const RowScale s = scale_of(larger_of(two));
    if (!inside) return;
    float at[kCopyPart];
#pragma unroll
    for (int i = 0; i < kCopyPart; ++i) at[i] = widen(v.at[i]);
    static_cast<uint2*>(to.q)[(row * columns + column) / kCopyPart] = to_e4m3(at, s.inverse);
    if (threadIdx.x % 16 == 0) to.scales[column / kScaleColumns * to.pitch + row] = s.scale;
}
/// For kernels whose threads take N elements of T at a time; only bf16 by 16 bytes can have a copy.
template <class T, int N> constexpr bool kCanCopy = std::is_same_v<T, __nv_bfloat16> && N == kCopyPart;
/// Where a loop `for (i = threadIdx.x * N; i < end; …)` over a row of n ends: with a copy all lanes of a warp take part as long as one is inside.
template <bool copy, int N> __device__ inline int64_t end_of_row(int64_t n) { return copy ? n + int64_t(threadIdx.x % 32) * N : n; }
}  // namespace moe::kernels::sm90
