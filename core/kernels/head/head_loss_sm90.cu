// Where a gradient is wanted, a row lies in the shared memory of a cluster of blocks, and logits are read once; else, or where it does not fit, one block a row reads it.
#include "core/kernels/head/head_loss_sm90.h"

#include "core/kernels/common/device_sm90.cuh"

#include <cooperative_groups.h>

namespace moe::kernels::sm90 {
namespace {
constexpr int kMostThreads = 1024, kKeptThreads = 256;
constexpr int kAhead = 4;                  // reads that a thread has under way

__device__ inline float exponential(float x) { return expf(x); }
__device__ inline double exponential(double x) { return exp(x); }
/// Where the result is rounded to 16 bits, that of the hardware, whose error is 2^-21 or, far from 0, |x| 2^-24.
template <class G, class W> __device__ inline W quick_exponential(W x) {
    if constexpr (sizeof(G) == 2 && sizeof(W) == 4) return __expf(x);
    else return exponential(x);
}
template <class W> __device__ constexpr W lowest();
template <> __device__ constexpr float lowest<float>() { return -3.402823466e+38f; }
template <> __device__ constexpr double lowest<double>() { return -1.7976931348623157e+308; }

template <class W> __device__ inline W block_max(W x) {
    __shared__ W part[32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    x = warp_max(x);
    __syncthreads();
    if (lane == 0) part[warp] = x;
    __syncthreads();
    return warp_max(lane < warps ? part[lane] : lowest<W>());
}

template <class W, class G> struct Row {
    const W* logits;
    G* dlogits;                            // null: only the loss is wanted
    double* loss;
    int64_t V, target;
    W scale;
};
/// Of block `row`.
template <class W, class G> __device__ inline Row<W, G> row_of(const CrossEntropy& p, int64_t row) {
    return {static_cast<const W*>(p.logits) + row * p.V, p.dlogits ? static_cast<G*>(p.dlogits) + row * p.V : nullptr, p.loss + row, p.V, p.targets[row],
            p.device_scale ? W(*p.device_scale) : W(p.scale)};
}
template <class W, class G> __device__ inline W picked(const Row<W, G>& r) { return r.target >= 0 && r.target < r.V ? r.logits[r.target] : W(NAN); }
template <class W, class G> __device__ inline W factor(const Row<W, G>& r, W sum) { return r.target >= 0 && r.target < r.V ? r.scale / sum : W(NAN); }
template <int N, class G> __device__ inline void write_zeros(G* d, int64_t first, int64_t end, int64_t step) {
    Vector<G, N> zero;
    for (int k = 0; k < N; ++k) zero.at[k] = narrow<G>(0.0f);
    for (int64_t i = first; i < end; i += step) store<N>(d + i, zero);
}

/// One block a row, read twice where there is a gradient.
template <class W, class G, int N> __global__ void __launch_bounds__(kMostThreads) reading_twice(CrossEntropy p) {
    const Row<W, G> r = row_of<W, G>(p, blockIdx.x);
    const int64_t first = threadIdx.x * N, step = int64_t(blockDim.x) * N;
    if (r.target == p.ignore) {            // the whole block takes this way
        if (threadIdx.x == 0) *r.loss = 0;
        if (r.dlogits) write_zeros<N>(r.dlogits, first, r.V, step);
        return;
    }
    const W chosen = picked(r);            // before the barriers: dlogits may overwrite it
    W top = lowest<W>(), sum = 0;
    for (int64_t i = first; i < r.V; i += step) {
        auto a = load<N>(r.logits + i);
        W most = a.at[0];
        for (int k = 1; k < N; ++k) most = a.at[k] > most ? a.at[k] : most;
        if (most > top) {
            sum *= exponential(top - most);
            top = most;
        }
        for (int k = 0; k < N; ++k) sum += exponential(a.at[k] - top);
    }
    const W all = block_max(top);
    sum = block_sum(sum * exponential(top - all));
    if (threadIdx.x == 0) *r.loss = log(double(sum)) + double(all) - double(chosen);
    if (!r.dlogits) return;
    const W f = factor(r, sum);
    for (int64_t i = first; i < r.V; i += step) {
        auto a = load<N>(r.logits + i);
        Vector<G, N> d;
        for (int k = 0; k < N; ++k) d.at[k] = narrow<G>(exponential(a.at[k] - all) * f - (i + k == r.target ? r.scale : W(0)));
        store<N>(r.dlogits + i, d);
    }
}

/// combine(of every block of the cluster, in their order). `mine` is shared memory.
template <class W, class Combine> __device__ inline W over_cluster(W* mine, W value, int parts, Combine combine) {
    auto cluster = cooperative_groups::this_cluster();
    if (threadIdx.x == 0) *mine = value;
    cluster.sync();
    W all = *cluster.map_shared_rank(mine, 0);
    for (int k = 1; k < parts; ++k) all = combine(all, *cluster.map_shared_rank(mine, k));
    return all;
}

/// A cluster of `parts` blocks a row, each of which keeps `size` elements in shared memory: logits, then their exponentials.
template <class W, class G, int N> __global__ void __launch_bounds__(kKeptThreads) reading_once(CrossEntropy p, int parts, int64_t size) {
    extern __shared__ __align__(16) unsigned char memory[];
    __shared__ W part_top, part_sum;
    const int64_t part = blockIdx.x % parts, begin = part * size, step = int64_t(blockDim.x) * N, first = threadIdx.x * N;
    const Row<W, G> r = row_of<W, G>(p, blockIdx.x / parts);
    const int64_t end = min(r.V - begin, size);                          // may be below 0: nothing left
    const bool is_first = threadIdx.x == 0 && part == 0;
    W* kept = reinterpret_cast<W*>(memory);
    if (r.target == p.ignore) {                                          // the whole cluster takes this way
        if (is_first) *r.loss = 0;
        write_zeros<N>(r.dlogits + begin, first, end, step);
        return;
    }
    const W chosen = picked(r);
    W top = lowest<W>(), sum = 0;
    for (int64_t i = first; i < end; i += kAhead * step) {
        Vector<W, N> a[kAhead];
        #pragma unroll
        for (int j = 0; j < kAhead; ++j)
            if (i + j * step < end) a[j] = load<N>(r.logits + begin + i + j * step);
        #pragma unroll
        for (int j = 0; j < kAhead; ++j) {
            if (i + j * step >= end) break;
            store<N>(kept + i + j * step, a[j]);
            for (int k = 0; k < N; ++k) top = a[j].at[k] > top ? a[j].at[k] : top;
        }
    }
    top = over_cluster(&part_top, block_max(top), parts, [](W a, W b) { return a > b ? a : b; });
    for (int64_t i = first; i < end; i += step) {                        // every thread finds what it has written itself
        auto a = load<N>(kept + i);
        for (int k = 0; k < N; ++k) sum += a.at[k] = quick_exponential<G>(a.at[k] - top);
        store<N>(kept + i, a);
    }
    sum = over_cluster(&part_sum, block_sum(sum), parts, [](W a, W b) { return a + b; });
    if (is_first) *r.loss = log(double(sum)) + double(top) - double(chosen);
    const W f = factor(r, sum);
    for (int64_t i = first; i < end; i += step) {
        auto a = load<N>(kept + i);
        Vector<G, N> d;
        for (int k = 0; k < N; ++k) d.at[k] = narrow<G>(a.at[k] * f - (begin + i + k == r.target ? r.scale : W(0)));
        store<N>(r.dlogits + begin + i, d);
    }
    cooperative_groups::this_cluster().sync();                           // nobody leaves while others read its sums
}

template <class W, class G, int N> cudaError_t launch(const CrossEntropy& p, cudaStream_t stream) {
    // Several blocks to a multiprocessor, so that one reads while another computes and a third writes.
    constexpr int64_t kWantedKept = 56 * 1024 / sizeof(W), kMostKept = 110 * 1024 / sizeof(W);
    int parts = 1;
    while (parts < 8 && (p.V + parts - 1) / parts > kWantedKept) parts *= 2;
    const int64_t size = ((p.V + parts - 1) / parts + N - 1) / N * N;
    if (!p.dlogits || size > kMostKept) {
        reading_twice<W, G, N><<<unsigned(p.n), row_threads(p.V / N, kMostThreads), 0, stream>>>(p);
        return cudaGetLastError();
    }
    auto* function = reading_once<W, G, N>;
    if (auto error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, int(kMostKept * sizeof(W))); error != cudaSuccess) return error;
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {unsigned(parts), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(p.n * parts));
    config.blockDim = dim3(unsigned(row_threads(size / N, kKeptThreads)));
    config.dynamicSmemBytes = size_t(size) * sizeof(W);
    config.stream = stream;
    config.attrs = &cluster;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, function, p, parts, size);
}
template <class W, class G> cudaError_t by_width(const CrossEntropy& p, cudaStream_t stream) {
    const bool wide = p.V % kVector<W> == 0 && aligned({p.logits, p.dlogits});
    return wide ? launch<W, G, kVector<W>>(p, stream) : launch<W, G, 1>(p, stream);
}
}  // namespace

cudaError_t cross_entropy(const CrossEntropy& p, cudaStream_t stream) {
    if (p.n == 0 || p.V == 0) return cudaSuccess;
    cudaError_t error = cudaSuccess;
    by_wide_dtype(p.dtype, [&](auto zero) {
        using W = decltype(zero);
        if (p.dlogits_dtype == Dtype::bf16) error = by_width<W, __nv_bfloat16>(p, stream);
        else if (p.dlogits_dtype == Dtype::fp16) error = by_width<W, __half>(p, stream);
        else error = by_width<W, W>(p, stream);
    });
    return error;
}
}  // namespace moe::kernels::sm90
