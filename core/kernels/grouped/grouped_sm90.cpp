// The host side of the grouped products: descriptors, arguments, launch. No LibTorch.
#ifdef MOE_WITH_CUDA
#include "core/kernels/grouped/grouped_sm90.h"

#include "core/kernels/grouped/sm90/instance.h"
#include "core/kernels/grouped/tensor_map.h"

#include <algorithm>
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

    /// shared_bytes where the product's size has a say in it.
    cudaError_t launch(int blocks, void** arguments, cudaStream_t stream, uint32_t shared_bytes = 0) {
        int device = 0;
        if (cudaError_t failed = cudaGetDevice(&device); failed != cudaSuccess) return failed;
        const uint64_t bit = uint64_t(1) << (device % 64);
        if (!(ready_.load() & bit)) {
            if (cudaError_t failed = cudaFuncSetAttribute(instance_.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes_)); failed != cudaSuccess) return failed;
            ready_ |= bit;
        }
        if (blocks == 0) blocks = device_value(cudaDevAttrMultiProcessorCount);
        cudaLaunchAttribute cluster{};
        cluster.id = cudaLaunchAttributeClusterDimension;
        cluster.val.clusterDim = {instance_.cluster, 1, 1};
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(std::max(unsigned(blocks) / instance_.cluster, 1u) * instance_.cluster);
        config.blockDim = dim3(kInstanceThreads);
        config.dynamicSmemBytes = shared_bytes ? shared_bytes : shared_bytes_;
        config.stream = stream;
        config.attrs = &cluster;
        config.numAttrs = instance_.cluster > 1 ? 1 : 0;
        return cudaLaunchKernelExC(&config, instance_.kernel, arguments);
    }

private:
    Instance instance_;
    uint32_t shared_bytes_;
    std::atomic<uint64_t> ready_{0};
};

