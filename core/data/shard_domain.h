// A domain of files whose documents have been indexed. A new file format is a Shard.
#pragma once
#include "core/data/document_index.h"
#include "core/data/domain.h"

#include <memory>
#include <vector>

namespace moe::data {

/// One file of documents. Thread safe.
class Shard {
public:
    explicit Shard(std::unique_ptr<DocumentIndex> index) : index_(std::move(index)) {}
    virtual ~Shard() = default;
    const DocumentIndex& index() const { return *index_; }
    /// Reads tokens [offset, offset + out.size()) of a document, of which there are that many; the last is its end-of-document
    /// token. Throws moe::Error (io, data).
    virtual void read(const DocumentEntry& document, int64_t offset, std::span<int64_t> out) const = 0;

private:
    std::unique_ptr<DocumentIndex> index_;
};

/// The documents of some shards, in their order.
class ShardDomain final : public Domain {
public:
    /// Chunks are at most `chunk_tokens` long. Throws moe::Error (data) where there is no document; `key` and `path` are to be named.
    ShardDomain(std::string name, std::vector<std::unique_ptr<Shard>> shards, int64_t chunk_tokens, const std::string& key, const std::string& path);
    int64_t num_chunks() const override { return num_chunks_; }
    int64_t num_tokens() const override { return num_tokens_; }
    uint64_t fingerprint() const override { return fingerprint_; }
    int64_t num_bad_lines() const override { return num_bad_lines_; }
    Chunk chunk(int64_t i) const override;
    int64_t read(int64_t document, int64_t offset, std::span<int64_t> out) const override;
    int64_t num_documents() const { return first_document_.back(); }

private:
    std::pair<const Shard*, const DocumentEntry*> find(int64_t document) const;

    std::vector<std::unique_ptr<Shard>> shards_;
    std::vector<int64_t> first_document_ = {0};   ///< documents before shard i; one more entry than shards
    std::vector<int64_t> first_chunk_;            ///< chunks before every kBlock-th document
    int64_t chunk_tokens_, num_chunks_ = 0, num_tokens_ = 0, num_bad_lines_ = 0;
    uint64_t fingerprint_ = 0;
};

}  // namespace moe::data
