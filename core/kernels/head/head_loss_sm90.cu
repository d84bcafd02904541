// One block a row: maximum and sum of exponentials in one read (each thread keeps its own pair), the gradient in a second.
#include "core/kernels/head/head_loss_sm90.h"

#include "core/kernels/common/device_sm90.cuh"

namespace moe::kernels::sm90 {
namespace {
constexpr int kMostThreads = 1024;

__device__ inline float exponential(float x) { return expf(x); }
__device__ inline double exponential(double x) { return exp(x); }
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

template <class W, class G, int N>
__global__ void kernel(const W* logits, const int64_t* targets, int64_t V, int64_t ignore, W scale, const double* device_scale, double* loss, G* dlogits) {
    if (device_scale) scale = W(*device_scale);
    const int64_t row = blockIdx.x, target = targets[row], first = threadIdx.x * N, step = int64_t(blockDim.x) * N;
    const W* x = logits + row * V;
    if (target == ignore) {                // the whole block takes this way
        if (threadIdx.x == 0) loss[row] = 0;
        if (dlogits)
            for (int64_t i = first; i < V; i += step) {
                Vector<G, N> zero;
                for (int k = 0; k < N; ++k) zero.at[k] = narrow<G>(W(0));
                store<N>(dlogits + row * V + i, zero);
            }
        return;
    }
    const bool known = target >= 0 && target < V;
    const W picked = known ? x[target] : W(NAN);      // before the barriers: dlogits may overwrite it
    W top = lowest<W>(), sum = 0;
    for (int64_t i = first; i < V; i += step) {
        auto a = load<N>(x + i);
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
    if (threadIdx.x == 0) loss[row] = log(double(sum)) + double(all) - double(picked);
    if (!dlogits) return;
    const W factor = known ? scale / sum : W(NAN);
    for (int64_t i = first; i < V; i += step) {
        auto a = load<N>(x + i);
        Vector<G, N> d;
        for (int k = 0; k < N; ++k) d.at[k] = narrow<G>(exponential(a.at[k] - all) * factor - (i + k == target ? scale : W(0)));
        store<N>(dlogits + row * V + i, d);
    }
}

template <class W, class G, int N> cudaError_t launch(const CrossEntropy& p, cudaStream_t stream) {
    kernel<W, G, N><<<unsigned(p.n), row_threads(p.V / N, kMostThreads), 0, stream>>>(
        static_cast<const W*>(p.logits), p.targets, p.V, p.ignore, W(p.scale), p.device_scale, p.loss, static_cast<G*>(p.dlogits));
    return cudaGetLastError();
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
