// dw = dyᵀ x over groups of rows, in fp32: a kernel of ours from DeepGEMM's parts (copies, descriptors, products of a warp group). DeepGEMM's own lays the tile of
// the result out in shared memory on its way out; a tile of 128 x 256 in fp32 leaves no room for stages there, and rows of a power of two meet in the same banks.
// Here every thread writes what it holds to memory itself, 16 bytes at a time, without waiting for it.
#include "core/kernels/common/device_sm90.cuh"
#include "core/kernels/grouped/sm90/instance.h"
#include "core/kernels/grouped/sm90/tiles.cuh"

#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>
#include <cute/arch/mma_sm100_desc.hpp>

#include <deep_gemm/common/tma_copy.cuh>
#include <deep_gemm/mma/sm90.cuh>
#include <deep_gemm/ptx/wgmma.cuh>

namespace moe::kernels::sm90 {
namespace {
namespace dg = deep_gemm;
using Barrier = cutlass::arch::ClusterTransactionBarrier;
using Bf16 = cutlass::bfloat16_t;
constexpr auto kAcrossK = cute::UMMA::Major::MN;
constexpr uint32_t kM = 128, kN = 256, kK = 64, kStages = 4, kSwizzle = 128, kBand = 16;
using Product = dg::mma::sm90::BF16MMASelector<kN, kAcrossK, kAcrossK>::type;      // 64 x 256 x 16 of one warp group
constexpr uint32_t kBytesA = kM * kK * sizeof(Bf16), kBytesB = kN * kK * sizeof(Bf16);

struct Ring {
    uint32_t stage = 0, phase = 0;
    __device__ void next() {
        stage = stage + 1 == kStages ? 0 : stage + 1;
        phase ^= stage == 0;
    }
};

/// Writes a warp group's 64 x 256 sums. A thread holds, for every 8 columns, two neighbours in row lane / 4 and two 8 rows below; pairs of threads exchange so that
/// the even one has 4 columns of one such block and the odd one 4 of the next.
__device__ void write_tile(const float* sums, float* row, uint32_t pitch, uint32_t columns) {
    const uint32_t lane = threadIdx.x % 32;
    const bool odd = lane % 2;
    const uint32_t column = (odd ? 8 : 0) + lane % 4 / 2 * 4;
    row += column;
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half, row += 8 * pitch) {
#pragma unroll
        for (uint32_t j = 0; j < kN / 8; j += 2) {
            const float *first = sums + j * 4 + half * 2, *second = first + 4;
            const float x = __shfl_xor_sync(0xffffffffu, odd ? first[0] : second[0], 1), y = __shfl_xor_sync(0xffffffffu, odd ? first[1] : second[1], 1);
            if (column + j * 8 >= columns) continue;
            const float4 v = odd ? make_float4(x, y, second[0], second[1]) : make_float4(first[0], first[1], x, y);
            *reinterpret_cast<float4*>(row + j * 8) = v;
        }
    }
}

__global__ void __launch_bounds__(kInstanceThreads, 1) sums(const int* offsets, uint32_t m, uint32_t n, uint32_t groups, const __grid_constant__ cute::TmaDescriptor map_a,
                                                             const __grid_constant__ cute::TmaDescriptor map_b, Written out) {
    extern __shared__ __align__(1024) uint8_t shared[];
    auto a_of = [&](uint32_t stage) { return reinterpret_cast<Bf16*>(shared + stage * kBytesA); };
    auto b_of = [&](uint32_t stage) { return reinterpret_cast<Bf16*>(shared + kStages * kBytesA + stage * kBytesB); };
    Barrier* full = reinterpret_cast<Barrier*>(shared + kStages * (kBytesA + kBytesB));
    Barrier* empty = full + kStages;

    const uint32_t warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        for (uint32_t i = 0; i < kStages; ++i) {
            full[i].init(1);
            empty[i].init(8);                       // a thread of every warp that multiplies
        }
        cutlass::arch::fence_barrier_init();
    }
    __syncthreads();

