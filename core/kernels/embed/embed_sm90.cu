// Letters: T tokens, V vocabulary, D width.
#include "core/kernels/embed/embed_sm90.h"

#include "core/kernels/common/device_sm90.cuh"

namespace moe::kernels::sm90 {
namespace {
constexpr int kMostThreads = 256, kGradThreads = 128;

template <class T, int N> __global__ void forward_kernel(const int64_t* ids, const T* w, int64_t V, int64_t D, T* y) {
    const int64_t row = blockIdx.x, id = ids[row];
    const bool known = id >= 0 && id < V;
    for (int64_t i = threadIdx.x * N; i < D; i += int64_t(blockDim.x) * N) {
        Vector<T, N> v;
        if (known) v = load<N>(w + id * D + i);
        else
            for (int k = 0; k < N; ++k) v.at[k] = narrow<T>(Wide<T>(NAN));
        store<N>(y + row * D + i, v);
    }
}

/// Block (p, c) of sorted position p and column chunk c: where p starts a run of equal ids, it adds the run's rows.
template <class T, class G, int N>
__global__ void add_grad_kernel(const int64_t* ids, const int64_t* order, const T* dy, int64_t rows, int64_t V, int64_t D, G* dw, double* squares) {
    const int64_t first = blockIdx.x, id = ids[first], i = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * N;
    using W = Wide<G>;
    double written = 0;
    if (id >= 0 && id < V && (first == 0 || ids[first - 1] != id) && i < D) {
        W sum[N] = {};
        constexpr int kAhead = 4;              // loads in flight; a frequent token's run is long
        int64_t p = first;
        for (; p + kAhead <= rows && ids[p + kAhead - 1] == id; p += kAhead) {
            Vector<T, N> v[kAhead];
            for (int a = 0; a < kAhead; ++a) v[a] = load<N>(dy + order[p + a] * D + i);
            for (int a = 0; a < kAhead; ++a)
                for (int k = 0; k < N; ++k) sum[k] += W(widen(v[a].at[k]));
        }
        for (; p < rows && ids[p] == id; ++p) {
            auto v = load<N>(dy + order[p] * D + i);
            for (int k = 0; k < N; ++k) sum[k] += W(widen(v.at[k]));
        }
        for (int k = 0; k < N; ++k) {
            const G to = narrow<G>(widen(dw[id * D + i + k]) + sum[k]);
            dw[id * D + i + k] = to;
            written += double(widen(to)) * double(widen(to));
        }
    }
    if (!squares) return;
    written = block_sum(written);
    if (threadIdx.x == 0) squares[blockIdx.x * gridDim.y + blockIdx.y] = written;
}

template <class T, int N> cudaError_t launch_forward(const Embed& p, cudaStream_t stream) {
    forward_kernel<T, N><<<unsigned(p.T), row_threads(p.D / N, kMostThreads), 0, stream>>>(p.ids, static_cast<const T*>(p.w), p.V, p.D, static_cast<T*>(p.y));
    return cudaGetLastError();
}
template <class T> bool wide_grad(const Embed& p) { return p.D % kVector<T> == 0 && aligned({p.dy}); }
/// Blocks by (sorted position, chunk of columns), N columns a thread.
template <int N> dim3 grad_grid(const Embed& p) {
    const int threads = row_threads(p.D / N, kGradThreads);
    return dim3(unsigned(p.T), unsigned((p.D / N + threads - 1) / threads));
}
template <class T, class G, int N> cudaError_t launch_add_grad(const Embed& p, cudaStream_t stream) {
    add_grad_kernel<T, G, N><<<grad_grid<N>(p), row_threads(p.D / N, kGradThreads), 0, stream>>>(p.ids, p.order, static_cast<const T*>(p.dy), p.T, p.V, p.D, static_cast<G*>(p.dw), p.squares);
    return cudaGetLastError();
}
}  // namespace

cudaError_t embed_forward(const Embed& p, cudaStream_t stream) {
    if (p.T == 0 || p.D == 0) return cudaSuccess;
    cudaError_t error = cudaSuccess;
    by_dtype(p.dtype, [&](auto zero) {
        using T = decltype(zero);
        const bool wide = p.D % kVector<T> == 0 && aligned({p.w, p.y});
        error = wide ? launch_forward<T, kVector<T>>(p, stream) : launch_forward<T, 1>(p, stream);
    });
    return error;
}

int64_t embed_square_parts(const Embed& p) {
    int64_t parts = 0;
    by_dtype(p.dtype, [&](auto zero) {
        using T = decltype(zero);
        const dim3 grid = wide_grad<T>(p) ? grad_grid<kVector<T>>(p) : grad_grid<1>(p);
        parts = int64_t(grid.x) * grid.y;
    });
    return parts;
}

cudaError_t embed_add_grad(const Embed& p, cudaStream_t stream) {
    if (p.T == 0 || p.D == 0) return cudaSuccess;
    cudaError_t error = cudaSuccess;
    by_dtype(p.dtype, [&](auto zero) {
        using T = decltype(zero);
        by_main_dtype(p.dw_dtype, [&](auto grad_zero) {
            using G = decltype(grad_zero);
            error = wide_grad<T>(p) ? launch_add_grad<T, G, kVector<T>>(p, stream) : launch_add_grad<T, G, 1>(p, stream);
        });
    });
    return error;
}
}  // namespace moe::kernels::sm90
