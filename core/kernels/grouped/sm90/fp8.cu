// DeepGEMM's kernel for E4M3 with a scale for 128 elements of a row of A and for 128 x 128 of B: products of 128 along k are added up in fp32.
#include "core/kernels/grouped/sm90/instance.h"
#include "core/kernels/grouped/sm90/tiles.cuh"

#include <deep_gemm/impls/sm90_fp8_gemm_1d2d.cuh>

namespace moe::kernels::sm90 {
namespace {
using deep_gemm::GemmType;
constexpr uint32_t kSwizzle = 128, kBlockK = 128, kUsualBlocks = 132;

/// kScales: along k, or across where w was transposed and its scales were not.
template <uint32_t kBlockM, uint32_t kBlockN, uint32_t kStages, uint32_t kCluster, cute::UMMA::Major kScales> Instance fp8_rows() {
    auto* kernel = &deep_gemm::sm90_fp8_gemm_1d2d_impl<kScales, 0, 0, 0, kGroupsInClusters, kBlockM, kBlockN, kBlockK, kSwizzle, kSwizzle, kSwizzle, kStages, 128,
                                                       256, kCluster, false, kUsualBlocks, GemmType::MGroupedContiguousWithPsumLayout, cutlass::bfloat16_t>;
    return {reinterpret_cast<const void*>(kernel), kBlockM, kBlockN, kStages, kCluster};
}
constexpr auto kAlongK = cute::UMMA::Major::K, kAcrossK = cute::UMMA::Major::MN;
}  // namespace

Instance fp8_nt_instance() { return fp8_rows<128, 192, 4, 2, kAlongK>(); }
Instance fp8_nn_instance() { return fp8_rows<128, 192, 4, 2, kAcrossK>(); }
}  // namespace moe::kernels::sm90
