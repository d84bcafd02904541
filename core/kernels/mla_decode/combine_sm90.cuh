// Puts the partial results of cut sequences together, in the order of workers; also writes what a sequence of length 0 gives.
#pragma once
#include "core/kernels/mla_decode/mma_sm90.cuh"

namespace moe::kernels::sm90 {
constexpr int kCombineRows = 8;         // one warp a row

static __global__ void __launch_bounds__(kCombineRows * 32) combine_kernel(const __grid_constant__ MlaDecode p, int tile_tokens, int workers) {
    const int R = p.Q * p.H, b = blockIdx.y, row = blockIdx.x * kCombineRows + threadIdx.x / 32, lane = threadIdx.x % 32;
    const Axis axis(p, tile_tokens);
    const int length = axis.length(b), tiles = axis.tiles(length), total = axis.before(p.B), start = axis.before(b) + kSequenceCost;
    wait_for_kernel_before();
    if (row >= R) return;
    __nv_bfloat16* out = static_cast<__nv_bfloat16*>(p.out) + (int64_t(b) * R + row) * kLatent;
    float* lse = static_cast<float*>(p.lse) + int64_t(b) * R + row;
    float o[kLatent / 128][4] = {}, top = -INFINITY, sum = 0;
    if (tiles > 0) {
        const int first = Axis::owner(total, start, workers), last = Axis::owner(total, start + tiles - 1, workers);
        if (first == last) return;                       // written where it was computed
        const Partials partials(p.workspace, workers, R, kLatent);
#pragma unroll 2
        for (int worker = first; worker <= last; ++worker) {
            const int64_t at = partials.row(worker, worker == first ? 1 : 0, row);
            const float lse2 = partials.lse2[at];
            float4 x[kLatent / 128];
#pragma unroll
            for (int i = 0; i < kLatent / 128; ++i) x[i] = *reinterpret_cast<const float4*>(partials.out + at * kLatent + i * 128 + lane * 4);
            if (lse2 == -INFINITY) continue;             // a new token that sees nothing of this piece
            const float above = fmaxf(top, lse2), keep = exp2f(top - above), weight = exp2f(lse2 - above);
            top = above, sum = sum * keep + weight;
#pragma unroll
            for (int i = 0; i < kLatent / 128; ++i) {
                o[i][0] = o[i][0] * keep + x[i].x * weight, o[i][1] = o[i][1] * keep + x[i].y * weight;
                o[i][2] = o[i][2] * keep + x[i].z * weight, o[i][3] = o[i][3] * keep + x[i].w * weight;
            }
        }
    }
    const float factor = sum > 0 ? 1 / sum : 0;
#pragma unroll
    for (int i = 0; i < kLatent / 128; ++i)
        *reinterpret_cast<uint2*>(out + i * 128 + lane * 4) = {bf16_of(o[i][0] * factor, o[i][1] * factor), bf16_of(o[i][2] * factor, o[i][3] * factor)};
    if (lane == 0) *lse = sum > 0 ? (top + log2f(sum)) * 0.6931471805599453f : -INFINITY;
}
}  // namespace moe::kernels::sm90
