#include "core/data/text_domain.h"

#include "core/base/error.h"
#include "core/data/tokenizer.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fcntl.h>
#include <filesystem>
#include <unistd.h>

namespace fs = std::filesystem;

namespace moe::data {
namespace {
// Descriptors kept open by one domain; further files are opened for every read. Well below the usual limit of 1024 a process.
constexpr int64_t kMaxOpenFiles = 64;
constexpr int64_t kLineWindowBytes = 1 << 16;

[[noreturn]] void throw_io(const std::string& key, const std::string& path, const std::string& why) {
    MOE_THROW(io, key, fmt::format("{}: {}", path, why), "a readable file or folder of text", "check the path and its permissions");
}

bool is_hidden(const fs::path& path) { return path.filename().string().starts_with('.'); }

std::vector<std::pair<std::string, int64_t>> list_files(const std::string& path, const std::string& key) {
    std::error_code code;
    auto status = fs::status(path, code);
    if (!fs::exists(status)) throw_io(key, path, code ? code.message() : "No such file or directory");
    if (fs::is_regular_file(status)) return {{path, int64_t(fs::file_size(path))}};
    if (!fs::is_directory(status)) throw_io(key, path, "neither a file nor a folder");
    std::vector<std::pair<std::string, int64_t>> files;
    fs::recursive_directory_iterator it(path, code), end;
    while (!code && it != end) {
        if (is_hidden(it->path())) {
            it.disable_recursion_pending();
        } else if (it->is_regular_file(code)) {
            files.emplace_back(it->path().string(), int64_t(it->file_size(code)));
        }
        if (!code) it.increment(code);
    }
    if (code) throw_io(key, it == end ? path : it->path().string(), code.message());
    std::sort(files.begin(), files.end());
    return files;
}
}  // namespace

TextDomain::TextDomain(std::string name, const std::string& path, int64_t chunk_tokens, const std::string& key)
    : Domain(std::move(name)), chunk_tokens_(chunk_tokens) {
    for (const auto& [file, bytes] : list_files(path, key)) {
        if (access(file.c_str(), R_OK) != 0) throw_io(key, file, std::strerror(errno));
        if (bytes > 0) add_file(file, bytes);
    }
    MOE_CHECK(!documents_.empty(), data, key, fmt::format("{}: no text in it", path), "at least one file that is not empty",
              "files whose names begin with a dot are not read");
    for (const auto& d : documents_) {
        int64_t tokens = d.bytes + 1;
        num_tokens_ += tokens;
        first_chunk_.push_back(first_chunk_.back() + (tokens + chunk_tokens_ - 1) / chunk_tokens_);
        fingerprint_ = fingerprint_ * 0x100000001b3ull + uint64_t(d.bytes);
    }
}

TextDomain::~TextDomain() {
    for (const auto& file : files_) {
        if (file.descriptor >= 0) close(file.descriptor);
    }
}

void TextDomain::add_file(const std::string& path, int64_t bytes) {
    int32_t index = int32_t(files_.size());
    files_.push_back({path});
    std::vector<uint8_t> window;
    for (int64_t begin = 0; begin < bytes;) {
        int64_t end = std::min(begin + kMaxDocumentBytes, bytes);
        if (end < bytes) {
            int64_t from = std::max(begin, end - kLineWindowBytes);
            window.resize(size_t(end - from));
            read_bytes(files_.back(), from, window);
            auto line = std::find(window.rbegin(), window.rend(), uint8_t('\n'));
            if (line != window.rend()) end -= line - window.rbegin();   // the cut is after the newline
        }
        documents_.push_back({index, begin, end - begin});
        begin = end;
    }
}

Chunk TextDomain::chunk(int64_t i) const {
    auto after = std::upper_bound(first_chunk_.begin(), first_chunk_.end(), i);
    int64_t document = after - first_chunk_.begin() - 1;
    int64_t offset = (i - first_chunk_[size_t(document)]) * chunk_tokens_;
    return {document, offset, std::min(chunk_tokens_, documents_[size_t(document)].bytes + 1 - offset)};
}

int64_t TextDomain::read(int64_t document, int64_t offset, std::span<int64_t> out) const {
    const auto& d = documents_[size_t(document)];
    int64_t count = std::clamp<int64_t>(d.bytes + 1 - offset, 0, int64_t(out.size()));
    int64_t bytes = std::min(count, std::max<int64_t>(d.bytes - offset, 0));
    buffer_.resize(size_t(bytes));
    read_bytes(files_[size_t(d.file)], d.begin + offset, buffer_);
    std::copy(buffer_.begin(), buffer_.end(), out.begin());
    if (count > bytes) out[size_t(bytes)] = ByteTokenizer::kEndOfDocument;
    return count;
}

int TextDomain::open_file(const File& file) const {
    if (file.descriptor >= 0) return file.descriptor;
    int descriptor = open(file.path.c_str(), O_RDONLY | O_CLOEXEC);
    if (descriptor < 0) throw_io("data", file.path, std::strerror(errno));
    if (num_open_ < kMaxOpenFiles) {
        file.descriptor = descriptor;
        ++num_open_;
    }
    return descriptor;
}

void TextDomain::read_bytes(const File& file, int64_t begin, std::span<uint8_t> out) const {
    if (out.empty()) return;
    int descriptor = open_file(file);
    size_t done = 0;
    ssize_t got = 1;
    while (done < out.size() && got > 0) {
        got = pread(descriptor, out.data() + done, out.size() - done, begin + int64_t(done));
        if (got < 0 && errno == EINTR) got = 1;
        else if (got > 0) done += size_t(got);
    }
    int error = errno;
    if (descriptor != file.descriptor) close(descriptor);
    if (got < 0) throw_io("data", file.path, std::strerror(error));
    MOE_CHECK(done == out.size(), data, "data", fmt::format("{} ends at byte {}", file.path, begin + int64_t(done)),
              fmt::format("at least {} bytes", begin + int64_t(out.size())), "the file became shorter after it was opened");
}

}  // namespace moe::data
