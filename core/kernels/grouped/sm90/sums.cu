// dw = dyᵀ x over groups of rows, in fp32 or rounded to bf16, and dw += it in bf16: a kernel of ours from DeepGEMM's parts (copies, descriptors, products of a warp group). DeepGEMM's own lays the tile of
// the result out in shared memory on its way out; a tile of 128 x 256 in fp32 leaves no room for stages there, and rows of a power of two meet in the same banks.
// Here every thread writes what it holds to memory itself, four numbers at a time, without waiting for it.
#include "core/kernels/common/device_sm90.cuh"
#include "core/kernels/grouped/sm90/instance.h"
#include "core/kernels/grouped/sm90/tiles.cuh"

#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>
#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
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

/// Four neighbours of dw become v, or in bf16 += v, rounded once; v becomes what they hold then.
template <bool kAdds> __device__ void put(float* to, float4& v) {
    static_assert(!kAdds);
    *reinterpret_cast<float4*>(to) = v;
}
template <bool kAdds> __device__ void put(__nv_bfloat16* to, float4& v) {
    if constexpr (kAdds) {
        const auto before = load<4>(to);
        v.x += widen(before.at[0]), v.y += widen(before.at[1]), v.z += widen(before.at[2]), v.w += widen(before.at[3]);
    }
    Vector<__nv_bfloat16, 4> rounded{{narrow<__nv_bfloat16>(v.x), narrow<__nv_bfloat16>(v.y), narrow<__nv_bfloat16>(v.z), narrow<__nv_bfloat16>(v.w)}};
    store<4>(to, rounded);
    v = make_float4(widen(rounded.at[0]), widen(rounded.at[1]), widen(rounded.at[2]), widen(rounded.at[3]));
}

/// Writes a warp group's 64 x 256 sums, and returns the sum of the squares of what this thread has written. A thread holds, for every 8 columns, two neighbours in row lane / 4 and two 8 rows below; pairs of threads exchange so that
/// the even one has 4 columns of one such block and the odd one 4 of the next.
template <bool kAdds, class G> __device__ float write_tile(const float* sums, G* row, uint32_t pitch, uint32_t columns) {
    const uint32_t lane = threadIdx.x % 32;
    const bool odd = lane % 2;
    const uint32_t column = (odd ? 8 : 0) + lane % 4 / 2 * 4;
    row += column;
    float squares = 0;
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half, row += 8 * pitch) {
#pragma unroll
        for (uint32_t j = 0; j < kN / 8; j += 2) {
            const float *first = sums + j * 4 + half * 2, *second = first + 4;
            const float x = __shfl_xor_sync(0xffffffffu, odd ? first[0] : second[0], 1), y = __shfl_xor_sync(0xffffffffu, odd ? first[1] : second[1], 1);
            if (column + j * 8 >= columns) continue;
            float4 v = odd ? make_float4(x, y, second[0], second[1]) : make_float4(first[0], first[1], x, y);
            put<kAdds>(row + j * 8, v);
            squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
        }
    }
    return squares;
}

/// Everybody of the block, or of the cluster.
template <uint32_t kCluster> __device__ void meet() {
    if constexpr (kCluster == 1) __syncthreads();
    else {
        __syncwarp();
        cute::cluster_arrive();
        cute::cluster_wait();
    }
}

/// kN columns of k's rows from `row` on. The blocks of a cluster work on tiles one above the other: each copies its share for both.
template <uint32_t kCluster> __device__ void copy_b(const cute::TmaDescriptor* map, Barrier* arrived, Bf16* to, uint32_t column, uint32_t row) {
    if constexpr (kCluster == 1) dg::tma::copy<kN, kK, kSwizzle>(map, arrived, to, column, row);
    else {
        constexpr uint32_t kAtom = kSwizzle / sizeof(Bf16), kShare = kN / kAtom / kCluster;
#pragma unroll
        for (uint32_t i = 0; i < kShare; ++i) {
            const uint32_t atom = cute::block_rank_in_cluster() * kShare + i;
            cute::SM90_TMA_LOAD_MULTICAST_2D::copy(map, reinterpret_cast<uint64_t*>(arrived), uint16_t((1 << kCluster) - 1), uint64_t(cute::TMA::CacheHintSm90::EVICT_NORMAL), to + atom * kK * kAtom,
                                                   column + atom * kAtom, row);
        }
    }
}

template <class G, bool kAdds, uint32_t kCluster>
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
            empty[i].init(8 * kCluster);            // a thread of every warp that multiplies what lies there
        }
        cutlass::arch::fence_barrier_init();
    }
    meet<kCluster>();
    auto release = [&](uint32_t stage) {
        if constexpr (kCluster == 1) {
            if (lane == 0) empty[stage].arrive();
        } else {
            if (lane < kCluster) empty[stage].arrive(lane);
        }
    };

    dg::sched::TilesAlongK<kM, kN, kBand, !kAdds> tiles(m, n, groups, const_cast<int*>(offsets));
    Ring ring;
    uint32_t m_block, n_block;
    if (warp >= 8) {
        cutlass::arch::warpgroup_reg_dealloc<40>();
        const bool copies = warp == 8 && cute::elect_one_sync();
        while (copies && tiles.get_next_block(m_block, n_block)) {
            const uint32_t steps = (tiles.current_shape_k + kK - 1) / kK;
            for (uint32_t k = 0; k < steps; ++k, ring.next()) {
                empty[ring.stage].wait(ring.phase ^ 1);
                Barrier& arrived = full[ring.stage];
                const uint32_t row = tiles.current_k_start + k * kK;
                dg::tma::copy<kM, kK, kSwizzle>(&map_a, &arrived, a_of(ring.stage), m_block * kM, row);
                copy_b<kCluster>(&map_b, &arrived, b_of(ring.stage), n_block * kN, row);
                arrived.arrive_and_expect_tx(kBytesA + kBytesB);
            }
        }
        if constexpr (kCluster > 1) meet<kCluster>();          // nobody leaves while others copy to it or release to it
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
        if (kAdds && steps == 0) continue;
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
            if (k > 0) release(before);
            before = ring.stage;
        }
        dg::ptx::warpgroup_wait<0>();
#pragma unroll
        for (float& s : sum) dg::ptx::warpgroup_fence_operand(s);
        release(before);
        const uint32_t row = m_block * kM + half * 64 + warp % 4 * 16 + lane / 4;
        squares += write_tile<kAdds>(sum, static_cast<G*>(out.d) + (uint64_t(tiles.current_group_idx) * m + row) * n + n_block * kN, n, n - n_block * kN);
    }
    squares = warp_sum(squares);
    if (out.squares && lane == 0) out.squares[blockIdx.x * kSumsPerBlock + warp] = squares;
    if constexpr (kCluster > 1) meet<kCluster>();
}
}  // namespace

template <class G, bool kAdds> Instance sums_instance(bool pairs) {
    return {pairs ? reinterpret_cast<const void*>(&sums<G, kAdds, 2>) : reinterpret_cast<const void*>(&sums<G, kAdds, 1>), kM, kN, kStages, pairs ? 2u : 1u};
}
Instance bf16_tn_instance(Sums form, bool pairs) {
    return form == Sums::fp32 ? sums_instance<float, false>(pairs) : form == Sums::bf16 ? sums_instance<__nv_bfloat16, false>(pairs) : sums_instance<__nv_bfloat16, true>(pairs);
}
}  // namespace moe::kernels::sm90
