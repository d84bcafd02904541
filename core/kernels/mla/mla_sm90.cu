// One thread handles N consecutive columns (16 bytes, or one) of one head of one token. Rotation of element i of the rotated
// part: y[i] = x[i] · cos ± x[partner] · sin, where the partner is the neighbour (interleaved) or half the part away; the other
// way round the sign flips.
#include "core/kernels/mla/mla_sm90.h"

#include "core/kernels/quantize/rows_sm90.cuh"

namespace moe::kernels::sm90 {
namespace {
constexpr int kThreads = 256;

/// cos and sin of one position: [rope / 2] each.
template <class W> struct Turn {
    const W *cos, *sin;
    int half;
    bool interleaved;
    W direction;                           ///< 1 forward, −1 back
};

/// Element i of a rotated part from itself and its partner.
template <class W> __device__ inline W turned(const Turn<W>& t, int i, W own, W partner) {
    const int pair = t.interleaved ? i / 2 : i < t.half ? i : i - t.half;
    const bool first = t.interleaved ? i % 2 == 0 : i < t.half;
    return own * t.cos[pair] + (first ? -partner : partner) * t.sin[pair] * t.direction;
}

/// N elements from i on of the rotated part x.
template <int N, class T, class W> __device__ inline Vector<T, N> turn(const Turn<W>& t, const T* x, int i) {
    auto own = load<N>(x + i);
    Vector<T, N> partner, y;
    if (!t.interleaved) partner = load<N>(x + (i < t.half ? i + t.half : i - t.half));
    else if constexpr (N == 1) partner = load<1>(x + (i ^ 1));
    else
        for (int k = 0; k < N; ++k) partner.at[k] = own.at[k ^ 1];
    for (int k = 0; k < N; ++k) y.at[k] = narrow<T>(turned<W>(t, i + k, widen(own.at[k]), widen(partner.at[k])));
    return y;
}
template <int N, class T> __device__ inline Vector<T, N> zeros() {
    Vector<T, N> v;
    for (int k = 0; k < N; ++k) v.at[k] = narrow<T>(Wide<T>(0));
    return v;
}

template <class W> __device__ inline Turn<W> turn_of(const MlaLayout& p, int64_t token, W direction) {
    const int64_t at = p.rope ? token % p.S * (p.rope / 2) : 0;
    return {static_cast<const W*>(p.cos) + at, static_cast<const W*>(p.sin) + at, p.rope / 2, p.interleaved, direction};
}

/// A block is one token; its threads walk the token's columns of q, then of k, then of v.
template <class T, int N> __global__ void assemble_kernel(MlaLayout p) {
    const int64_t token = blockIdx.x;
    const auto t = turn_of<Wide<T>>(p, token, Wide<T>(1));
    const int data = p.nope + p.rope, width = p.W / N, q_items = p.H * width, k_items = p.G * width;
    const T* q_in = static_cast<const T*>(p.q_in) + token * p.H * data;
    T* q = static_cast<T*>(p.q) + token * p.H * p.W;
    for (int item = threadIdx.x; item < q_items; item += blockDim.x) {
        const int head = item / width, i = item % width * N;
        const T* x = q_in + head * data;
        store<N>(q + head * p.W + i, i < p.nope ? load<N>(x + i) : i < data ? turn<N>(t, x + p.nope, i - p.nope) : zeros<N, T>());
    }
    const T* kv_in = static_cast<const T*>(p.kv_in) + token * p.G * (p.nope + p.v);
    const T* k_rope = static_cast<const T*>(p.k_rope) + token * p.rope;
    T* k = static_cast<T*>(p.k) + token * p.G * p.W;
    for (int item = threadIdx.x; item < k_items; item += blockDim.x) {
        const int head = item / width, i = item % width * N;
        store<N>(k + head * p.W + i, i < p.nope ? load<N>(kv_in + head * (p.nope + p.v) + i) : i < data ? turn<N>(t, k_rope, i - p.nope) : zeros<N, T>());
    }
    if (!p.v_out) return;
    T* v = static_cast<T*>(p.v_out) + token * p.G * p.U;
    for (int item = threadIdx.x; item < p.G * (p.U / N); item += blockDim.x) {
        const int head = item / (p.U / N), i = item % (p.U / N) * N;
        store<N>(v + head * p.U + i, i < p.v ? load<N>(kv_in + head * (p.nope + p.v) + p.nope + i) : zeros<N, T>());
    }
}

/// With copies, all lanes of a warp stay as long as one has an item: see copy_part.
template <class T, int N, bool copied> __global__ void take_apart_kernel(MlaLayout p) {
    using A = Wide<T>;
    const int64_t token = blockIdx.x;
    const auto t = turn_of<A>(p, token, A(-1));
    const int data = p.nope + p.rope, width = data / N;
    const T* dq = static_cast<const T*>(p.q) + token * p.H * p.W;
    T* dq_in = static_cast<T*>(p.q_in) + token * p.H * data;
    for (int item = threadIdx.x; item < end_of_row<copied, 1>(p.H * width); item += blockDim.x) {
        const int head = item / width, i = item % width * N;
        const bool inside = !copied || item < p.H * width;
        Vector<T, N> v{};
        if (inside) {
            const T* x = dq + head * p.W;
            v = i < p.nope ? load<N>(x + i) : turn<N>(t, x + p.nope, i - p.nope);
            store<N>(dq_in + head * data + i, v);
        }
        if constexpr (copied) copy_part(v, inside, token, int64_t(item) * N, int64_t(p.H) * data, p.q_copy);
    }
    const T* dk = static_cast<const T*>(p.k) + token * p.G * p.W;
    const T* dv = static_cast<const T*>(p.v_out) + token * p.G * p.U;
    T* dkv_in = static_cast<T*>(p.kv_in) + token * p.G * (p.nope + p.v);
    const int kv_width = (p.nope + p.v) / N;
    for (int item = threadIdx.x; item < end_of_row<copied, 1>(p.G * kv_width); item += blockDim.x) {
        const int head = item / kv_width, i = item % kv_width * N;
        const bool inside = !copied || item < p.G * kv_width;
        Vector<T, N> v{};
        if (inside) {
            v = i < p.nope ? load<N>(dk + head * p.W + i) : load<N>(dv + head * p.U + i - p.nope);
            store<N>(dkv_in + head * (p.nope + p.v) + i, v);
        }
        if constexpr (copied) copy_part(v, inside, token, int64_t(item) * N, int64_t(p.G) * (p.nope + p.v), p.kv_copy);
    }
    T* dk_rope = static_cast<T*>(p.k_rope) + token * p.rope;
    for (int i = threadIdx.x; i < p.rope; i += blockDim.x) {
        const int partner = t.interleaved ? i ^ 1 : i < t.half ? i + t.half : i - t.half;
        A own = 0, other = 0;
        for (int head = 0; head < p.G; ++head) {
            const T* x = dk + head * p.W + p.nope;
            own += widen(x[i]), other += widen(x[partner]);
        }
        dk_rope[i] = narrow<T>(turned<A>(t, i, own, other));
    }
}

template <class T, int N> __global__ void repad_kernel(const T* x, int64_t items, int from, int to, T* y) {
    const int width = to / N;
    for (int64_t item = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; item < items; item += int64_t(gridDim.x) * blockDim.x) {
        const int64_t row = item / width;
        const int i = int(item % width) * N;
        store<N>(y + row * to + i, i < from ? load<N>(x + row * from + i) : zeros<N, T>());
    }
}
template <class T, int N> void launch_repad(const void* x, int64_t rows, int from, int to, void* y, cudaStream_t stream) {
    const int64_t items = rows * (to / N);
    repad_kernel<T, N><<<loop_blocks(items, kThreads), kThreads, 0, stream>>>(static_cast<const T*>(x), items, from, to, static_cast<T*>(y));
}

/// All widths are multiples of n, and so is every row's start; the halves of the rotated part too.
bool by_n(const MlaLayout& p, int n) {
    const int rope = p.interleaved ? p.rope : p.rope / 2;
    return p.nope % n == 0 && rope % n == 0 && p.v % n == 0 && p.W % n == 0 && p.U % n == 0 && aligned({p.q_in, p.kv_in, p.k_rope, p.q, p.k, p.v_out});
}
}  // namespace

bool mla_walks_vectors(const MlaLayout& p) { return by_n(p, kCopyPart); }

cudaError_t mla_assemble(const MlaLayout& p, cudaStream_t stream) {
    if (p.T == 0) return cudaSuccess;
    by_dtype(p.dtype, [&](auto zero) {
        using T = decltype(zero);
        if (by_n(p, kVector<T>)) assemble_kernel<T, kVector<T>><<<unsigned(p.T), kThreads, 0, stream>>>(p);
        else assemble_kernel<T, 1><<<unsigned(p.T), kThreads, 0, stream>>>(p);
    });
    return cudaGetLastError();
}

cudaError_t mla_take_apart(const MlaLayout& p, cudaStream_t stream) {
    if (p.T == 0) return cudaSuccess;
    by_dtype(p.dtype, [&](auto zero) {
        using T = decltype(zero);
        auto launch = [&](auto kernel) { kernel<<<unsigned(p.T), kThreads, 0, stream>>>(p); };
        if constexpr (kCanCopy<T, kVector<T>>)
            if (p.q_copy.q) return launch(take_apart_kernel<T, kVector<T>, true>);
        if (by_n(p, kVector<T>)) launch(take_apart_kernel<T, kVector<T>, false>);
        else launch(take_apart_kernel<T, 1, false>);
    });
    return cudaGetLastError();
}

cudaError_t repad(Dtype dtype, const void* x, int64_t rows, int from, int to, void* y, cudaStream_t stream) {
    if (rows == 0 || to == 0) return cudaSuccess;
    by_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        if (from % kVector<T> == 0 && to % kVector<T> == 0 && aligned({x, y})) launch_repad<T, kVector<T>>(x, rows, from, to, y, stream);
        else launch_repad<T, 1>(x, rows, from, to, y, stream);
    });
    return cudaGetLastError();
}
}  // namespace moe::kernels::sm90
