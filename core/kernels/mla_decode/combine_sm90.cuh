// Puts the partial results of cut sequences together, in a fixed order; also writes what a sequence of length 0 gives.
#pragma once
#include "core/kernels/mla_decode/cache_sm90.cuh"

namespace moe::kernels::sm90 {
constexpr int kCombineWarps = 8;

/// WARPS of a block's eight share a row: each takes every WARPS-th part.
template <int WARPS> __global__ void __launch_bounds__(kCombineWarps * 32) combine_kernel(const __grid_constant__ MlaDecode p, int most_workers) {
    __shared__ float sums[WARPS > 1 ? WARPS : 1][WARPS > 1 ? kLatent : 1];
    const int R = p.Q * p.H, b = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = blockIdx.x * (kCombineWarps / WARPS) + warp / WARPS;
    let_next_kernel_start();
    const Axis axis(p);
    const int tiles = axis.tiles(axis.length(b)), total = axis.before(p.B), start = axis.before(b) + kSequenceCost, workers = Axis::busy(total, most_workers);
    wait_for_kernel_before();
    if (row >= R) return;
    __nv_bfloat16* out = static_cast<__nv_bfloat16*>(p.out) + (int64_t(b) * R + row) * kLatent;
    float o[kLatent / 128][4] = {}, top = -INFINITY, sum = 0;
    if (tiles > 0) {
        const int first = Axis::owner(total, start, workers), last = Axis::owner(total, start + tiles - 1, workers);
        if (first == last) return;                       // written where it was computed
        const Partials partials(p.workspace, most_workers, R, kLatent);
        auto at = [&](int worker) { return partials.row(worker, worker == first ? 1 : 0, row); };
        for (int worker = first + lane; worker <= last; worker += 32) top = fmaxf(top, partials.lse2[at(worker)]);
        for (int other = 16; other; other /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, other));
        const float base = top == -INFINITY ? 0 : top;   // −∞: a new token that sees nothing
        for (int worker = first + lane; worker <= last; worker += 32) sum += exp2f(partials.lse2[at(worker)] - base);
        for (int other = 16; other; other /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
#pragma unroll 4
        for (int worker = first + warp % WARPS; worker <= last; worker += WARPS) {
            const float weight = exp2f(partials.lse2[at(worker)] - base);
            const float* x = partials.out + at(worker) * kLatent + lane * 4;
#pragma unroll
            for (int i = 0; i < kLatent / 128; ++i) {
                const float4 v = *reinterpret_cast<const float4*>(x + i * 128);
                o[i][0] += v.x * weight, o[i][1] += v.y * weight, o[i][2] += v.z * weight, o[i][3] += v.w * weight;
            }
        }
    }
    const float factor = sum == 0 ? 0 : 1 / sum;           // 0: nothing is seen; a NaN stays one
    if (warp % WARPS == 0 && lane == 0) static_cast<float*>(p.lse)[int64_t(b) * R + row] = sum == 0 ? -INFINITY : (top + log2f(sum)) * 0.6931471805599453f;
    if constexpr (WARPS == 1) {
#pragma unroll
        for (int i = 0; i < kLatent / 128; ++i)
            *reinterpret_cast<uint2*>(out + i * 128 + lane * 4) = uint2{bf16_of(o[i][0] * factor, o[i][1] * factor), bf16_of(o[i][2] * factor, o[i][3] * factor)};
    } else {
        static_assert(WARPS == kCombineWarps);           // one row a block: all of it is here
#pragma unroll
        for (int i = 0; i < kLatent / 128; ++i) *reinterpret_cast<float4*>(&sums[warp][i * 128 + lane * 4]) = float4{o[i][0], o[i][1], o[i][2], o[i][3]};
        __syncthreads();
        float2 x{0, 0};
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            const float2 v = *reinterpret_cast<const float2*>(&sums[w][threadIdx.x * 2]);
            x.x += v.x, x.y += v.y;
        }
        *reinterpret_cast<uint32_t*>(out + threadIdx.x * 2) = bf16_of(x.x * factor, x.y * factor);
    }
}
}  // namespace moe::kernels::sm90
