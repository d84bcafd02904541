#include "core/base/crc32c.h"

#include <array>
#include <cstring>

namespace moe {
namespace {
// Slicing by 8: table k advances a byte over k further zero bytes.
constexpr auto make_crc_tables() {
    std::array<std::array<uint32_t, 256>, 8> tables{};
    for (uint32_t i = 0; i < 256; ++i) {
        uint32_t c = i;
        for (int bit = 0; bit < 8; ++bit) c = c & 1 ? c >> 1 ^ 0x82F63B78u : c >> 1;
        tables[0][i] = c;
    }
    for (size_t k = 1; k < 8; ++k) {
        for (size_t i = 0; i < 256; ++i) tables[k][i] = tables[k - 1][i] >> 8 ^ tables[0][tables[k - 1][i] & 0xff];
    }
    return tables;
}
constexpr auto kCrcTables = make_crc_tables();

uint32_t crc_by_tables(const unsigned char* p, size_t size, uint32_t crc) {
    for (; size >= 8; size -= 8, p += 8) {
        uint32_t low, high;
        std::memcpy(&low, p, 4);
        std::memcpy(&high, p + 4, 4);
        low ^= crc;
        crc = kCrcTables[7][low & 0xff] ^ kCrcTables[6][low >> 8 & 0xff] ^ kCrcTables[5][low >> 16 & 0xff] ^ kCrcTables[4][low >> 24] ^ kCrcTables[3][high & 0xff] ^ kCrcTables[2][high >> 8 & 0xff] ^
              kCrcTables[1][high >> 16 & 0xff] ^ kCrcTables[0][high >> 24];
    }
    for (; size > 0; --size, ++p) crc = crc >> 8 ^ kCrcTables[0][(crc ^ *p) & 0xff];
    return crc;
}

#if defined(__x86_64__)
/// The processor's own instruction for this polynomial: several times the tables' rate, which matters for gigabytes of weights.
__attribute__((target("sse4.2"))) uint32_t crc_by_instruction(const unsigned char* p, size_t size, uint32_t crc) {
    uint64_t wide = crc;
    for (; size >= 8; size -= 8, p += 8) {
        uint64_t word;
        std::memcpy(&word, p, 8);
        wide = __builtin_ia32_crc32di(wide, word);
    }
    crc = uint32_t(wide);
    for (; size > 0; --size, ++p) crc = __builtin_ia32_crc32qi(crc, *p);
    return crc;
}
#endif
}  // namespace

uint32_t crc32c(const void* data, size_t size, uint32_t crc) {
    auto p = static_cast<const unsigned char*>(data);
#if defined(__x86_64__)
    static const bool has_instruction = __builtin_cpu_supports("sse4.2");
    if (has_instruction) return ~crc_by_instruction(p, size, ~crc);
#endif
    return ~crc_by_tables(p, size, ~crc);
}

uint32_t crc32c_by_tables(const void* data, size_t size, uint32_t crc) { return ~crc_by_tables(static_cast<const unsigned char*>(data), size, ~crc); }

}  // namespace moe
