// One block a row; the second read of a row comes from L1. Letters: T tokens, D width, P parts of gamma's gradient.
#include "core/kernels/norm/rmsnorm_sm90.h"

#include "core/kernels/quantize/rows_sm90.cuh"

namespace moe::kernels::sm90 {
namespace {
constexpr int kMostThreads = 512;
constexpr int kSharedLimit = 224 * 1024;      // of the 227 KiB that a block may have; block_sum needs some

template <class T, int N, bool copied>
__global__ void forward_kernel(const T* x, const T* gamma, int64_t D, double eps, T* y, Wide<T>* rstd, RowsCopy copy) {
    using W = Wide<T>;
    const int64_t row = blockIdx.x;
    x += row * D, y += row * D;
    W sum = 0;
    for (int64_t i = threadIdx.x * N; i < D; i += int64_t(blockDim.x) * N) {
        auto a = load<N>(x + i);
        for (int k = 0; k < N; ++k) sum += widen(a.at[k]) * widen(a.at[k]);
    }
    const W r = W(1) / sqrt(block_sum(sum) / W(D) + W(eps));
    if (threadIdx.x == 0) rstd[row] = r;
    for (int64_t i = threadIdx.x * N; i < end_of_row<copied, N>(D); i += int64_t(blockDim.x) * N) {
        Vector<T, N> a{};
        const bool inside = !copied || i < D;
        if (inside) {
            a = load<N>(x + i);
            auto g = load<N>(gamma + i);
            for (int k = 0; k < N; ++k) a.at[k] = narrow<T>(widen(a.at[k]) * r * widen(g.at[k]));
            store<N>(y + i, a);
        }
        if constexpr (copied) copy_part(a, inside, row, i, D, copy);
    }
}

/// dx = rstd · (dy · gamma − x · rstd² · mean(dy · gamma · x)) + more, where there is more. Block p takes rows p, p + P, …; each thread adds to columns of
/// its own in shared memory, so gamma's gradient needs no barrier and no atomics. Column i + k lies at k · D/N + i/N: neighbours
/// in a warp are neighbours in a bank row.
template <class T, int N, bool copied>
__global__ void backward_kernel(const T* dy, const T* x, const T* gamma, const Wide<T>* rstd, const T* more, int64_t rows, int64_t D, T* dx, Wide<T>* partial, RowsCopy copy) {
    using W = Wide<T>;
    extern __shared__ double shared[];
    W* sums = reinterpret_cast<W*>(shared);
    const int64_t first = threadIdx.x * N, step = int64_t(blockDim.x) * N, groups = D / N;
    if (partial)
        for (int64_t i = first; i < D; i += step)
            for (int k = 0; k < N; ++k) sums[k * groups + i / N] = 0;
    for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
        const T *dy_row = dy + row * D, *x_row = x + row * D;
        const W r = rstd[row];
        W dot = 0;
        for (int64_t i = first; i < D; i += step) {
            auto d = load<N>(dy_row + i), a = load<N>(x_row + i), g = load<N>(gamma + i);
            for (int k = 0; k < N; ++k) dot += widen(d.at[k]) * widen(g.at[k]) * widen(a.at[k]);
        }
        const W scale = block_sum(dot) / W(D) * r * r;
        for (int64_t i = first; i < end_of_row<copied, N>(D); i += step) {
            Vector<T, N> d{};
            const bool inside = !copied || i < D;
            if (inside) {
                auto a = load<N>(x_row + i), g = load<N>(gamma + i);
                d = load<N>(dy_row + i);
                Vector<T, N> m{};
                if (more) m = load<N>(more + row * D + i);
                for (int k = 0; k < N; ++k) {
                    const W dw = widen(d.at[k]), aw = widen(a.at[k]);
                    if (partial) sums[k * groups + i / N] += dw * aw * r;
                    d.at[k] = narrow<T>(r * (dw * widen(g.at[k]) - aw * scale) + (more ? widen(m.at[k]) : W(0)));
                }
                store<N>(dx + row * D + i, d);
            }
            if constexpr (copied) copy_part(d, inside, row, i, D, copy);
        }
    }
    if (partial)
        for (int64_t i = first; i < D; i += step)
            for (int k = 0; k < N; ++k) partial[blockIdx.x * D + i + k] = sums[k * groups + i / N];
}

/// dgamma[i] += Σ_p partial[p][i]: 32 columns a block, 8 interleaved rows of threads, then those 8 in order.
template <class W, class G>
__global__ void sum_parts_kernel(const W* partial, int parts, int64_t D, G* dgamma) {
    __shared__ W rows[8][32];
    const int64_t i = int64_t(blockIdx.x) * 32 + threadIdx.x;
    W sum = 0;
    if (i < D)
        for (int p = threadIdx.y; p < parts; p += 8) sum += partial[p * D + i];
    rows[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y || i >= D) return;
    for (int k = 1; k < 8; ++k) sum += rows[k][threadIdx.x];
    dgamma[i] = narrow<G>(widen(dgamma[i]) + Wide<G>(sum));
}

template <class T, int N> cudaError_t launch_forward(const RmsNorm& p, cudaStream_t stream) {
    auto launch = [&](auto kernel) {
        kernel<<<unsigned(p.T), row_threads(p.D / N, kMostThreads), 0, stream>>>(
            static_cast<const T*>(p.x), static_cast<const T*>(p.gamma), p.D, p.eps, static_cast<T*>(p.y), static_cast<Wide<T>*>(p.rstd), p.copy);
        return cudaGetLastError();
    };
    if constexpr (kCanCopy<T, N>)
        if (p.copy.q) return launch(forward_kernel<T, N, true>);
    return launch(forward_kernel<T, N, false>);
}

template <class T, int N> cudaError_t launch_backward(const RmsNorm& p, cudaStream_t stream) {
    using W = Wide<T>;
    const int parts = rmsnorm_parts(p.T);
    const size_t shared = p.partial ? p.D * sizeof(W) : 0;
    auto launch = [&](auto kernel) {
        if (shared > 40 * 1024)
            if (auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)); error != cudaSuccess) return error;
        kernel<<<parts, row_threads(p.D / N, kMostThreads), shared, stream>>>(
            static_cast<const T*>(p.dy), static_cast<const T*>(p.x), static_cast<const T*>(p.gamma), static_cast<const W*>(p.rstd), static_cast<const T*>(p.more), p.T, p.D,
            static_cast<T*>(p.dx), static_cast<W*>(p.partial), p.copy);
        return cudaGetLastError();
    };
    auto launched = [&] {
        if constexpr (kCanCopy<T, N>)
            if (p.copy.q) return launch(backward_kernel<T, N, true>);
        return launch(backward_kernel<T, N, false>);
    };
    if (auto error = launched(); error != cudaSuccess || !p.partial) return error;
    const unsigned blocks = unsigned((p.D + 31) / 32);
    by_main_dtype(p.dgamma_dtype, [&](auto zero) {
        sum_parts_kernel<<<blocks, dim3(32, 8), 0, stream>>>(static_cast<const W*>(p.partial), parts, p.D, static_cast<decltype(zero)*>(p.dgamma));
    });
    return cudaGetLastError();
}
}  // namespace

