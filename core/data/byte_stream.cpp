#include "core/data/byte_stream.h"

#include "core/base/error.h"
#include "core/data/files.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <zlib.h>
#include <zstd.h>

namespace moe::data {
namespace {
constexpr size_t kStreamBytes = size_t(1) << 20;

class PlainStream final : public ByteStream {
public:
    PlainStream(const std::string& path, std::string key) : path_(path), key_(std::move(key)), file_(std::fopen(path.c_str(), "rb")) {
        if (!file_) throw_unreadable(key_, path_, std::strerror(errno));
    }
    ~PlainStream() override { std::fclose(file_); }
    size_t read(std::span<char> out) override {
        size_t got = std::fread(out.data(), 1, out.size(), file_);
        if (got == 0 && std::ferror(file_)) throw_unreadable(key_, path_, std::strerror(errno));
        return got;
    }

private:
    std::string path_, key_;
    std::FILE* file_;
};

[[noreturn]] void throw_damaged(const std::string& key, const std::string& path, const std::string& what) {
    MOE_THROW(data, key, fmt::format("{}: {}", path, what), "a complete compressed file", "the file is damaged or truncated: copy it again");
}

class GzipStream final : public ByteStream {
public:
    GzipStream(const std::string& path, std::string key) : path_(path), key_(std::move(key)), file_(gzopen(path.c_str(), "rb")) {
        if (!file_) throw_unreadable(key_, path_, std::strerror(errno));
        gzbuffer(file_, unsigned(kStreamBytes));
    }
    ~GzipStream() override { gzclose(file_); }
    size_t read(std::span<char> out) override {
        int got = gzread(file_, out.data(), unsigned(out.size()));
        // zlib hands through what is not compressed.
        if (got >= 0 && gzdirect(file_) && got > 0) throw_damaged(key_, path_, "no gzip file in spite of its name");
        int code = Z_OK;
        const char* text = gzerror(file_, &code);
        if (code == Z_ERRNO) throw_unreadable(key_, path_, std::strerror(errno));
        if (got < 0 || (got == 0 && code != Z_OK && code != Z_STREAM_END)) throw_damaged(key_, path_, fmt::format("gzip: {}", *text ? text : "unexpected end of file"));
        return size_t(got);
    }

private:
    std::string path_, key_;
    gzFile file_;
};

class ZstdStream final : public ByteStream {
public:
    ZstdStream(const std::string& path, const std::string& key) : path_(path), key_(key), file_(path, key), input_(kStreamBytes), context_(ZSTD_createDCtx(), ZSTD_freeDCtx) {
        MOE_CHECK(context_, memory, key, "no memory to decompress", "a context of zstd", "");
        // Files made with --long need windows up to this; zstd's own limit is 2^27.
        ZSTD_DCtx_setParameter(context_.get(), ZSTD_d_windowLogMax, sizeof(void*) == 8 ? 31 : 30);
    }
    size_t read(std::span<char> out) override {
        ZSTD_outBuffer to{out.data(), out.size(), 0};
        while (to.pos == 0) {
            if (from_.pos == from_.size && !inside_frame_full_) {
                from_ = {input_.data(), file_.read(input_), 0};
                if (from_.size == 0 && expects_more_) throw_damaged(key_, path_, "zstd: unexpected end of file");
                if (from_.size == 0) return 0;
            }
            expects_more_ = ZSTD_decompressStream(context_.get(), &to, &from_);
            if (ZSTD_isError(expects_more_)) throw_damaged(key_, path_, fmt::format("zstd: {}", ZSTD_getErrorName(expects_more_)));
            // A full output may hide more that needs no input.
            inside_frame_full_ = expects_more_ != 0 && to.pos == to.size;
        }
        return to.pos;
    }

private:
    std::string path_, key_;
    PlainStream file_;
    std::vector<char> input_;
    std::unique_ptr<ZSTD_DCtx, size_t (*)(ZSTD_DCtx*)> context_;
    ZSTD_inBuffer from_{nullptr, 0, 0};
    size_t expects_more_ = 0;           ///< 0 between frames
    bool inside_frame_full_ = false;
};
}  // namespace

bool is_compressed(const std::string& path) { return path.ends_with(".gz") || path.ends_with(".zst"); }

std::unique_ptr<ByteStream> open_byte_stream(const std::string& path, const std::string& key) {
    if (path.ends_with(".gz")) return std::make_unique<GzipStream>(path, key);
    if (path.ends_with(".zst")) return std::make_unique<ZstdStream>(path, key);
    return std::make_unique<PlainStream>(path, key);
}

LineReader::LineReader(std::unique_ptr<ByteStream> stream) : stream_(std::move(stream)), buffer_(kStreamBytes) {}

bool LineReader::next(Line& line) {
    line.text.clear();
    line.begin = position_;
    line.bytes = 0;
    line.number = ++number_;
    for (bool any = false;; any = true) {
        if (used_ == filled_) {
            filled_ = stream_->read(buffer_);
            used_ = 0;
            if (filled_ == 0) return any;
        }
        const char* from = buffer_.data() + used_;
        auto newline = static_cast<const char*>(std::memchr(from, '\n', filled_ - used_));
        size_t count = newline ? size_t(newline - from) : filled_ - used_, kept = line.text.size();
        line.text.append(from, std::min(count, size_t(kMaxLineBytes) - std::min(kept, size_t(kMaxLineBytes))));
        line.bytes += int64_t(count);
        used_ += count + (newline ? 1 : 0);
        position_ += int64_t(count) + (newline ? 1 : 0);
        if (newline) return true;
    }
}

}  // namespace moe::data
