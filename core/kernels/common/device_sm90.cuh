// Device side helpers of all ops: vectors of 16 bytes, conversions, sums over a warp or block in a fixed order, and dispatch
// by dtype on the host. Sums are in float for fp32, bf16 and fp16, in double for fp64.
#pragma once
#include "core/kernels/common/sm90.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

namespace moe::kernels::sm90 {

template <class T> struct WideOf { using type = T; };
template <> struct WideOf<__nv_bfloat16> { using type = float; };
template <> struct WideOf<__half> { using type = float; };
template <class T> using Wide = typename WideOf<T>::type;

__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }

template <class T, class W> __device__ inline T narrow(W x) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16(float(x));
    else if constexpr (std::is_same_v<T, __half>) return __float2half(float(x));
    else return T(x);
}

template <class T, int N> struct alignas(sizeof(T) * N) Vector { T at[N]; };
template <int N, class T> __device__ inline Vector<T, N> load(const T* p) { return *reinterpret_cast<const Vector<T, N>*>(p); }
template <int N, class T> __device__ inline void store(T* p, const Vector<T, N>& v) { *reinterpret_cast<Vector<T, N>*>(p) = v; }

/// Elements in 16 bytes.
template <class T> constexpr int kVector = 16 / sizeof(T);

inline bool aligned(std::initializer_list<const void*> pointers, size_t bytes = 16) {
    for (const void* p : pointers)
        if (reinterpret_cast<uintptr_t>(p) % bytes) return false;
    return true;
}

template <class W> __device__ inline W warp_sum(W x) {
    for (int lane = 16; lane; lane /= 2) x += __shfl_xor_sync(0xffffffffu, x, lane);
    return x;
}
template <class W> __device__ inline W warp_max(W x) {
    for (int lane = 16; lane; lane /= 2) {
        W y = __shfl_xor_sync(0xffffffffu, x, lane);
        x = x > y ? x : y;
    }
    return x;
}

/// The sum over a block of whole warps (at most 32), the same value on every thread. Two barriers: may be called in a loop.
template <class W> __device__ inline W block_sum(W x) {
    __shared__ W part[32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    x = warp_sum(x);
    __syncthreads();                       // readers of an earlier call are done
    if (lane == 0) part[warp] = x;
    __syncthreads();
    return warp_sum(lane < warps ? part[lane] : W(0));
}

/// Threads of a block that walks a row of n items: whole warps, at most `most`.
inline int row_threads(int64_t n, int most) { return int(std::clamp<int64_t>((n + 31) / 32 * 32, 32, most)); }
/// Blocks of a grid-stride loop over n items.
inline unsigned loop_blocks(int64_t n, int threads, int64_t most = 132 * 16) { return unsigned(std::min<int64_t>((n + threads - 1) / threads, most)); }

/// f(T{}) for the dtype.
template <class F> void by_dtype(Dtype dtype, F f) {
    if (dtype == Dtype::fp32) f(float{});
    else if (dtype == Dtype::fp64) f(double{});
    else if (dtype == Dtype::fp16) f(__half{});
    else f(__nv_bfloat16{});
}
/// The same for main gradients: fp32, fp64 or bf16.
template <class F> void by_main_dtype(Dtype dtype, F f) {
    if (dtype == Dtype::fp32) f(float{});
    else if (dtype == Dtype::fp64) f(double{});
    else f(__nv_bfloat16{});
}
template <class F> void by_wide_dtype(Dtype dtype, F f) {
    if (dtype == Dtype::fp64) f(double{});
    else f(float{});
}

/// A row's weight: fp32 or fp64 behind a void pointer, or 1.
struct RowScalar {
    const void* data;
    bool fp64;
    __device__ double operator[](int64_t row) const {
        if (!data) return 1;
        return fp64 ? static_cast<const double*>(data)[row] : static_cast<const float*>(data)[row];
    }
};
}  // namespace moe::kernels::sm90
