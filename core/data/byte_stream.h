// The bytes of a file from its beginning, decompressed where its name ends in .gz or .zst; and lines of them.
#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace moe::data {

/// Bytes in order.
class ByteStream {
public:
    virtual ~ByteStream() = default;
    /// Fills `out` from its beginning; returns how much there was, 0 at the end. Throws moe::Error (io), (data) for what is damaged
    /// or truncated.
    virtual size_t read(std::span<char> out) = 0;
};

/// True for the endings .gz and .zst.
bool is_compressed(const std::string& path);

/// Opens a file; several gzip members or zstd frames in a row are one stream. Throws moe::Error (io) naming `key`.
std::unique_ptr<ByteStream> open_byte_stream(const std::string& path, const std::string& key);

/// A line longer than this is not kept.
inline constexpr int64_t kMaxLineBytes = int64_t(32) << 20;

/// A line without its newline.
struct Line {
    std::string text;                   ///< the beginning only of a line longer than kMaxLineBytes
    int64_t begin = 0, bytes = 0;       ///< place in the stream
    int64_t number = 0;                 ///< from 1
    bool too_long() const { return bytes > kMaxLineBytes; }
};

/// Cuts a stream into lines; memory is bounded by kMaxLineBytes.
class LineReader {
public:
    explicit LineReader(std::unique_ptr<ByteStream> stream);
    /// False at the end.
    bool next(Line& line);

private:
    std::unique_ptr<ByteStream> stream_;
    std::vector<char> buffer_;
    size_t used_ = 0, filled_ = 0;
    int64_t position_ = 0, number_ = 0;
};

}  // namespace moe::data
