// The bytes of a run log: framing and fields. See run_log.h for the format.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>

namespace moe::metrics {

inline constexpr std::string_view kMagic = "moelog1\n";
inline constexpr int64_t kFrameBytes = 8, kMinPayloadBytes = 13, kMaxPayloadBytes = int64_t(1) << 30;
enum class RecordKind : uint8_t { scalars = 1, matrix = 2 };

/// Builds one payload.
class RecordWriter {
public:
    RecordWriter(RecordKind kind, int64_t attempt, int64_t step);
    template <class T>
    void put(T value) {
        bytes_.append(reinterpret_cast<const char*>(&value), sizeof value);
    }
    /// Throws moe::Error (usage) for a name of more than 65535 bytes.
    void put_name(std::string_view name);
    void put_bytes(const void* data, size_t size) { bytes_.append(static_cast<const char*>(data), size); }
    const std::string& payload() const { return bytes_; }

private:
    std::string bytes_;
};

/// Takes one payload apart. Throws moe::Error (data) past its end.
class RecordReader {
public:
    RecordReader(std::string_view payload, const std::string& path) : rest_(payload), path_(path) {}
    template <class T>
    T get() {
        T value;
        std::string_view bytes = take(sizeof value);
        __builtin_memcpy(&value, bytes.data(), sizeof value);
        return value;
    }
    std::string get_name() { return std::string(take(get<uint16_t>())); }
    std::string_view take(size_t size);
    size_t left() const { return rest_.size(); }
    [[noreturn]] void fail(const std::string& what) const;

private:
    std::string_view rest_;
    const std::string& path_;
};

/// Where the next frame of `bytes` stands.
enum class FrameState { whole, incomplete, damaged };
struct Frame {
    FrameState state;
    std::string_view payload;
    int64_t needed = kFrameBytes;   ///< bytes that would make it whole
};

/// Looks at the record at the start of `bytes`. A record that reaches the end of what is there (`is_end`: no byte follows in the file)
/// with a wrong checksum, or a tail of zeros as a crashed machine leaves it, is incomplete; a wrong one before others is damaged.
Frame next_frame(std::string_view bytes, bool is_end);

/// Puts length and checksum before a payload.
std::string framed(const std::string& payload);

}  // namespace moe::metrics
