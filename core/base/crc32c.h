// The checksum of records and tensors.
#pragma once
#include <cstddef>
#include <cstdint>

namespace moe {

/// CRC-32C (Castagnoli, reflected polynomial 0x82F63B78) of `size` bytes; `crc` is the value of the bytes before, 0 at the start.
/// Source: RFC 3720, B.4.
uint32_t crc32c(const void* data, size_t size, uint32_t crc = 0);
/// The same without the processor's instruction: what other processors run, here for its test.
uint32_t crc32c_by_tables(const void* data, size_t size, uint32_t crc = 0);

}  // namespace moe
