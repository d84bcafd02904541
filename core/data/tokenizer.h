// Text to token ids and back.
#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace moe::data {

/// A vocabulary and its rule. Immutable, safe to share between threads.
class Tokenizer {
public:
    virtual ~Tokenizer() = default;
    /// Appends the ids of `text`, without any special token.
    virtual void encode(std::string_view text, std::vector<int64_t>& ids) const = 0;
    /// The text of `ids`; special tokens give nothing. Throws moe::Error (data) for an id outside the vocabulary.
    virtual std::string decode(std::span<const int64_t> ids) const = 0;
    /// Rows that an embedding needs.
    virtual int64_t vocab_size() const = 0;
    /// Id that ends a document.
    virtual int64_t end_of_document() const = 0;
};

/// One token a byte: ids 0–255 are the bytes, 256 ends a document, 257–263 are reserved, so that 264 is a multiple of 8.
class ByteTokenizer final : public Tokenizer {
public:
    static constexpr int64_t kEndOfDocument = 256, kVocabSize = 264;
    void encode(std::string_view text, std::vector<int64_t>& ids) const override;
    std::string decode(std::span<const int64_t> ids) const override;
    int64_t vocab_size() const override { return kVocabSize; }
    int64_t end_of_document() const override { return kEndOfDocument; }
};

/// The tokenizer that `data.tokenizer` names: "bytes". Throws moe::Error (config) for anything else.
std::unique_ptr<Tokenizer> open_tokenizer(const std::string& name);

}  // namespace moe::data
