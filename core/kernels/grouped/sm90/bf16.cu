// DeepGEMM's bf16 kernel with the schedulers of tiles.cuh. One file for all instances: reading the headers takes most of the time.
#include "core/kernels/grouped/sm90/instance.h"
#include "core/kernels/grouped/sm90/tiles.cuh"

#include <deep_gemm/impls/sm90_bf16_gemm.cuh>

namespace moe::kernels::sm90 {
namespace {
using deep_gemm::GemmType;
constexpr auto kAlongK = cute::UMMA::Major::K, kAcrossK = cute::UMMA::Major::MN;      // an operand's contiguous direction
constexpr uint32_t kSwizzle = 128, kBlockK = 64, kUsualBlocks = 132;                  // the last is only a guess for the order of tiles

template <uint32_t kBlockM, uint32_t kBlockN, uint32_t kStages, cute::UMMA::Major kMajorB> Instance groups_of_rows() {
    auto* kernel = &deep_gemm::sm90_bf16_gemm_impl<kAlongK, kMajorB, 0, 0, 0, kGroupsAtRunTime, kBlockM, kBlockN, kBlockK, kSwizzle, kSwizzle, kSwizzle, kStages, 128, 256, 1, false,
                                                   kUsualBlocks, GemmType::MGroupedContiguousWithPsumLayout, false, cutlass::bfloat16_t>;
    return {reinterpret_cast<const void*>(kernel), kBlockM, kBlockN, kStages};
}
template <uint32_t kBlockM, uint32_t kBlockN, uint32_t kStages> Instance groups_along_k() {
    auto* kernel = &deep_gemm::sm90_bf16_gemm_impl<kAcrossK, kAcrossK, 0, 0, 0, kGroupsAtRunTime, kBlockM, kBlockN, kBlockK, kSwizzle, kSwizzle, 0, kStages, 128, 256, 1, false,
                                                   kUsualBlocks, GemmType::KGroupedContiguous, true, float>;
    return {reinterpret_cast<const void*>(kernel), kBlockM, kBlockN, kStages};
}
}  // namespace

Instance bf16_nt_instance() { return groups_of_rows<128, 256, 3, kAlongK>(); }
Instance bf16_nn_instance() { return groups_of_rows<128, 256, 3, kAcrossK>(); }
Instance bf16_add_tn_instance() { return groups_along_k<128, 128, 5>(); }
}  // namespace moe::kernels::sm90
