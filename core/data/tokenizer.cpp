#include "core/data/tokenizer.h"

#include "core/base/error.h"

namespace moe::data {

void ByteTokenizer::encode(std::string_view text, std::vector<int64_t>& ids) const {
    ids.reserve(ids.size() + text.size());
    for (char c : text) ids.push_back(uint8_t(c));
}

std::string ByteTokenizer::decode(std::span<const int64_t> ids) const {
    std::string text;
    text.reserve(ids.size());
    for (int64_t id : ids) {
        MOE_CHECK(id >= 0 && id < kVocabSize, data, "tokenizer.decode", fmt::format("id {}", id), fmt::format("an id in [0, {})", kVocabSize), "");
        if (id < kEndOfDocument) text.push_back(char(id));
    }
    return text;
}

std::unique_ptr<Tokenizer> open_tokenizer(const std::string& name) {
    MOE_CHECK(name == "bytes", config, "data.tokenizer", fmt::format("\"{}\"", name), "\"bytes\"", "tokenizer.json files are not read in this version");
    return std::make_unique<ByteTokenizer>();
}

}  // namespace moe::data
