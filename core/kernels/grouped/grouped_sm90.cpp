// The host side of the grouped products: descriptors, arguments, launch. No LibTorch.
#ifdef MOE_WITH_CUDA
#include "core/kernels/grouped/grouped_sm90.h"

#include "core/kernels/grouped/sm90/instance.h"
#include "core/kernels/grouped/tensor_map.h"

#include <atomic>
#include <variant>

namespace moe::kernels::sm90 {
namespace {
constexpr auto kBf16 = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, kFp32 = CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
constexpr uint32_t kBlockK = 64, kSwizzled = 64;              // in bf16: a step along k; elements of a swizzled row

/// What a block keeps in shared memory, in the order of DeepGEMM's kernels: the tile of the result, then per stage a tile of A, of B and two barriers.
constexpr uint32_t bf16_shared_bytes(const Instance& i, uint32_t result_bytes) {
    return (i.block_m * i.block_n * result_bytes + 1023) / 1024 * 1024 + i.stages * ((i.block_m + i.block_n) * kBlockK * 2 + 16);
}

int device_value(cudaDeviceAttr what) {
    int device = 0, value = 0;
    if (cudaGetDevice(&device) != cudaSuccess || cudaDeviceGetAttribute(&value, what, device) != cudaSuccess) return 0;
    return value;
}

/// An instance that has been told once on every device how much shared memory it takes.
class Kernel {
public:
    Kernel(const Instance& instance, uint32_t shared_bytes) : instance_(instance), shared_bytes_(shared_bytes) {}
    const Instance& instance() const { return instance_; }

    cudaError_t launch(int blocks, void** arguments, cudaStream_t stream) {
        int device = 0;
        if (cudaError_t failed = cudaGetDevice(&device); failed != cudaSuccess) return failed;
        const uint64_t bit = uint64_t(1) << (device % 64);
        if (!(ready_.load() & bit)) {
            if (cudaError_t failed = cudaFuncSetAttribute(instance_.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes_)); failed != cudaSuccess) return failed;
            ready_ |= bit;
        }
        if (blocks == 0) blocks = device_value(cudaDevAttrMultiProcessorCount);
        return cudaLaunchKernel(instance_.kernel, dim3(unsigned(blocks)), dim3(kInstanceThreads), arguments, shared_bytes_, stream);
    }

private:
    Instance instance_;
    uint32_t shared_bytes_;
    std::atomic<uint64_t> ready_{0};
};

/// The matrices of a product, and the numbers that the kernel is called with. d is the result's map, or its address where the kernel writes by itself.
cudaError_t launch_bf16(Kernel& kernel, const GroupedShape& s, uint32_t m, uint32_t n, uint32_t k, const MapKey& a, const MapKey& b, const std::variant<MapKey, float*>& d, cudaStream_t stream) {
    CUtensorMap maps[3];
    if (tensor_map(a, maps[0]) != CUDA_SUCCESS || tensor_map(b, maps[1]) != CUDA_SUCCESS) return cudaErrorInvalidValue;
    if (auto* map = std::get_if<MapKey>(&d); map && tensor_map(*map, maps[2]) != CUDA_SUCCESS) return cudaErrorInvalidValue;
    const int* offsets = s.offsets;
    float* address = std::holds_alternative<float*>(d) ? std::get<float*>(d) : nullptr;
    void* result = address ? static_cast<void*>(&address) : &maps[2];
    void* arguments[] = {&offsets, &m, &n, &k, &maps[0], &maps[1], result};
    return kernel.launch(s.blocks, arguments, stream);
}

MapKey matrix(const void* base, int64_t outer, int64_t inner, uint32_t box_outer) {
    return {base, uint64_t(inner), uint64_t(outer), kSwizzled, box_outer, kBf16, true};
}
bool nothing(const GroupedShape& s) { return s.groups == 0 || s.rows == 0 || s.out == 0 || s.in == 0; }
}  // namespace

bool grouped_device() { return device_value(cudaDevAttrComputeCapabilityMajor) == 9 && device_value(cudaDevAttrComputeCapabilityMinor) == 0; }

// Pitches are multiples of 16 bytes. Tiles of dw must not reach into the next group's, where what they add is zero only as long as x is finite, and steps
// over out must not either.
bool grouped_bf16_fits(int64_t out, int64_t in) { return out % 128 == 0 && in % 8 == 0; }

cudaError_t grouped_nt_bf16(const GroupedShape& s, const void* x, const void* w, void* y, cudaStream_t stream) {
    if (nothing(s)) return cudaSuccess;
    static Kernel kernel(bf16_nt_instance(), bf16_shared_bytes(bf16_nt_instance(), 2));
    const Instance& i = kernel.instance();
    return launch_bf16(kernel, s, uint32_t(s.groups), uint32_t(s.out), uint32_t(s.in), matrix(x, s.rows, s.in, i.block_m), matrix(w, s.groups * s.out, s.in, i.block_n),
                       matrix(y, s.rows, s.out, i.block_m), stream);
}

cudaError_t grouped_nn_bf16(const GroupedShape& s, const void* dy, const void* w, void* dx, cudaStream_t stream) {
    if (nothing(s)) return cudaSuccess;
    static Kernel kernel(bf16_nn_instance(), bf16_shared_bytes(bf16_nn_instance(), 2));
    const Instance& i = kernel.instance();
    return launch_bf16(kernel, s, uint32_t(s.groups), uint32_t(s.in), uint32_t(s.out), matrix(dy, s.rows, s.out, i.block_m), matrix(w, s.groups * s.out, s.in, kBlockK),
                       matrix(dx, s.rows, s.in, i.block_m), stream);
}

cudaError_t add_grouped_tn_bf16(const GroupedShape& s, const void* dy, const void* x, float* dw, cudaStream_t stream) {
    if (nothing(s)) return cudaSuccess;
    static Kernel kernel(bf16_add_tn_instance(), bf16_shared_bytes(bf16_add_tn_instance(), 4));
    const Instance& i = kernel.instance();
    const MapKey result{dw, uint64_t(s.in), uint64_t(s.groups * s.out), i.block_n, i.block_m, kFp32, false};
    return launch_bf16(kernel, s, uint32_t(s.out), uint32_t(s.in), uint32_t(s.groups), matrix(dy, s.rows, s.out, kBlockK), matrix(x, s.rows, s.in, kBlockK), result, stream);
}

cudaError_t grouped_tn_bf16(const GroupedShape& s, const void* dy, const void* x, float* dw, cudaStream_t stream) {
    if (s.groups == 0 || s.out == 0 || s.in == 0) return cudaSuccess;
    if (s.rows == 0) return cudaMemsetAsync(dw, 0, size_t(s.groups * s.out * s.in) * sizeof(float), stream);
    static Kernel kernel(bf16_tn_instance(), bf16_shared_bytes(bf16_tn_instance(), 0));
    return launch_bf16(kernel, s, uint32_t(s.out), uint32_t(s.in), uint32_t(s.groups), matrix(dy, s.rows, s.out, kBlockK), matrix(x, s.rows, s.in, kBlockK), dw, stream);
}
}  // namespace moe::kernels::sm90
#endif