    dg::sched::TilesAlongK<kM, kN, kBand, true> tiles(m, n, groups, const_cast<int*>(offsets));
    Ring ring;
    uint32_t m_block, n_block;
    if (warp >= 8) {
        cutlass::arch::warpgroup_reg_dealloc<40>();
        if (warp != 8 || !cute::elect_one_sync()) return;
        while (tiles.get_next_block(m_block, n_block)) {
            const uint32_t steps = (tiles.current_shape_k + kK - 1) / kK;
            for (uint32_t k = 0; k < steps; ++k, ring.next()) {
                empty[ring.stage].wait(ring.phase ^ 1);
                Barrier& arrived = full[ring.stage];
                const uint32_t row = tiles.current_k_start + k * kK;
                dg::tma::copy<kM, kK, kSwizzle>(&map_a, &arrived, a_of(ring.stage), m_block * kM, row);
                dg::tma::copy<kN, kK, kSwizzle>(&map_b, &arrived, b_of(ring.stage), n_block * kN, row);
                arrived.arrive_and_expect_tx(kBytesA + kBytesB);
            }
        }
        return;
    }

    cutlass::arch::warpgroup_reg_alloc<232>();
    const uint32_t half = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
    auto a_desc = dg::mma::sm90::make_gmma_desc<kAcrossK, kM, kK, kSwizzle>(a_of(0), half * Product::M, 0);
    auto b_desc = dg::mma::sm90::make_gmma_desc<kAcrossK, kN, kK, kSwizzle>(b_of(0), 0, 0);
    const uint32_t a_low = __shfl_sync(0xffffffffu, a_desc.reg32_[0], 0), b_low = __shfl_sync(0xffffffffu, b_desc.reg32_[0], 0);
    double squares = 0;
    while (tiles.get_next_block(m_block, n_block)) {
        const uint32_t steps = (tiles.current_shape_k + kK - 1) / kK;
        float sum[Product::kNumAccum] = {};
        uint32_t before = 0;
        for (uint32_t k = 0; k < steps; ++k, ring.next()) {
            full[ring.stage].wait(ring.phase);
#pragma unroll
            for (float& s : sum) dg::ptx::warpgroup_fence_operand(s);
            dg::ptx::warpgroup_arrive();
#pragma unroll
            for (uint32_t i = 0; i < kK / Product::K; ++i) {
                a_desc.reg32_[0] = dg::mma::sm90::advance_gmma_desc_lo<kAcrossK, kM, kK, kSwizzle, Bf16>(a_low + ring.stage * (kBytesA / 16), 0, i * Product::K);
                b_desc.reg32_[0] = dg::mma::sm90::advance_gmma_desc_lo<kAcrossK, kN, kK, kSwizzle, Bf16>(b_low + ring.stage * (kBytesB / 16), 0, i * Product::K);
                Product::wgmma(a_desc, b_desc, sum, true);
            }
            dg::ptx::warpgroup_commit_batch();
#pragma unroll
            for (float& s : sum) dg::ptx::warpgroup_fence_operand(s);
            // The step before is done once only this one is under way.
            dg::ptx::warpgroup_wait<1>();
            if (k > 0 && lane == 0) empty[before].arrive();
            before = ring.stage;
        }
        dg::ptx::warpgroup_wait<0>();
#pragma unroll
        for (float& s : sum) dg::ptx::warpgroup_fence_operand(s);
        if (lane == 0) empty[before].arrive();
        const uint32_t row = m_block * kM + half * 64 + warp % 4 * 16 + lane / 4;
        write_tile(sum, out.d + (uint64_t(tiles.current_group_idx) * m + row) * n + n_block * kN, n, n - n_block * kN);
        float of_tile = 0;
#pragma unroll
        for (const float s : sum) of_tile += s * s;
        squares += of_tile;
    }
    squares = warp_sum(squares);
    if (out.squares && lane == 0) out.squares[blockIdx.x * kSumsPerBlock + warp] = squares;
}
}  // namespace

Instance bf16_tn_instance() { return {reinterpret_cast<const void*>(&sums), kM, kN, kStages}; }
}  // namespace moe::kernels::sm90
