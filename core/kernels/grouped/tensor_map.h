// Descriptors by which Hopper's tensor memory accelerator copies tiles. Only for builds with CUDA.
#pragma once
#include <cuda.h>

#include <cstdint>

namespace moe::kernels::sm90 {

/// A row-major matrix [outer, inner] and the tile of it that one copy moves. Tiles that reach over the edge read zeros and write only what is inside.
struct MapKey {
    const void* base;
    uint64_t inner, outer;
    uint32_t box_inner, box_outer;      ///< at most 256 each
    CUtensorMapDataType type;
    bool swizzled;                      ///< rows of 128 bytes in shared memory, in the order that avoids bank conflicts: box_inner is 128 bytes
    bool operator==(const MapKey&) const = default;
};

/// Writes the descriptor, from this thread's cache where the same was made before: a matrix that comes again, as weights do, costs no call into the driver.
/// It says where a matrix lies, not what is in it, so a descriptor cannot go stale.
CUresult tensor_map(const MapKey& key, CUtensorMap& map);

}  // namespace moe::kernels::sm90
