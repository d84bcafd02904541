// What the launchers of all *_sm90.cu files share. Plain C++: no LibTorch, so that .cu files stay quick to compile.
// A launcher takes raw device pointers and a stream, returns cudaGetLastError(), never synchronises, and does nothing for
// empty inputs (a grid of no blocks is an error of the runtime).
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace moe::kernels::sm90 {
/// Element type behind a void pointer.
enum class Dtype : int { fp32, fp64, bf16, fp16 };
}  // namespace moe::kernels::sm90
