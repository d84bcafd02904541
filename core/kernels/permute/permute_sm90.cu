// Letters as in permute_sm90.h.
#include "core/kernels/permute/permute_sm90.h"

#include "core/kernels/quantize/rows_sm90.cuh"

namespace moe::kernels::sm90 {
namespace {
constexpr int kThreads = 256;

/// counts[chunk][e] = pairs of the chunk with expert e.
__global__ void count_kernel(SortPairs p) {
    extern __shared__ int count[];         // [E]
    for (int e = threadIdx.x; e < p.E; e += blockDim.x) count[e] = 0;
    __syncthreads();
    const int64_t first = int64_t(blockIdx.x) * kSortChunk;
    for (int i = threadIdx.x; i < kSortChunk && first + i < p.pairs; i += blockDim.x) {
        const int64_t id = p.ids[first + i];
        if (id >= 0 && id < p.E) atomicAdd(&count[id], 1);
    }
    __syncthreads();
    for (int e = threadIdx.x; e < p.E; e += blockDim.x) p.counts[int64_t(blockIdx.x) * p.E + e] = count[e];
}

/// One block. counts[chunk][e] becomes the first row of expert e's pairs of this chunk.
__global__ void scan_kernel(SortPairs p, int chunks) {
    extern __shared__ int start[];         // [E]: pairs of each expert, then its first row
    for (int e = threadIdx.x; e < p.E; e += blockDim.x) {
        int sum = 0;
        #pragma unroll 8
        for (int c = 0; c < chunks; ++c) sum += p.counts[int64_t(c) * p.E + e];
        start[e] = sum;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        int row = 0;
        for (int e = 0; e < p.E; ++e) {
            const int n = start[e];
            start[e] = row;
            p.offsets[e] = row;
            row += (n + p.align - 1) / p.align * p.align;
        }
        p.offsets[p.E] = row;
    }
    __syncthreads();
    for (int e = threadIdx.x; e < p.E; e += blockDim.x) {
        int row = start[e];
        #pragma unroll 8
        for (int c = 0; c < chunks; ++c) {
            int& count = p.counts[int64_t(c) * p.E + e];
            const int n = count;
            count = row;
            row += n;
        }
    }
}

/// One warp a chunk walks it in order, 32 pairs at a time: equal ids of a step rank by lane, so the sort is stable.
__global__ void place_kernel(SortPairs p) {
    extern __shared__ int next[];          // [E]
    const int lane = threadIdx.x;
    for (int e = lane; e < p.E; e += 32) next[e] = p.counts[int64_t(blockIdx.x) * p.E + e];
    __syncwarp();
    const int64_t first = int64_t(blockIdx.x) * kSortChunk;
    for (int step = 0; step < kSortChunk / 32; ++step) {
        const int64_t pair = first + step * 32 + lane;
        int e = -1;
        if (pair < p.pairs) {
            const int64_t id = p.ids[pair];
            if (id >= 0 && id < p.E) e = int(id);
        }
        const unsigned same = __match_any_sync(0xffffffffu, e);
        const int rank = __popc(same & ((1u << lane) - 1));
        const int row = e >= 0 ? next[e] + rank : -1;
        __syncwarp();
        if (e >= 0 && rank == 0) next[e] += __popc(same);
        __syncwarp();
        if (pair < p.pairs) p.position[pair] = row;
        if (e >= 0) {
            p.token[row] = int(pair / p.K);
            p.choice[row] = int(pair % p.K);
        }
    }
}

template <class T, int N> __global__ void gather_kernel(const T* x, const int* token, int64_t D, T* y) {
    const int64_t row = blockIdx.x;
    const int from = token[row];
    x += int64_t(from) * D, y += row * D;
    if (from < 0) {
        const Vector<T, N> zeros{};
        for (int64_t i = threadIdx.x * N; i < D; i += int64_t(blockDim.x) * N) store<N>(y + i, zeros);
        return;
    }
    for (int64_t i = threadIdx.x * N; i < D; i += int64_t(blockDim.x) * N) store<N>(y + i, load<N>(x + i));
}

template <class T, int N> __global__ void add_kernel(const T* base, const T* more, const T* y, const int* position, int K, int64_t D, T* out) {
    using W = Wide<T>;
    const int64_t token = blockIdx.x;
    position += token * K;
    for (int64_t i = threadIdx.x * N; i < D; i += int64_t(blockDim.x) * N) {
        W sum[N] = {};
        if (base) {
            auto b = load<N>(base + token * D + i);
            for (int k = 0; k < N; ++k) sum[k] = widen(b.at[k]);
        }
        if (more) {
            auto m = load<N>(more + token * D + i);
            for (int k = 0; k < N; ++k) sum[k] += widen(m.at[k]);
        }
        #pragma unroll 8
        for (int choice = 0; choice < K; ++choice) {
            const int row = position[choice];
            if (row < 0) continue;
            auto v = load<N>(y + int64_t(row) * D + i);
            for (int k = 0; k < N; ++k) sum[k] += widen(v.at[k]);
        }
        Vector<T, N> v;
        for (int k = 0; k < N; ++k) v.at[k] = narrow<T>(sum[k]);
        store<N>(out + token * D + i, v);
    }
}

template <class T> __global__ void gather_weights_kernel(const T* weights, const int* token, const int* choice, int64_t R, int K, T* rows) {
    for (int64_t r = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; r < R; r += int64_t(gridDim.x) * blockDim.x)
        rows[r] = token[r] < 0 ? narrow<T>(Wide<T>(0)) : weights[int64_t(token[r]) * K + choice[r]];
}
template <class T> __global__ void scatter_weights_kernel(const T* rows, const int* position, int64_t pairs, T* weights) {
    for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < pairs; i += int64_t(gridDim.x) * blockDim.x)
        weights[i] = position[i] >= 0 ? rows[position[i]] : narrow<T>(Wide<T>(0));
}

/// The same with the rows' E4M3 copy, padding included.
template <class T, int N> __global__ void gather_copy_kernel(const T* x, const int* token, int64_t D, T* y, RowsCopy copy) {
    const int64_t row = blockIdx.x;
    const int from = token[row];
    x += int64_t(from) * D, y += row * D;
    for (int64_t i = threadIdx.x * N; i < end_of_row<true, N>(D); i += int64_t(blockDim.x) * N) {
        const bool inside = i < D;
        const Vector<T, N> v = inside && from >= 0 ? load<N>(x + i) : Vector<T, N>{};
        if (inside) store<N>(y + i, v);
        copy_part(v, inside, row, i, D, copy);
    }
}

template <class T, int N> void launch_gather(const Rows& p, cudaStream_t stream) {
    if constexpr (kCanCopy<T, N>) {
        if (p.copy.q) {
            gather_copy_kernel<T, N><<<unsigned(p.R), row_threads(p.D / N, kThreads), 0, stream>>>(static_cast<const T*>(p.in), p.token, p.D, static_cast<T*>(p.out), p.copy);
            return;
        }
    }
    gather_kernel<T, N><<<unsigned(p.R), row_threads(p.D / N, kThreads), 0, stream>>>(static_cast<const T*>(p.in), p.token, p.D, static_cast<T*>(p.out));
}
template <class T, int N> void launch_add(const Rows& p, cudaStream_t stream) {
    add_kernel<T, N><<<unsigned(p.T), row_threads(p.D / N, kThreads), 0, stream>>>(
        static_cast<const T*>(p.base), static_cast<const T*>(p.more), static_cast<const T*>(p.in), p.position, p.K, p.D, static_cast<T*>(p.out));
}
}  // namespace

