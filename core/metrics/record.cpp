#include "core/metrics/record.h"

#include "core/base/crc32c.h"
#include "core/base/error.h"

#include <cstring>

namespace moe::metrics {

RecordWriter::RecordWriter(RecordKind kind, int64_t attempt, int64_t step) {
    MOE_CHECK(attempt >= 0 && attempt <= int64_t(UINT32_MAX), usage, "metrics.write", fmt::format("attempt {}", attempt), "0 to 4294967295", "");
    put(uint8_t(kind));
    put(uint32_t(attempt));
    put(step);
}

void RecordWriter::put_name(std::string_view name) {
    MOE_CHECK(name.size() <= UINT16_MAX, usage, "metrics.write", fmt::format("a name of {} bytes", name.size()), "at most 65535", "");
    put(uint16_t(name.size()));
    bytes_.append(name);
}

std::string_view RecordReader::take(size_t size) {
    if (size > rest_.size()) fail(fmt::format("a record that ends {} bytes early", size - rest_.size()));
    std::string_view bytes = rest_.substr(0, size);
    rest_.remove_prefix(size);
    return bytes;
}

void RecordReader::fail(const std::string& what) const { MOE_THROW(data, "metrics.read", fmt::format("{}: {}", path_, what), "a run log of this version", ""); }

Frame next_frame(std::string_view bytes, bool is_end) {
    if (bytes.size() < size_t(kFrameBytes)) return {FrameState::incomplete, {}, kFrameBytes};
    uint32_t length, crc;
    std::memcpy(&length, bytes.data(), 4);
    std::memcpy(&crc, bytes.data() + 4, 4);
    if (length < kMinPayloadBytes || length > kMaxPayloadBytes) {
        bool zeros = is_end && bytes.find_first_not_of('\0') == std::string_view::npos;
        return {zeros ? FrameState::incomplete : FrameState::damaged, {}, kFrameBytes};
    }
    int64_t needed = kFrameBytes + length;
    if (int64_t(bytes.size()) < needed) return {FrameState::incomplete, {}, needed};
    std::string_view payload = bytes.substr(size_t(kFrameBytes), length);
    if (crc32c(payload.data(), payload.size()) == crc) return {FrameState::whole, payload, needed};
    return {is_end && int64_t(bytes.size()) == needed ? FrameState::incomplete : FrameState::damaged, {}, needed};
}

std::string framed(const std::string& payload) {
    MOE_CHECK(int64_t(payload.size()) <= kMaxPayloadBytes, usage, "metrics.write", fmt::format("a record of {} bytes", payload.size()), fmt::format("at most {}", kMaxPayloadBytes), "");
    uint32_t head[2] = {uint32_t(payload.size()), crc32c(payload.data(), payload.size())};
    return std::string(reinterpret_cast<const char*>(head), sizeof head) + payload;
}

}  // namespace moe::metrics
