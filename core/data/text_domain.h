// Documents from files of text, read by bytes.
#pragma once
#include "core/data/domain.h"
#include "core/data/files.h"

#include <deque>
#include <vector>

namespace moe::data {

/// Documents longer than this are cut after the last line that fits.
inline constexpr int64_t kMaxDocumentBytes = int64_t(1) << 20;

/// Every regular file below a folder, or one file. Files are documents in the order of their paths; empty files and names that
/// begin with "." are left out; a bigger file is cut at lines into documents of at most kMaxDocumentBytes. Any bytes will do.
class TextDomain final : public Domain {
public:
    /// Chunks are at most `chunk_tokens` long. Throws moe::Error (io) for what is missing or unreadable, (data) for an empty one;
    /// `key` is the configuration key to name.
    TextDomain(std::string name, const std::string& path, int64_t chunk_tokens, const std::string& key);
    int64_t num_chunks() const override { return first_chunk_.back(); }
    int64_t num_tokens() const override { return num_tokens_; }
    uint64_t fingerprint() const override { return fingerprint_; }
    Chunk chunk(int64_t i) const override;
    int64_t read(int64_t document, int64_t offset, std::span<int64_t> out) const override;
    int64_t num_documents() const { return int64_t(documents_.size()); }

private:
    struct Document {
        int32_t file;
        int64_t begin, bytes;
    };
    void add_file(const std::string& path, int64_t bytes);

    int64_t chunk_tokens_, num_tokens_ = 0;
    uint64_t fingerprint_ = 0;
    std::deque<ReadableFile> files_;
    std::vector<Document> documents_;
    std::vector<int64_t> first_chunk_ = {0};   ///< chunks before document i; one more entry than documents
};

}  // namespace moe::data
