#ifdef MOE_WITH_CUDA
#include "core/kernels/grouped/tensor_map.h"

#include <cuda_runtime_api.h>

#include <vector>

namespace moe::kernels::sm90 {
namespace {
using Encode = decltype(&cuTensorMapEncodeTiled);

/// The driver's function, found through the runtime: nothing links libcuda, which a machine without a GPU does not have.
Encode find_encode() {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result) != cudaSuccess) return nullptr;
    return result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(found) : nullptr;
}

CUresult encode(const MapKey& k, CUtensorMap& map) {
    static const Encode function = find_encode();
    if (!function) return CUDA_ERROR_NOT_SUPPORTED;
    const uint64_t bytes = k.type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4 : k.type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 ? 2 : 1;
    const cuuint64_t sizes[2] = {k.inner, k.outer}, pitch[1] = {k.inner * bytes};
    const cuuint32_t box[2] = {k.box_inner, k.box_outer}, step[2] = {1, 1};
    return function(&map, k.type, 2, const_cast<void*>(k.base), sizes, pitch, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
                    k.swizzled ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

struct Entry {
    MapKey key{};
    CUtensorMap map;
};

size_t slot_of(const MapKey& k, size_t slots) {
    uint64_t h = reinterpret_cast<uint64_t>(k.base) / 16;
    for (uint64_t part : {k.inner, k.outer, uint64_t(k.box_inner) << 32 | k.box_outer, uint64_t(k.type)}) h = (h ^ part) * 0x9e3779b97f4a7c15u;
    return (h >> 40) % slots;
}
}  // namespace

CUresult tensor_map(const MapKey& key, CUtensorMap& map) {
    constexpr size_t kSlots = 1024;
    thread_local std::vector<Entry> cache(kSlots);
    Entry& entry = cache[slot_of(key, kSlots)];
    if (!(entry.key == key)) {
        if (CUresult failed = encode(key, map); failed != CUDA_SUCCESS) return failed;
        entry = {key, map};
    }
    map = entry.map;
    return CUDA_SUCCESS;
}
}  // namespace moe::kernels::sm90
#endif