int rmsnorm_parts(int64_t T) { return int(std::min<int64_t>(T, 528)); }      // four blocks on each of 132 multiprocessors
int64_t rmsnorm_widest(Dtype dtype) { return kSharedLimit / (dtype == Dtype::fp64 ? 8 : 4); }

cudaError_t rmsnorm_forward(const RmsNorm& p, cudaStream_t stream) {
    if (p.T == 0 || p.D == 0) return cudaSuccess;
    cudaError_t error = cudaSuccess;
    by_dtype(p.dtype, [&](auto zero) {
        using T = decltype(zero);
        const bool wide = p.D % kVector<T> == 0 && aligned({p.x, p.gamma, p.y});
        error = wide ? launch_forward<T, kVector<T>>(p, stream) : launch_forward<T, 1>(p, stream);
    });
    return error;
}

cudaError_t rmsnorm_backward(const RmsNorm& p, cudaStream_t stream) {
    if (p.T == 0 || p.D == 0) return cudaSuccess;
    cudaError_t error = cudaSuccess;
    by_dtype(p.dtype, [&](auto zero) {
        using T = decltype(zero);
        const bool wide = p.D % kVector<T> == 0 && aligned({p.x, p.gamma, p.dy, p.more, p.dx});
        error = wide ? launch_backward<T, kVector<T>>(p, stream) : launch_backward<T, 1>(p, stream);
    });
    return error;
}
}  // namespace moe::kernels::sm90
