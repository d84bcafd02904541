#include "core/kernels/mla_decode/mla_decode_sm90.h"

#include "core/kernels/common/device_sm90.cuh"
#include "core/kernels/mla_decode/combine_sm90.cuh"
#include "core/kernels/mla_decode/fp8_sm90.cuh"
#include "core/kernels/mla_decode/general_sm90.cuh"
#include "core/kernels/mla_decode/mma_sm90.cuh"
#include "core/kernels/mla_decode/wgmma_sm90.cuh"

#include <cudaTypedefs.h>

namespace moe::kernels::sm90 {
namespace {
int multiprocessors() {
    int device = 0, n = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, device);
    return n;
}

/// What a variant is made of: rows that a block takes.
struct Plan {
    int variant, rows;
    int groups(const MlaDecode& p) const { return (p.Q * p.H + rows - 1) / rows; }
    int workers(const MlaDecode& p) const { return std::max(1, multiprocessors() / groups(p)); }
};

bool fits(const MlaDecode& p) {
    auto strided = [](const void* x, int64_t a, int64_t b) { return aligned({x}) && a % 8 == 0 && b % 8 == 0; };
    return p.variant >= 0 && p.dtype == Dtype::bf16 && p.L == kLatent && p.R == kRope && p.N > 0 && aligned({p.rows, p.out}) && strided(p.q_latent, p.latent_token, p.latent_head) && strided(p.q_rope, p.rope_token, p.rope_head);
}
Plan choose(const MlaDecode& p) {
    const int rows = p.Q * p.H;
    const int variant = p.variant ? p.variant : p.fp8 ? (rows <= 16 ? 3 : 4) : (rows <= 16 ? 1 : 2);
    const int taken[] = {0, 16, 64, 16, 32};
    return {variant, taken[variant]};
}

/// The cache as rows of 576 values, read in boxes of a block and 64 columns, swizzled as ldmatrix and wgmma want them.
cudaError_t make_map(const MlaDecode& p, CUtensorMap& map) {
    static const auto encode = [] {
        void* entry = nullptr;
        cudaDriverEntryPointQueryResult found{};
        const bool there = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found) == cudaSuccess && found == cudaDriverEntryPointSuccess;
        return there ? reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(entry) : nullptr;
    }();
    if (!encode) return cudaErrorNotSupported;
    const cuuint64_t sizes[2] = {cuuint64_t(kLatent + kRope), cuuint64_t(p.N) * kBlockTokens}, strides[1] = {cuuint64_t(kRowBytesPlain)};
    const cuuint32_t box[2] = {64, kBlockTokens}, steps[2] = {1, 1};
    const CUresult result = encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(p.rows), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                   CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

struct Launch {
    const MlaDecode& p;
    Plan plan;
    cudaStream_t stream;

    /// The kernel may be brought onto the device while the one before still runs; it waits for that one's results itself.
    template <class Kernel, class... Args> cudaError_t start(Kernel kernel, dim3 grid, int threads, size_t shared, Args... args) const {
        cudaLaunchAttribute overlap;
        overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        overlap.val.programmaticStreamSerializationAllowed = 1;
        cudaLaunchConfig_t config{};
        config.gridDim = grid, config.blockDim = dim3(threads), config.dynamicSmemBytes = shared, config.stream = stream, config.attrs = &overlap, config.numAttrs = 1;
        return cudaLaunchKernelEx(&config, kernel, args...);
    }
    template <class Kernel> cudaError_t plain(Kernel kernel, int threads, int shared) const {
        CUtensorMap map{};
        if (auto error = make_map(p, map); error != cudaSuccess) return error;
        return parts_then_whole(kernel, threads, shared, map, p);
    }
    template <class Kernel, class... Args> cudaError_t parts_then_whole(Kernel kernel, int threads, int shared, Args... args) const {
        if (auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared); error != cudaSuccess) return error;
        const int workers = plan.workers(p), rows = p.Q * p.H;
        if (auto error = start(kernel, dim3(workers * plan.groups(p)), threads, shared, args..., workers); error != cudaSuccess) return error;
        if (workers >= 8 * p.B) return start(combine_kernel<kCombineWarps>, dim3(rows, p.B), kCombineWarps * 32, 0, p, workers);      // many parts of few sequences
        return start(combine_kernel<1>, dim3((rows + kCombineWarps - 1) / kCombineWarps, p.B), kCombineWarps * 32, 0, p, workers);
    }
    template <class S> cudaError_t fp8() const {
        static_assert(sizeof(Fp8Shared<S>) <= 232448);
        return parts_then_whole(fp8_kernel<S>, S::kThreads, int(sizeof(Fp8Shared<S>)), p);
    }
};
}  // namespace

size_t mla_decode_workspace(const MlaDecode& p) { return fits(p) && p.B > 0 ? Partials::bytes(choose(p).workers(p), p.Q * p.H, p.L) : 0; }

cudaError_t mla_decode(const MlaDecode& given, cudaStream_t stream) {
    if (given.B == 0 || given.Q == 0 || given.H == 0) return cudaSuccess;
    if (!fits(given)) return general_decode(given, stream);
    MlaDecode p = given;
    p.scale_log2 = float(p.scale * 1.4426950408889634);
    const Launch launch{p, choose(p), stream};
    switch (launch.plan.variant) {
        case 1: return launch.plain(mma_kernel, MmaShape::kThreads, int(sizeof(MmaShared)));
        case 3: return launch.fp8<Fp8Shape<16, 4>>();
        case 4: return launch.fp8<Fp8Shape<32, 3>>();
        default: return launch.plain(wgmma_kernel, WgmmaShape::kThreads, int(sizeof(WgmmaShared)));
    }
}
static_assert(sizeof(WgmmaShared) <= 232448 && sizeof(MmaShared) <= 232448);

cudaError_t append_latent(const AppendLatent& p, cudaStream_t stream) {
    if (p.T == 0) return cudaSuccess;
    return general_append(p, stream);
}
}  // namespace moe::kernels::sm90
