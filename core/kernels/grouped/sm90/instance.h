// A product's kernel, compiled from DeepGEMM's templates, and what its launch needs to know. Plain C++: the host side includes no CUTLASS.
#pragma once
#include <cstdint>

namespace moe::kernels::sm90 {

struct Instance {
    const void* kernel;                        ///< __global__ function
    uint32_t block_m, block_n, stages;         ///< a tile of the result, and how many steps along k are in flight
    uint32_t cluster = 1;                      ///< blocks that share tiles
};
constexpr uint32_t kInstanceThreads = 3 * 128;      ///< a warp group that loads and two that multiply

/// bf16 (bf16.cu). nt and nn: groups of rows, result in bf16, w [out, in] read along its rows or across. add_tn: groups along k, added to fp32.
Instance bf16_nt_instance();
Instance bf16_nn_instance();
Instance bf16_add_tn_instance();
/// What bf16_tn writes to: the result, and where wanted sums of the squares of what each warp of each block has written, [blocks, kSumsPerBlock].
struct Written {
    void* d;
    double* squares;
};
constexpr int kSumsPerBlock = 8;
/// Sums written in fp32 or bf16, zeros for a group without rows, or added to bf16.
enum class Sums { fp32, bf16, add_bf16 };
/// Groups along k as Sums says (sums.cu). Takes Written in place of the result's map. With `pairs` by pairs of blocks that share tiles of x, for an even number of
/// tiles above one another.
Instance bf16_tn_instance(Sums form, bool pairs);

/// E4M3 with scales (fp8.cu), groups of rows, result in bf16; w is read along its rows by both, nn's is the transposed one with scales as nt's.
Instance fp8_nt_instance();
Instance fp8_nn_instance();

}  // namespace moe::kernels::sm90