/// The matrices of a product, and the numbers that the kernel is called with. d is the result's map, or its address where the kernel writes it by itself.
cudaError_t launch_bf16(Kernel& kernel, const GroupedShape& s, uint32_t m, uint32_t n, uint32_t k, const MapKey& a, const MapKey& b, const std::variant<MapKey, Written>& d, cudaStream_t stream) {
    CUtensorMap maps[3];
    if (tensor_map(a, maps[0]) != CUDA_SUCCESS || tensor_map(b, maps[1]) != CUDA_SUCCESS) return cudaErrorInvalidValue;
    if (auto* map = std::get_if<MapKey>(&d); map && tensor_map(*map, maps[2]) != CUDA_SUCCESS) return cudaErrorInvalidValue;
    const int* offsets = s.offsets;
    Written written = std::holds_alternative<Written>(d) ? std::get<Written>(d) : Written{};
    void* result = written.d ? static_cast<void*>(&written) : &maps[2];
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

int square_parts() { return device_value(cudaDevAttrMultiProcessorCount) * kSumsPerBlock; }

namespace {
template <Sums form> cudaError_t launch_sums(const GroupedShape& s, const void* dy, const void* x, const Written& written, cudaStream_t stream) {
    static Kernel single(bf16_tn_instance(form, false), bf16_shared_bytes(bf16_tn_instance(form, false), 0)), pairs(bf16_tn_instance(form, true), bf16_shared_bytes(bf16_tn_instance(form, true), 0));
    Kernel& kernel = s.out % (2 * single.instance().block_m) == 0 ? pairs : single;
    return launch_bf16(kernel, s, uint32_t(s.out), uint32_t(s.in), uint32_t(s.groups), matrix(dy, s.rows, s.out, kBlockK), matrix(x, s.rows, s.in, kBlockK), written, stream);
}
}  // namespace

cudaError_t add_grouped_tn_bf16(const GroupedShape& s, const void* dy, const void* x, void* dw, Dtype dw_dtype, cudaStream_t stream) {
    if (nothing(s)) return cudaSuccess;
    if (dw_dtype == Dtype::bf16) return launch_sums<Sums::add_bf16>(s, dy, x, Written{dw, nullptr}, stream);
    static Kernel kernel(bf16_add_tn_instance(), bf16_shared_bytes(bf16_add_tn_instance(), 4));
    const Instance& i = kernel.instance();
    const MapKey result{dw, uint64_t(s.in), uint64_t(s.groups * s.out), i.block_n, i.block_m, kFp32, false};
    return launch_bf16(kernel, s, uint32_t(s.out), uint32_t(s.in), uint32_t(s.groups), matrix(dy, s.rows, s.out, kBlockK), matrix(x, s.rows, s.in, kBlockK), result, stream);
}

cudaError_t grouped_tn_bf16(const GroupedShape& s, const void* dy, const void* x, void* dw, Dtype dw_dtype, double* squares, cudaStream_t stream) {
    if (nothing(s)) {
        if (squares)
            if (auto error = cudaMemsetAsync(squares, 0, size_t(square_parts()) * sizeof(double), stream); error != cudaSuccess) return error;
        return cudaMemsetAsync(dw, 0, size_t(s.groups * s.out * s.in) * (dw_dtype == Dtype::bf16 ? 2 : 4), stream);
    }
    const Written written{dw, squares};
    return dw_dtype == Dtype::bf16 ? launch_sums<Sums::bf16>(s, dy, x, written, stream) : launch_sums<Sums::fp32>(s, dy, x, written, stream);
}

namespace {
constexpr uint32_t kFp8BlockK = 128, kMostSharedBytes = 232448;

/// In the order of DeepGEMM's kernel: the tile of the result, tiles of A and B, A's scales, B's for all of k, barriers.
uint32_t fp8_shared_bytes(const Instance& i, int64_t k) {
    const uint32_t fixed = (i.block_m * i.block_n * 2 + 1023) / 1024 * 1024 + i.stages * ((i.block_m + i.block_n) * kFp8BlockK + 16 + i.block_m * 4);
    const uint32_t scales = uint32_t((k + 127) / 128) * 4 * (128 % i.block_n ? 2 : 1);
    return fixed + (scales + 7) / 8 * 8;
}

/// d [rows, n] = a [rows, k] b [groups, n, k]ᵀ.
cudaError_t launch_fp8(Kernel& kernel, const GroupedShape& s, int64_t n, int64_t k, Fp8 a, Fp8 b, void* d, cudaStream_t stream) {
    constexpr auto kFp8 = CU_TENSOR_MAP_DATA_TYPE_UINT8;
    const Instance& i = kernel.instance();
    const uint64_t scale_pitch = uint64_t(s.rows + 3) / 4 * 4;
    const MapKey keys[4] = {{a.q, uint64_t(k), uint64_t(s.rows), kFp8BlockK, i.block_m, kFp8, true},
                            {b.q, uint64_t(k), uint64_t(s.groups * n), kFp8BlockK, i.block_n, kFp8, true},
                            {d, uint64_t(n), uint64_t(s.rows), kSwizzled, i.block_m, kBf16, true},
                            {a.scales, scale_pitch, uint64_t(k + 127) / 128, i.block_m, 1, kFp32, false}};
    CUtensorMap maps[4];
    for (int m = 0; m < 4; ++m)
        if (tensor_map(keys[m], maps[m]) != CUDA_SUCCESS) return cudaErrorInvalidValue;
    const float* scales = b.scales;
    const int* offsets = s.offsets;
    uint32_t groups_or_rows = uint32_t(offsets ? s.groups : s.rows), n32 = uint32_t(n), k32 = uint32_t(k);
    void* arguments[] = {&scales, &offsets, &groups_or_rows, &n32, &k32, &maps[0], &maps[1], &maps[2], &maps[3]};
    return kernel.launch(s.blocks, arguments, stream, fp8_shared_bytes(i, k));
}
}  // namespace

// Shared memory holds the scales of w for all of k.
bool grouped_fp8_fits(int64_t out, int64_t in) { return out % 16 == 0 && in % 16 == 0 && std::max(out, in) <= 65536; }

cudaError_t grouped_nt_fp8(const GroupedShape& s, Fp8 x, Fp8 w, void* y, cudaStream_t stream) {
    if (nothing(s)) return cudaSuccess;
    static Kernel kernel(fp8_nt_instance(), kMostSharedBytes);
    return launch_fp8(kernel, s, s.out, s.in, x, w, y, stream);
}
cudaError_t grouped_nn_fp8(const GroupedShape& s, Fp8 dy, Fp8 transposed_w, void* dx, cudaStream_t stream) {
    if (nothing(s)) return cudaSuccess;
    static Kernel kernel(fp8_nn_instance(), kMostSharedBytes);
    return launch_fp8(kernel, s, s.in, s.out, dy, transposed_w, dx, stream);
}
}  // namespace moe::kernels::sm90
#endif
