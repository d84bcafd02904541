// One block a row. Letters: R rows, F width of gate and of up.
#include "core/kernels/swiglu/swiglu_sm90.h"

#include "core/kernels/quantize/rows_sm90.cuh"

namespace moe::kernels::sm90 {
namespace {
constexpr int kMostThreads = 256;

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
__device__ inline double sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }

template <class T, int N, bool copied> __global__ void forward_kernel(const T* gate_up, RowScalar row_weight, int64_t F, T* y, RowsCopy copy) {
    using W = Wide<T>;
    const int64_t row = blockIdx.x;
    const T *gate = gate_up + row * 2 * F, *up = gate + F;
    const W weight = W(row_weight[row]);
    for (int64_t i = threadIdx.x * N; i < end_of_row<copied, N>(F); i += int64_t(blockDim.x) * N) {
        Vector<T, N> g{};
        const bool inside = !copied || i < F;
        if (inside) {
            g = load<N>(gate + i);
            auto u = load<N>(up + i);
            for (int k = 0; k < N; ++k) {
                const W x = widen(g.at[k]);
                g.at[k] = narrow<T>(x * sigmoid(x) * widen(u.at[k]) * weight);
            }
            store<N>(y + row * F + i, g);
        }
        if constexpr (copied) copy_part(g, inside, row, i, F, copy);
    }
}

/// How backward makes dgate_up's copy. by_halves: F is a multiple of 128, so no block of columns has values of both halves; by_row: the row is read again once it is whole, from the cache.
enum class Copied { no, by_halves, by_row };

/// silu'(x) = σ(x) · (1 + x · (1 − σ(x))).
template <class T, int N, Copied copied>
__global__ void backward_kernel(const T* dy, const T* gate_up, RowScalar row_weight, int64_t F, T* dgate_up, void* drow_weight, RowsCopy copy) {
    using W = Wide<T>;
    const int64_t row = blockIdx.x;
    const T *gate = gate_up + row * 2 * F, *up = gate + F;
    T *dgate = dgate_up + row * 2 * F, *dup = dgate + F;
    const W weight = W(row_weight[row]);
    W dot = 0;
    for (int64_t i = threadIdx.x * N; i < end_of_row<copied == Copied::by_halves, N>(F); i += int64_t(blockDim.x) * N) {
        Vector<T, N> g{}, u{};
        const bool inside = copied != Copied::by_halves || i < F;
        if (inside) {
            auto d = load<N>(dy + row * F + i);
            g = load<N>(gate + i), u = load<N>(up + i);
            for (int k = 0; k < N; ++k) {
                const W x = widen(g.at[k]), v = widen(u.at[k]), s = sigmoid(x), grad = widen(d.at[k]);
                dot += grad * x * s * v;
                g.at[k] = narrow<T>(grad * weight * v * s * (1 + x * (1 - s)));
                u.at[k] = narrow<T>(grad * weight * x * s);
            }
            store<N>(dgate + i, g);
            store<N>(dup + i, u);
        }
        if constexpr (copied == Copied::by_halves) {
            copy_part(g, inside, row, i, 2 * F, copy);
            copy_part(u, inside, row, F + i, 2 * F, copy);
        }
    }
    if constexpr (copied == Copied::by_row) {
        __syncthreads();
        for (int64_t i = threadIdx.x * N; i < end_of_row<true, N>(2 * F); i += int64_t(blockDim.x) * N) {
            const bool inside = i < 2 * F;
            copy_part(inside ? load<N>(dgate + i) : Vector<T, N>{}, inside, row, i, 2 * F, copy);
        }
    }
    if (!drow_weight) return;              // the same for the whole grid, so the barriers of block_sum are safe
    dot = block_sum(dot);
    if (threadIdx.x) return;
    if (row_weight.fp64) static_cast<double*>(drow_weight)[row] = dot;
    else static_cast<float*>(drow_weight)[row] = float(dot);
}

template <class T, int N> cudaError_t launch_forward(const SwiGlu& p, cudaStream_t stream) {
    auto launch = [&](auto kernel) {
        kernel<<<unsigned(p.R), row_threads(p.F / N, kMostThreads), 0, stream>>>(
            static_cast<const T*>(p.gate_up), RowScalar{p.row_weight, p.row_weight_fp64}, p.F, static_cast<T*>(p.y), p.copy);
        return cudaGetLastError();
    };
    if constexpr (kCanCopy<T, N>)
        if (p.copy.q) return launch(forward_kernel<T, N, true>);
    return launch(forward_kernel<T, N, false>);
}
template <class T, int N> cudaError_t launch_backward(const SwiGlu& p, cudaStream_t stream) {
    auto launch = [&](auto kernel) {
        kernel<<<unsigned(p.R), row_threads(p.F / N, kMostThreads), 0, stream>>>(
            static_cast<const T*>(p.dy), static_cast<const T*>(p.gate_up), RowScalar{p.row_weight, p.row_weight_fp64}, p.F,
            static_cast<T*>(p.dgate_up), p.drow_weight, p.copy);
        return cudaGetLastError();
    };
    if constexpr (kCanCopy<T, N>)
        if (p.copy.q) return p.F % kScaleColumns == 0 ? launch(backward_kernel<T, N, Copied::by_halves>) : launch(backward_kernel<T, N, Copied::by_row>);
    return launch(backward_kernel<T, N, Copied::no>);
}
}  // namespace

cudaError_t swiglu_forward(const SwiGlu& p, cudaStream_t stream) {
    if (p.R == 0 || p.F == 0) return cudaSuccess;
    cudaError_t error = cudaSuccess;
    by_dtype(p.dtype, [&](auto zero) {
        using T = decltype(zero);
        const bool wide = p.F % kVector<T> == 0 && aligned({p.gate_up, p.y});
        error = wide ? launch_forward<T, kVector<T>>(p, stream) : launch_forward<T, 1>(p, stream);
    });
    return error;
}

cudaError_t swiglu_backward(const SwiGlu& p, cudaStream_t stream) {
    if (p.R == 0 || p.F == 0) return cudaSuccess;
    cudaError_t error = cudaSuccess;
    by_dtype(p.dtype, [&](auto zero) {
        using T = decltype(zero);
        const bool wide = p.F % kVector<T> == 0 && aligned({p.gate_up, p.dy, p.dgate_up});
        error = wide ? launch_backward<T, kVector<T>>(p, stream) : launch_backward<T, 1>(p, stream);
    });
    return error;
}
}  // namespace moe::kernels::sm90
