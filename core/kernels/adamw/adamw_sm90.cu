// Grid-stride loops over groups of four elements. The dtypes of grad, moments and value are switched on inside the kernel: the
// branch is the same for the whole grid and the passes are bound by memory.
#include "core/kernels/adamw/adamw_step_sm90.cuh"

namespace moe::kernels::sm90 {
namespace {
constexpr int kThreads = 256;

template <int N, class S, class T> __device__ inline void read_as(const void* data, int64_t i, T (&x)[N]) {
    auto v = load<N>(static_cast<const S*>(data) + i);
    for (int k = 0; k < N; ++k) x[k] = T(widen(v.at[k]));
}
template <int N, class T> __device__ inline void read(Range r, int64_t i, T (&x)[N]) {
    if (r.dtype == Dtype::fp32) read_as<N, float>(r.data, i, x);
    else if (r.dtype == Dtype::bf16) read_as<N, __nv_bfloat16>(r.data, i, x);
    else if (r.dtype == Dtype::fp16) read_as<N, __half>(r.data, i, x);
    else read_as<N, double>(r.data, i, x);
}
template <int N, class S, class T> __device__ inline void write_as(void* data, int64_t i, const T (&x)[N]) {
    Vector<S, N> v;
    for (int k = 0; k < N; ++k) v.at[k] = narrow<S>(x[k]);
    store<N>(static_cast<S*>(data) + i, v);
}
template <int N, class T> __device__ inline void write(Range r, int64_t i, const T (&x)[N]) {
    if (!r.data) return;
    if (r.dtype == Dtype::fp32) write_as<N, float>(r.data, i, x);
    else if (r.dtype == Dtype::bf16) write_as<N, __nv_bfloat16>(r.data, i, x);
    else if (r.dtype == Dtype::fp16) write_as<N, __half>(r.data, i, x);
    else write_as<N, double>(r.data, i, x);
}

template <int N, class T> __device__ inline void read(const Weights& w, int64_t i, T (&x)[N]) {
    if constexpr (std::is_same_v<T, float>) {
        if (w.split) {
            auto high = load<N>(static_cast<const unsigned short*>(w.value.data) + i);
            auto rest = load<N>(static_cast<const short*>(w.master.data) + i);
            for (int k = 0; k < N; ++k) x[k] = joined_master(high.at[k], rest.at[k]);
            return;
        }
    }
    read<N>(w.master, i, x);
}
template <int N, class T> __device__ inline void write(const Weights& w, int64_t i, const T (&x)[N]) {
    if constexpr (std::is_same_v<T, float>) {
        if (w.split) {
            Vector<unsigned short, N> high;
            Vector<short, N> rest;
            for (int k = 0; k < N; ++k) split_master(x[k], high.at[k], rest.at[k]);
            store<N>(static_cast<unsigned short*>(w.value.data) + i, high);
            store<N>(static_cast<short*>(w.master.data) + i, rest);
            return;
        }
    }
    write<N>(w.master, i, x);
    write<N>(w.value, i, x);
}

template <class T, int N> __device__ inline void adamw_at(const AdamW& p, const AdamWFactors<T>& f, int64_t i) {
    T w[N], g[N], m[N], v[N];
    read<N>(p.weights, i, w);
    read<N>(p.grad, i, g);
    read<N>(p.m, i, m);
    read<N>(p.v, i, v);
    for (int k = 0; k < N; ++k) adamw_step(f, g[k], w[k], m[k], v[k]);
    write<N>(p.weights, i, w);
    write<N>(p.m, i, m);
    write<N>(p.v, i, v);
}

template <class T, int N> __device__ inline void sgd_at(const Sgd& p, int64_t i) {
    T w[N], g[N], b[N] = {};
    read<N>(p.weights, i, w);
    read<N>(p.grad, i, g);
    if (p.buffer.data) read<N>(p.buffer, i, b);
    for (int k = 0; k < N; ++k) {
        b[k] = T(p.momentum) * b[k] + (T(p.scale) * g[k] + T(p.weight_decay) * w[k]);
        w[k] -= T(p.lr) * b[k];
    }
    write<N>(p.weights, i, w);
    write<N>(p.buffer, i, b);
}

/// Groups of four where all ranges allow it, then what is left one by one.
template <class T> __global__ void adamw_kernel(AdamW p, AdamWFactors<T> f, bool wide) {
    const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, threads = int64_t(gridDim.x) * blockDim.x;
    const int64_t groups = wide ? p.n / 4 : 0;
    for (int64_t i = thread; i < groups; i += threads) adamw_at<T, 4>(p, f, i * 4);
    for (int64_t i = groups * 4 + thread; i < p.n; i += threads) adamw_at<T, 1>(p, f, i);
}
template <class T> __global__ void sgd_kernel(Sgd p, bool wide) {
    const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, threads = int64_t(gridDim.x) * blockDim.x;
    const int64_t groups = wide ? p.n / 4 : 0;
    for (int64_t i = thread; i < groups; i += threads) sgd_at<T, 4>(p, i * 4);
    for (int64_t i = groups * 4 + thread; i < p.n; i += threads) sgd_at<T, 1>(p, i);
}

__global__ void square_kernel(Range x, int64_t n, bool wide, double* partial) {
    const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, threads = int64_t(gridDim.x) * blockDim.x;
    const int64_t groups = wide ? n / 4 : 0;
    double sum = 0;
    for (int64_t i = thread; i < groups; i += threads) {
        double a[4];
        read<4>(x, i * 4, a);
        for (int k = 0; k < 4; ++k) sum += a[k] * a[k];
    }
    for (int64_t i = groups * 4 + thread; i < n; i += threads) {
        double a[1];
        read<1>(x, i, a);
        sum += a[0] * a[0];
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}
__global__ void sum_kernel(const double* partial, int parts, double* out) {
    double sum = 0;
    for (int i = threadIdx.x; i < parts; i += blockDim.x) sum += partial[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *out = sum;
}

/// A range may be read four elements at a time.
bool by_four(Range r) {
    const size_t bytes = r.dtype == Dtype::fp64 ? 32 : r.dtype == Dtype::fp32 ? 16 : 8;
    return aligned({r.data}, bytes);
}
bool by_four(const Weights& w) { return w.split ? aligned({w.master.data, w.value.data}, 8) : by_four(w.master) && by_four(w.value); }
}  // namespace

cudaError_t adamw(const AdamW& p, cudaStream_t stream) {
    if (p.n == 0) return cudaSuccess;
    const bool wide = by_four(p.weights) && by_four(p.grad) && by_four(p.m) && by_four(p.v);
    by_wide_dtype(p.weights.master.dtype, [&](auto zero) {
        using T = decltype(zero);
        adamw_kernel<T><<<loop_blocks((p.n + 3) / 4, kThreads), kThreads, 0, stream>>>(p, AdamWFactors<T>(p.rule), wide);
    });
    return cudaGetLastError();
}

cudaError_t sgd(const Sgd& p, cudaStream_t stream) {
    if (p.n == 0) return cudaSuccess;
    const bool wide = by_four(p.weights) && by_four(p.grad) && by_four(p.buffer);
    by_wide_dtype(p.weights.master.dtype, [&](auto zero) {
        sgd_kernel<decltype(zero)><<<loop_blocks((p.n + 3) / 4, kThreads), kThreads, 0, stream>>>(p, wide);
    });
    return cudaGetLastError();
}

int sum_parts(int64_t n) { return int(std::clamp<int64_t>((n + 4095) / 4096, 1, 132 * 8)); }

cudaError_t sum_of_squares(Range x, int64_t n, double* partial, double* out, cudaStream_t stream) {
    const int parts = sum_parts(n);         // at least one: an empty range gives 0
    square_kernel<<<parts, kThreads, 0, stream>>>(x, n, by_four(x), partial);
    if (auto error = cudaGetLastError(); error != cudaSuccess) return error;
    sum_kernel<<<1, 512, 0, stream>>>(partial, parts, out);
    return cudaGetLastError();
}
}  // namespace moe::kernels::sm90
