#include "core/train/hardware.h"

#include "core/base/error.h"
#include "core/base/host_memory.h"
#include "core/kernels/linear/linear.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#ifdef MOE_WITH_CUDA
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#endif

#include <chrono>
#include <fstream>
#include <map>

namespace moe::train {
namespace {
struct Peak { const char* name; double bf16, fp32, fp64; };          // fp16 has the rate of bf16
/// Makers' data sheets, dense, SXM boards where there are several; first match wins, so GB200 stands before B200.
constexpr Peak kPeaks[] = {{"GB200", 2450e12, 80e12, 40e12}, {"B200", 2250e12, 80e12, 40e12}, {"H200", 989e12, 67e12, 67e12},
                           {"H100", 989e12, 67e12, 67e12},   {"A100", 312e12, 19.5e12, 19.5e12}};

/// A line "key : value" of a file in /proc.
std::string proc_field(const char* file, const std::string& key) {
    std::ifstream in(file);
    for (std::string line; std::getline(in, line);)
        if (line.starts_with(key)) {
            auto at = line.find(':');
            auto start = line.find_first_not_of(" \t", at + 1);
            return start == std::string::npos ? "" : line.substr(start);
        }
    return "";
}

double measured_cpu_flops(at::ScalarType type) {
    at::NoGradGuard no_grad;
    int64_t n = 768;
    at::Tensor a = at::ones({n, n}, type), b = at::ones({n, n}, type), c = at::empty({n, n}, type);
    double best = 0;
    for (int i = 0; i < 12; ++i) {                      // the best of many: other work may take the processors for some
        auto t = std::chrono::steady_clock::now();
        at::mm_out(c, a, b);
        best = std::max(best, 2.0 * double(n * n * n) / std::chrono::duration<double>(std::chrono::steady_clock::now() - t).count());
    }
    return best;
}
}  // namespace

std::string device_name(at::Device device) {
#ifdef MOE_WITH_CUDA
    if (device.is_cuda()) return at::cuda::getDeviceProperties(device.index())->name;
#endif
    std::string name = proc_field("/proc/cpuinfo", "model name");
    return name.empty() ? "CPU" : name;
}

double peak_flops(at::Device device, const Precision& precision) {
    if (device.is_cpu()) {
        static std::map<at::ScalarType, double> measured;
        bool bf16 = precision.compute == at::kBFloat16 && kernels::has_bf16_products();      // else products of bf16 and fp16 operands are fp32 ones
        auto type = precision.compute == at::kDouble ? at::kDouble : bf16 ? at::kBFloat16 : at::kFloat;
        auto [it, fresh] = measured.try_emplace(type, 0);
        if (fresh) it->second = measured_cpu_flops(type);
        return it->second;
    }
    std::string name = device_name(device);
    for (auto& p : kPeaks)
        if (name.find(p.name) != std::string::npos) return at::isReducedFloatingType(precision.compute) ? p.bf16 : precision.compute == at::kFloat ? p.fp32 : p.fp64;
    return 0;
}

double peak_memory_bytes(at::Device device) {
#ifdef MOE_WITH_CUDA
    if (device.is_cuda()) {
        auto stats = c10::cuda::CUDACachingAllocator::getDeviceStats(device.index());
        return double(stats.allocated_bytes[size_t(c10::CachingAllocator::StatType::AGGREGATE)].peak);
    }
#endif
    return std::strtod(proc_field("/proc/self/status", "VmHWM").c_str(), nullptr) * 1024;
}

double obtainable_memory_bytes(at::Device device) {
#ifdef MOE_WITH_CUDA
    if (device.is_cuda()) {
        auto stats = c10::cuda::CUDACachingAllocator::getDeviceStats(device.index());
        c10::cuda::CUDAGuard guard(device);
        size_t free = 0, total = 0;
        C10_CUDA_CHECK(cudaMemGetInfo(&free, &total));
        return double(free) + double(stats.reserved_bytes[size_t(c10::CachingAllocator::StatType::AGGREGATE)].current);
    }
#endif
    return double(host_memory().available) + std::strtod(proc_field("/proc/self/status", "VmRSS").c_str(), nullptr) * 1024;
}

void release_cached_memory(at::Device device) {
#ifdef MOE_WITH_CUDA
    if (device.is_cuda()) c10::cuda::CUDACachingAllocator::emptyCache();
#endif
}

bool built_with_cuda() {
#ifdef MOE_WITH_CUDA
    return true;
#else
    return false;
#endif
}

std::vector<Gpu> gpus() {
    std::vector<Gpu> list;
#ifdef MOE_WITH_CUDA
    for (int i = 0; i < c10::cuda::device_count(); ++i) {
        auto* p = at::cuda::getDeviceProperties(i);
        list.push_back({p->name, int64_t(p->totalGlobalMem), p->major, p->minor});
    }
#endif
    return list;
}

at::Device choose_device(const std::string& wanted) {
    MOE_CHECK(wanted.empty() || wanted == "cpu" || wanted == "cuda", config, "device", wanted, "cpu or cuda", "null takes cuda where there is a GPU");
    int gpus = 0;
#ifdef MOE_WITH_CUDA
    gpus = c10::cuda::device_count();
#endif
    if (wanted == "cpu" || (wanted.empty() && gpus == 0)) return at::kCPU;
    MOE_CHECK(gpus > 0, device, "device", "cuda, and no GPU is seen", "a GPU", "use device=cpu, or build and run where CUDA is");
    return at::Device(at::kCUDA, 0);
}

}  // namespace moe::train
