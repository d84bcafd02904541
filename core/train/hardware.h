// What the machine can do and what it used: for tflops, mfu and memory of the log line.
#pragma once
#include "core/tensor/precision.h"

#include <c10/core/Device.h>

#include <cstdint>
#include <string>
#include <vector>

namespace moe::train {

/// Name of the device: the GPU's own, or the processor's model.
std::string device_name(at::Device device);
/// Peak FLOP/s of dense products in the compute type. GPUs: the maker's figures (the table in hardware.cpp; TF32 is off, so fp32
/// is the plain rate), 0 for a GPU or type that is not in it. The CPU: the rate of a product timed once in this process, since no
/// maker's figure describes a virtual machine.
double peak_flops(at::Device device, const Precision& precision);
/// Peak memory in bytes: allocated by LibTorch on a GPU, resident on the CPU.
double peak_memory_bytes(at::Device device);
/// Bytes that this process has or could still take: on a GPU what is free and what LibTorch holds, on the CPU what the host can give and what is resident.
double obtainable_memory_bytes(at::Device device);
/// Gives memory that LibTorch keeps for later back to a GPU; nothing on a CPU.
void release_cached_memory(at::Device device);
/// A GPU as LibTorch sees it.
struct Gpu {
    std::string name;
    int64_t memory_bytes = 0;
    int major = 0, minor = 0;             ///< compute capability
};
/// All of them; none in a build without CUDA and where no driver answers.
std::vector<Gpu> gpus();
/// True where this program was built with CUDA.
bool built_with_cuda();
/// The device of a single rank. `wanted` is "cpu", "cuda", or "" for cuda where LibTorch and this build see a GPU, else the CPU; a
/// wish that cannot be met throws moe::Error (device), another word (config).
at::Device choose_device(const std::string& wanted);

}  // namespace moe::train
