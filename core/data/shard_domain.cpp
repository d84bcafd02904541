#include "core/data/shard_domain.h"

#include "core/base/error.h"

#include <algorithm>

namespace moe::data {
namespace {
// One entry in memory for so many documents; the rest is counted from the index.
constexpr int64_t kBlock = 64;
}  // namespace

ShardDomain::ShardDomain(std::string name, std::vector<std::unique_ptr<Shard>> shards, int64_t chunk_tokens, const std::string& key, const std::string& path)
    : Domain(std::move(name)), shards_(std::move(shards)), chunk_tokens_(chunk_tokens) {
    for (const auto& shard : shards_) {
        const IndexFacts& facts = shard->index().facts();
        for (int64_t i = 0; i < facts.num_documents; ++i) {
            if ((first_document_.back() + i) % kBlock == 0) first_chunk_.push_back(num_chunks_);
            num_chunks_ += (shard->index()[i].tokens + chunk_tokens_ - 1) / chunk_tokens_;
        }
        first_document_.push_back(first_document_.back() + facts.num_documents);
        num_tokens_ += facts.num_tokens;
        num_bad_lines_ += facts.num_bad_lines;
        fingerprint_ = fingerprint_ * 0x100000001b3ull + facts.fingerprint;
    }
    MOE_CHECK(num_documents() > 0, data, key, fmt::format("{}: {} files without a document", path, shards_.size()), "at least one document that is not empty",
              num_bad_lines_ > 0 ? fmt::format("data.bad_lines = \"skip\" left out {} lines", num_bad_lines_) : "");
}

std::pair<const Shard*, const DocumentEntry*> ShardDomain::find(int64_t document) const {
    size_t shard = size_t(std::upper_bound(first_document_.begin(), first_document_.end(), document) - first_document_.begin() - 1);
    return {shards_[shard].get(), &shards_[shard]->index()[document - first_document_[shard]]};
}

Chunk ShardDomain::chunk(int64_t i) const {
    int64_t block = std::upper_bound(first_chunk_.begin(), first_chunk_.end(), i) - first_chunk_.begin() - 1;
    int64_t left = i - first_chunk_[size_t(block)];
    for (int64_t document = block * kBlock;; ++document) {
        int64_t tokens = find(document).second->tokens, chunks = (tokens + chunk_tokens_ - 1) / chunk_tokens_;
        if (left < chunks) return {document, left * chunk_tokens_, std::min(chunk_tokens_, tokens - left * chunk_tokens_)};
        left -= chunks;
    }
}

int64_t ShardDomain::read(int64_t document, int64_t offset, std::span<int64_t> out) const {
    auto [shard, entry] = find(document);
    int64_t count = std::clamp<int64_t>(entry->tokens - offset, 0, int64_t(out.size()));
    if (count > 0) shard->read(*entry, offset, out.first(size_t(count)));
    return count;
}

}  // namespace moe::data
