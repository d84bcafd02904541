// CUDA runtime errors as moe::Error, and what a *_cuda.cpp file needs to call a launcher. Only for builds with CUDA.
#pragma once
#include "core/kernels/common/sm90.h"
#include "core/tensor/check.h"

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

/// MOE_CUDA_CHECK(call): throws moe::Error (cuda) with the runtime's text unless the call gives cudaSuccess.
#define MOE_CUDA_CHECK(call)                                                                                                            \
    do {                                                                                                                                \
        if (cudaError_t moe_error = (call); moe_error != cudaSuccess)                                                                   \
            MOE_THROW(cuda, #call, std::string(cudaGetErrorName(moe_error)) + ": " + cudaGetErrorString(moe_error), "cudaSuccess",       \
                      "an earlier kernel may have failed: CUDA_LAUNCH_BLOCKING=1 shows which");                                         \
    } while (false)

namespace moe::kernels {
/// Makes a tensor's device the current one and holds its current stream.
struct OnDevice {
    c10::cuda::CUDAGuard guard;
    cudaStream_t stream;
    explicit OnDevice(const at::Tensor& t) : guard(t.device()), stream(c10::cuda::getCurrentCUDAStream(t.device().index()).stream()) {}
};

/// Throws moe::Error (dtype) unless fp64, fp32, bf16 or fp16.
inline sm90::Dtype sm90_dtype(std::string_view op, const at::Tensor& t) {
    if (t.scalar_type() == at::kFloat) return sm90::Dtype::fp32;
    if (t.scalar_type() == at::kDouble) return sm90::Dtype::fp64;
    if (t.scalar_type() == at::kHalf) return sm90::Dtype::fp16;
    check_float(op, {"tensor", t});
    return sm90::Dtype::bf16;
}

/// nullptr for an undefined tensor.
inline const void* in_pointer(const at::Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }
inline void* out_pointer(const at::Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; }
}  // namespace moe::kernels
