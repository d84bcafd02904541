#include "core/data/text_domain.h"

#include "core/base/error.h"
#include "core/data/tokenizer.h"

#include <algorithm>

namespace moe::data {
namespace {
constexpr int64_t kLineWindowBytes = 1 << 16;
}  // namespace

TextDomain::TextDomain(std::string name, const std::string& path, int64_t chunk_tokens, const std::string& key)
    : Domain(std::move(name)), chunk_tokens_(chunk_tokens) {
    for (const auto& [file, bytes] : list_files(path, key)) {
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

void TextDomain::add_file(const std::string& path, int64_t bytes) {
    int32_t index = int32_t(files_.size());
    files_.emplace_back(path);
    std::vector<uint8_t> window;
    for (int64_t begin = 0; begin < bytes;) {
        int64_t end = std::min(begin + kMaxDocumentBytes, bytes);
        if (end < bytes) {
            int64_t from = std::max(begin, end - kLineWindowBytes);
            window.resize(size_t(end - from));
            files_.back().read(from, window);
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
    static thread_local std::vector<uint8_t> buffer;
    buffer.resize(size_t(bytes));
    files_[size_t(d.file)].read(d.begin + offset, buffer);
    std::copy(buffer.begin(), buffer.end(), out.begin());
    if (count > bytes) out[size_t(bytes)] = ByteTokenizer::kEndOfDocument;
    return count;
}

}  // namespace moe::data
