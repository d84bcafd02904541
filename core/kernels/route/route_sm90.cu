#include "core/kernels/route/route_sm90.h"

#include "core/kernels/common/device_sm90.cuh"

#include <type_traits>

namespace moe::kernels::sm90 {
namespace {
constexpr int kWarps = 4;                              // tokens of a block
constexpr int kCountThreads = 256, kCountPairs = 4096; // threads and pairs of a block that counts
constexpr size_t kMostShared = 48 << 10;

/// NaN, then the larger, then the lower id: as on the CPU.
template <class T> __device__ bool before(T a, int i, T b, int j) {
    const bool a_nan = isnan(a), b_nan = isnan(b);
    if (a_nan || b_nan) return a_nan && (!b_nan || i < j);
    return a > b || (a == b && i < j);
}

/// The first of the lanes' (value, id) by `before`, on every lane.
template <class T> __device__ void first_of_warp(T& value, int& id) {
    for (int lane = 16; lane; lane /= 2) {
        const T other = __shfl_xor_sync(0xffffffffu, value, lane);
        const int other_id = __shfl_xor_sync(0xffffffffu, id, lane);
        if (before(other, other_id, value, id)) value = other, id = other_id;
    }
}

/// An id that was given may lie outside: its score is NaN, and it has no gradient.
__device__ bool is_expert(int64_t id, int E) { return id >= 0 && id < E; }
template <class T> __device__ T score_of(const T* scores, int64_t id, int E) { return is_expert(id, E) ? scores[id] : T(NAN); }

template <class T> __device__ T lowest() { return -T(INFINITY); }
constexpr int kNoId = 0x7fffffff;

/// One warp a token; lane l has experts l, l + 32, ….
template <class T, int N> __global__ void forward_kernel(RoutePass p) {
    extern __shared__ __align__(16) unsigned char shared[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t t = int64_t(blockIdx.x) * kWarps + warp;
    if (t >= p.T) return;
    T* row = reinterpret_cast<T*>(shared) + warp * (p.E + p.n_group);      // [E] choices, [G] groups
    T s[N], choice[N];
    const T* logits = static_cast<const T*>(p.logits) + t * p.E;
    const T factor = T(1 / p.temperature);
    #pragma unroll
    for (int j = 0; j < N; ++j) {
        const int e = lane + 32 * j;
        s[j] = e < p.E ? logits[e] * factor : lowest<T>();
    }
    if (p.softmax) {
        T largest = lowest<T>(), sum = 0;
        #pragma unroll
        for (int j = 0; j < N; ++j) largest = s[j] > largest ? s[j] : largest;
        largest = warp_max(largest);
        #pragma unroll
        for (int j = 0; j < N; ++j) sum += s[j] = lane + 32 * j < p.E ? exp(s[j] - largest) : T(0);
        sum = warp_sum(sum);
        #pragma unroll
        for (int j = 0; j < N; ++j) s[j] /= sum;
    } else {
        #pragma unroll
        for (int j = 0; j < N; ++j) s[j] = T(1) / (T(1) + exp(-s[j]));
    }
    T* scores = static_cast<T*>(p.scores) + t * p.E;
    const T* bias = static_cast<const T*>(p.bias);
    #pragma unroll
    for (int j = 0; j < N; ++j) {
        const int e = lane + 32 * j;
        if (e < p.E) scores[e] = s[j];
        choice[j] = e < p.E ? (bias ? s[j] + bias[e] : s[j]) : lowest<T>();
    }
    int64_t* ids = p.ids + t * p.K;
    if (p.choose) {
        if (p.n_group > 1) {
            const int per = p.E / p.n_group;
            #pragma unroll
            for (int j = 0; j < N; ++j)
                if (lane + 32 * j < p.E) row[lane + 32 * j] = choice[j];
            __syncwarp();
            T* group = row + p.E;
            for (int g = lane; g < p.n_group; g += 32) {
                T first = lowest<T>(), second = lowest<T>();
                int first_id = kNoId, second_id = kNoId;
                for (int i = 0; i < per; ++i) {
                    const T c = row[g * per + i];
                    if (before(c, i, first, first_id)) second = first, second_id = first_id, first = c, first_id = i;
                    else if (before(c, i, second, second_id)) second = c, second_id = i;
                }
                group[g] = p.best_two && per > 1 ? first + second : first;
            }
            __syncwarp();
            // A group is in where fewer than topk_group go before it.
            #pragma unroll
            for (int j = 0; j < N; ++j) {
                const int e = lane + 32 * j, g = e / per;
                if (e >= p.E) continue;
                int ahead = 0;
                for (int i = 0; i < p.n_group; ++i) ahead += i != g && before(group[i], i, group[g], g);
                if (ahead >= p.topk_group) choice[j] = lowest<T>();
            }
        }
        unsigned taken = 0;                            // bit j: this lane's expert j
        for (int k = 0; k < p.K; ++k) {
            T best = lowest<T>();
            int id = kNoId;
            #pragma unroll
            for (int j = 0; j < N; ++j) {
                const int e = lane + 32 * j;
                if (e < p.E && !(taken >> j & 1) && before(choice[j], e, best, id)) best = choice[j], id = e;
            }
            first_of_warp(best, id);
            if (id % 32 == lane) taken |= 1u << (id / 32);
            if (lane == 0) ids[k] = id;
        }
    }
    __syncwarp();                                      // what other lanes wrote to scores and ids is read
    T sum = 0;
    for (int k = lane; k < p.K; k += 32) sum += score_of(scores, ids[k], p.E);
    T scale = T(p.scale);
    if (p.norm_topk) scale /= warp_sum(sum) + T(1e-20);
    T* weights = static_cast<T*>(p.weights) + t * p.K;
    for (int k = lane; k < p.K; k += 32) weights[k] = score_of(scores, ids[k], p.E) * scale;
}

template <class T> __global__ void backward_kernel(RoutePass p) {
    extern __shared__ __align__(16) unsigned char shared[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t t = int64_t(blockIdx.x) * kWarps + warp;
    if (t >= p.T) return;
    T* ds = reinterpret_cast<T*>(shared) + warp * p.E;
    const T* scores = static_cast<const T*>(p.scores) + t * p.E;
    const T* dscores = p.dscores ? static_cast<const T*>(p.dscores) + t * p.E : nullptr;
    for (int e = lane; e < p.E; e += 32) ds[e] = dscores ? dscores[e] : T(0);
    __syncwarp();
    if (p.dweights) {
        const T* dw = static_cast<const T*>(p.dweights) + t * p.K;
        const int64_t* ids = p.ids + t * p.K;
        T n = 0, inner = 0;
        for (int k = lane; k < p.K && p.norm_topk; k += 32) n += score_of(scores, ids[k], p.E), inner += dw[k] * score_of(scores, ids[k], p.E);
        n = warp_sum(n) + T(1e-20);
        inner = warp_sum(inner);
        for (int k = lane; k < p.K; k += 32)
            if (is_expert(ids[k], p.E)) ds[ids[k]] += T(p.scale) * (p.norm_topk ? (dw[k] - inner / n) / n : dw[k]);      // ids are distinct
    }
    __syncwarp();
    T dot = 0;
    for (int e = lane; e < p.E && p.softmax; e += 32) dot += ds[e] * scores[e];
    if (p.softmax) dot = warp_sum(dot);
    T* dlogits = static_cast<T*>(p.dlogits) + t * p.E;
    const T factor = T(1 / p.temperature);
    for (int e = lane; e < p.E; e += 32) dlogits[e] = (p.softmax ? scores[e] * (ds[e] - dot) : ds[e] * scores[e] * (T(1) - scores[e])) * factor;
}

/// A block adds its pairs in shared memory where the counters fit, then once a counter to the sums.
__global__ void count_kernel(CountPairs p, bool in_shared) {
    extern __shared__ int count[];                     // [rows, E], then [E] dropped
    const int cells = p.rows * p.E, all = cells + (p.kept ? p.E : 0);
    auto* counts = reinterpret_cast<unsigned long long*>(p.counts);
    auto* dropped = reinterpret_cast<unsigned long long*>(p.dropped);
    if (in_shared) {
        for (int i = threadIdx.x; i < all; i += blockDim.x) count[i] = 0;
        __syncthreads();
    }
    const int64_t first = int64_t(blockIdx.x) * kCountPairs;
    for (int64_t i = first + threadIdx.x; i < first + kCountPairs && i < p.pairs; i += blockDim.x) {
        const int64_t e = p.ids[i];
        const int row = p.domain[i / p.K] + 1;
        if (e < 0 || e >= p.E || row < 0 || row >= p.rows) continue;
        const bool lost = p.kept && p.kept[i] < 0 && row > 0;
        if (in_shared) {
            atomicAdd(&count[row * p.E + e], 1);
            if (lost) atomicAdd(&count[cells + e], 1);
        } else {
            atomicAdd(&counts[row * p.E + e], 1ull);
            if (lost) atomicAdd(&dropped[e], 1ull);
        }
    }
    if (!in_shared) return;
    __syncthreads();
    for (int i = threadIdx.x; i < all; i += blockDim.x)
        if (count[i]) atomicAdd(i < cells ? &counts[i] : &dropped[i - cells], (unsigned long long)count[i]);
}

/// f(N) with the values that a lane holds.
template <class F> void by_width(int E, F f) {
    if (E <= 32) f(std::integral_constant<int, 1>{});
    else if (E <= 64) f(std::integral_constant<int, 2>{});
    else if (E <= 128) f(std::integral_constant<int, 4>{});
    else if (E <= 256) f(std::integral_constant<int, 8>{});
    else f(std::integral_constant<int, 32>{});
}
template <class T> void launch_forward(const RoutePass& p, cudaStream_t stream) {
    by_width(p.E, [&](auto n) {
        const size_t shared = p.n_group > 1 ? kWarps * size_t(p.E + p.n_group) * sizeof(T) : 0;
        const auto kernel = forward_kernel<T, decltype(n)::value>;
        if (shared > kMostShared) cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
        kernel<<<unsigned((p.T + kWarps - 1) / kWarps), 32 * kWarps, shared, stream>>>(p);
    });
}
template <class T> void launch_backward(const RoutePass& p, cudaStream_t stream) {
    backward_kernel<T><<<unsigned((p.T + kWarps - 1) / kWarps), 32 * kWarps, kWarps * size_t(p.E) * sizeof(T), stream>>>(p);
}
}  // namespace

cudaError_t route_forward(const RoutePass& p, cudaStream_t stream) {
    if (p.T == 0) return cudaSuccess;
    p.fp64 ? launch_forward<double>(p, stream) : launch_forward<float>(p, stream);
    return cudaGetLastError();
}
cudaError_t route_backward(const RoutePass& p, cudaStream_t stream) {
    if (p.T == 0) return cudaSuccess;
    p.fp64 ? launch_backward<double>(p, stream) : launch_backward<float>(p, stream);
    return cudaGetLastError();
}
cudaError_t count_pairs(const CountPairs& p, cudaStream_t stream) {
    if (p.pairs == 0) return cudaSuccess;
    const size_t shared = (size_t(p.rows) * p.E + (p.kept ? p.E : 0)) * sizeof(int);
    const bool fits = shared <= kMostShared;
    count_kernel<<<unsigned((p.pairs + kCountPairs - 1) / kCountPairs), kCountThreads, fits ? shared : 0, stream>>>(p, fits);
    return cudaGetLastError();
}
}  // namespace moe::kernels::sm90
