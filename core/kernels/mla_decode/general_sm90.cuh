// Any widths and dtypes, one block a row: for tests and small models, not for speed. Also the writing of new tokens into the cache.
#pragma once
#include "core/kernels/common/device_sm90.cuh"
#include "core/kernels/mla_decode/work_sm90.cuh"

#include <cuda_fp8.h>

namespace moe::kernels::sm90 {
constexpr int kScaleGroup = 128;        // values of an FP8 cache that share a scale

__host__ __device__ inline int64_t fp8_row_bytes(int L, int R) { return L + L / kScaleGroup * 4 + int64_t(2) * R; }

/// A cached token as numbers: elements 0 … L − 1 are the latent, then the rotated part.
template <class T> struct PlainRow {
    const T* at;
    int L;
    __device__ static PlainRow of(const MlaDecode& p, int64_t row) { return {static_cast<const T*>(p.rows) + row * (p.L + p.R), p.L}; }
    __device__ Wide<T> operator[](int d) const { return widen(at[d]); }
};
struct Fp8Row {
    const uint8_t* at;
    int L;
    __device__ static Fp8Row of(const MlaDecode& p, int64_t row) { return {static_cast<const uint8_t*>(p.rows) + row * fp8_row_bytes(p.L, p.R), p.L}; }
    __device__ float operator[](int d) const {
        if (d >= L) return widen(reinterpret_cast<const __nv_bfloat16*>(at + L + L / kScaleGroup * 4)[d - L]);
        __nv_fp8_e4m3 x;
        x.__x = at[d];
        return float(x) * reinterpret_cast<const float*>(at + L)[d / kScaleGroup];
    }
};

constexpr int kGeneralThreads = 128;

template <class T, class Row> __global__ void general_kernel(const __grid_constant__ MlaDecode p) {
    using W = Wide<T>;
    extern __shared__ double general_shared[];
    __shared__ W weights[kBlockTokens];
    W *query = reinterpret_cast<W*>(general_shared), *o = query + p.L + p.R;
    const int rows = p.Q * p.H, b = blockIdx.x / rows, r = blockIdx.x % rows, D = p.L + p.R, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int64_t token = int64_t(b) * p.Q + r / p.H, head = r % p.H;
    const T* latent = static_cast<const T*>(p.q_latent) + token * p.latent_token + head * p.latent_head;
    const T* rope = static_cast<const T*>(p.q_rope) + token * p.rope_token + head * p.rope_head;
    for (int d = threadIdx.x; d < D; d += kGeneralThreads) query[d] = widen(d < p.L ? latent[d] : rope[d - p.L]);
    for (int d = threadIdx.x; d < p.L; d += kGeneralThreads) o[d] = 0;
    const int length = Axis(p).length(b), limit = length - p.Q + 1 + r / p.H;
    W top = -W(INFINITY), sum = 0;
    for (int t0 = 0; t0 < limit; t0 += kBlockTokens) {
        const int n = min(kBlockTokens, limit - t0);
        const int64_t row0 = int64_t(p.block_table[int64_t(b) * p.M + t0 / kBlockTokens]) * kBlockTokens;
        __syncthreads();
        for (int t = warp; t < n; t += kGeneralThreads / 32) {
            const Row row = Row::of(p, row0 + t);
            W s = 0;
            for (int d = lane; d < D; d += 32) s += query[d] * W(row[d]);
            s = warp_sum(s);
            if (lane == 0) weights[t] = s * W(p.scale);
        }
        __syncthreads();
        W above = top;
        for (int t = 0; t < n; ++t) above = weights[t] > above ? weights[t] : above;
        const W keep = exp(top - above);
        top = above, sum *= keep;
        for (int t = 0; t < n; ++t) sum += exp(weights[t] - above);
        for (int d = threadIdx.x; d < p.L; d += kGeneralThreads) {
            W x = o[d] * keep;
            for (int t = 0; t < n; ++t) x += exp(weights[t] - above) * W(Row::of(p, row0 + t)[d]);
            o[d] = x;
        }
    }
    T* out = static_cast<T*>(p.out) + int64_t(blockIdx.x) * p.L;
    for (int d = threadIdx.x; d < p.L; d += kGeneralThreads) out[d] = narrow<T>(sum == 0 ? W(0) : o[d] / sum);        // a NaN stays one
    if (threadIdx.x == 0) static_cast<W*>(p.lse)[blockIdx.x] = sum == 0 ? -W(INFINITY) : top + log(sum);
}

inline cudaError_t general_decode(const MlaDecode& p, cudaStream_t stream) {
    cudaError_t error = cudaSuccess;
    by_dtype(p.dtype, [&](auto zero) {
        using T = decltype(zero);
        auto launch = [&](auto kernel) {
            const int shared = (2 * p.L + p.R) * int(sizeof(Wide<T>));
            if (shared > 40 * 1024) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
            if (error != cudaSuccess) return;
            kernel<<<unsigned(p.B) * p.Q * p.H, kGeneralThreads, shared, stream>>>(p);
            error = cudaGetLastError();
        };
        p.fp8 ? launch(general_kernel<T, Fp8Row>) : launch(general_kernel<T, PlainRow<T>>);
    });
    return error;
}

// ---- new tokens

/// One block a token, one warp 128 values; the last warps take the rotated part. Tokens with a place outside the cache are left out.
template <class T> __global__ void append_kernel(const __grid_constant__ AppendLatent p) {
    const int64_t t = blockIdx.x;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, b = p.sequence[t], position = p.position[t];
    if (b < 0 || b >= p.B || position < 0 || position >= p.M * kBlockTokens) return;
    const int64_t block = p.block_table[int64_t(b) * p.M + position / kBlockTokens];
    if (block < 0 || block >= p.N) return;
    const int64_t row = block * kBlockTokens + position % kBlockTokens;
    const T *latent = static_cast<const T*>(p.latent) + t * p.latent_stride, *rope = static_cast<const T*>(p.rope) + t * p.rope_stride;
    if (!p.fp8) {
        T* to = static_cast<T*>(p.rows) + row * (p.L + p.R);
        for (int d = threadIdx.x; d < p.L + p.R; d += blockDim.x) to[d] = d < p.L ? latent[d] : rope[d - p.L];
        return;
    }
    uint8_t* to = static_cast<uint8_t*>(p.rows) + row * fp8_row_bytes(p.L, p.R);
    const int groups = p.L / kScaleGroup;
    for (int group = warp; group < groups; group += blockDim.x / 32) {
        float x[4], top = 0;
        for (int i = 0; i < 4; ++i) {
            x[i] = float(widen(latent[group * kScaleGroup + lane * 4 + i]));
            top = fmaxf(top, fabsf(x[i]));
        }
        const float scale = fmaxf(__fdiv_rn(warp_max(top), 448.0f), 1.17549435e-38f);
        for (int i = 0; i < 4; ++i) to[group * kScaleGroup + lane * 4 + i] = __nv_cvt_float_to_fp8(__fdiv_rn(x[i], scale), __NV_SATFINITE, __NV_E4M3);
        if (lane == 0) *reinterpret_cast<float*>(to + p.L + group * 4) = scale;
    }
    __nv_bfloat16* to_rope = reinterpret_cast<__nv_bfloat16*>(to + p.L + groups * 4);
    for (int d = threadIdx.x; d < p.R; d += blockDim.x) to_rope[d] = narrow<__nv_bfloat16>(widen(rope[d]));
}

inline cudaError_t general_append(const AppendLatent& p, cudaStream_t stream) {
    by_dtype(p.dtype, [&](auto zero) { append_kernel<decltype(zero)><<<unsigned(p.T), 128, 0, stream>>>(p); });
    return cudaGetLastError();
}
}  // namespace moe::kernels::sm90
