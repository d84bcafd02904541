// Which device's kernel runs.
#pragma once
#include "core/tensor/check.h"

namespace moe::kernels {
/// Throws moe::Error (device) unless the tensor is on the CPU: for builds without CUDA parts.
inline void check_on_cpu(std::string_view op, const at::Tensor& t) {
    MOE_CHECK(t.is_cpu(), device, std::string(op), t.device().str(), "cpu", "this build has no CUDA parts: configure with MOE_CUDA=on");
}
/// Throws moe::Error (device) unless the tensor is on the CPU or a CUDA device.
inline void check_known_device(std::string_view op, const at::Tensor& t) {
    MOE_CHECK(t.is_cpu() || t.is_cuda(), device, std::string(op), t.device().str(), "cpu or cuda", "");
}
}  // namespace moe::kernels

/// MOE_BY_DEVICE("rmsnorm", x, rmsnorm_forward, x, …): rmsnorm_forward_cpu(x, …) or rmsnorm_forward_cuda(x, …) by x's device.
#ifdef MOE_WITH_CUDA
#define MOE_BY_DEVICE(op, tensor, name, ...) \
    (::moe::kernels::check_known_device(op, tensor), (tensor).is_cuda() ? name##_cuda(__VA_ARGS__) : name##_cpu(__VA_ARGS__))
#else
#define MOE_BY_DEVICE(op, tensor, name, ...) (::moe::kernels::check_on_cpu(op, tensor), name##_cpu(__VA_ARGS__))
#endif
