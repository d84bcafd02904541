// Files of token ids, mapped: .npy, .bin, and the encoded copies of compressed text.
#pragma once
#include "core/data/shard_domain.h"

namespace moe::data {

/// How ids are stored, little endian.
enum class TokenType { uint16, int32, uint32, int64 };
int64_t bytes_of(TokenType type);

/// A run of ids in a file; documents end with `end_of_document`, which a document's entry counts whether the file has it or not.
class TokenShard final : public Shard {
public:
    TokenShard(std::unique_ptr<DocumentIndex> index, std::unique_ptr<MappedFile> file, int64_t begin_byte, TokenType type, int64_t end_of_document);
    void read(const DocumentEntry& document, int64_t offset, std::span<int64_t> out) const override;

private:
    std::unique_ptr<MappedFile> file_;
    int64_t begin_byte_;
    TokenType type_;
    int64_t end_of_document_;
};

struct TokenOptions {
    std::string cache_dir;
    int64_t end_of_document = 0, vocab_size = 0;
};

/// True for the endings .npy and .bin.
bool is_token_file(const std::string& path);

/// A shard that was tokenized elsewhere: .npy (1-D; uint16, int32, uint32 or int64) or .bin (raw uint16, or what "dtype" says in the
/// .json of the same name beside it, "uint16" or "uint32"; "eod" there replaces the tokenizer's end-of-document id, for .npy too).
/// Documents are what lies between end-of-document ids; empty ones are left out. Throws moe::Error (io, data) for what is damaged,
/// truncated or has an id outside of the vocabulary.
std::unique_ptr<Shard> open_token_file(const std::string& path, const TokenOptions& options, const std::string& key);

}  // namespace moe::data