cudaError_t sort_pairs(const SortPairs& p, cudaStream_t stream) {
    if (p.pairs == 0) return cudaSuccess;
    const unsigned chunks = unsigned(sort_chunks(p.pairs));
    const size_t shared = size_t(p.E) * sizeof(int);
    if (auto error = cudaMemsetAsync(p.token, 0xff, p.rows * sizeof(int), stream); error != cudaSuccess) return error;      // -1
    count_kernel<<<chunks, kThreads, shared, stream>>>(p);
    if (auto error = cudaGetLastError(); error != cudaSuccess) return error;
    scan_kernel<<<1, row_threads(p.E, 1024), shared, stream>>>(p, int(chunks));
    if (auto error = cudaGetLastError(); error != cudaSuccess) return error;
    place_kernel<<<chunks, 32, shared, stream>>>(p);
    return cudaGetLastError();
}

cudaError_t gather_rows(const Rows& p, cudaStream_t stream) {
    if (p.R == 0 || p.D == 0) return cudaSuccess;
    by_dtype(p.dtype, [&](auto zero) {
        using T = decltype(zero);
        if (p.D % kVector<T> == 0 && aligned({p.in, p.out})) launch_gather<T, kVector<T>>(p, stream);
        else launch_gather<T, 1>(p, stream);
    });
    return cudaGetLastError();
}

cudaError_t add_rows(const Rows& p, cudaStream_t stream) {
    if (p.T == 0 || p.D == 0) return cudaSuccess;
    by_dtype(p.dtype, [&](auto zero) {
        using T = decltype(zero);
        if (p.D % kVector<T> == 0 && aligned({p.in, p.base, p.more, p.out})) launch_add<T, kVector<T>>(p, stream);
        else launch_add<T, 1>(p, stream);
    });
    return cudaGetLastError();
}

cudaError_t gather_weights(const Rows& p, cudaStream_t stream) {
    if (p.R == 0) return cudaSuccess;
    by_dtype(p.dtype, [&](auto zero) {
        using T = decltype(zero);
        gather_weights_kernel<<<loop_blocks(p.R, kThreads), kThreads, 0, stream>>>(static_cast<const T*>(p.in), p.token, p.choice, p.R, p.K, static_cast<T*>(p.out));
    });
    return cudaGetLastError();
}

cudaError_t scatter_weights(const Rows& p, cudaStream_t stream) {
    if (p.T * p.K == 0) return cudaSuccess;
    by_dtype(p.dtype, [&](auto zero) {
        using T = decltype(zero);
        scatter_weights_kernel<<<loop_blocks(p.T * p.K, kThreads), kThreads, 0, stream>>>(static_cast<const T*>(p.in), p.position, p.T * p.K, static_cast<T*>(p.out));
    });
    return cudaGetLastError();
}
}  // namespace moe::kernels::sm90
