// The checksum of records and tensors.
#pragma once
#include <cstddef>
#include <cstdint>

namespace moe::metrics {

/// CRC-32C (Castagnoli, reflected polynomial 0x82F63B78) of `size` bytes; `crc` is the value of the bytes before, 0 at the start.
/// Source: RFC 3720, B.4.
uint32_t crc32c(const void* data, size_t size, uint32_t crc = 0);

}  // namespace moe::metrics
