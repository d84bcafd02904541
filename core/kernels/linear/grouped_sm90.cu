#include "core/kernels/linear/grouped_sm90.h"

#include "core/kernels/common/device_sm90.cuh"

namespace moe::kernels::sm90 {
namespace {
constexpr int kThreads = 256;

template <class S, int N> __global__ void kernel(AddGroups p) {
    const int64_t group = blockIdx.y;
    if (p.ends[group] == (group ? p.ends[group - 1] : p.first)) return;
    const __nv_bfloat16* part = static_cast<const __nv_bfloat16*>(p.part) + group * p.size;
    S* sum = static_cast<S*>(p.sum) + group * p.size;
    for (int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * N; i < p.size; i += int64_t(gridDim.x) * blockDim.x * N) {
        auto a = load<N>(part + i);
        auto b = load<N>(sum + i);
        for (int k = 0; k < N; ++k) b.at[k] = narrow<S>(widen(b.at[k]) + Wide<S>(widen(a.at[k])));
        store<N>(sum + i, b);
    }
}

template <class S, int N> void launch(const AddGroups& p, cudaStream_t stream) {
    kernel<S, N><<<dim3(loop_blocks((p.size + N - 1) / N, kThreads, 256), unsigned(p.groups)), kThreads, 0, stream>>>(p);
}
}  // namespace

cudaError_t add_groups(const AddGroups& p, cudaStream_t stream) {
    if (p.groups == 0 || p.size == 0) return cudaSuccess;
    by_main_dtype(p.sum_dtype, [&](auto zero) {
        using S = decltype(zero);
        const bool wide = p.size % 4 == 0 && aligned({p.part}, 8) && aligned({p.sum}, 4 * sizeof(S));
        wide ? launch<S, 4>(p, stream) : launch<S, 1>(p, stream);
    });
    return cudaGetLastError();
}
}  // namespace moe::kernels::sm90
