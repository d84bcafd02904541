#include "core/data/token_shard.h"

#include "core/base/error.h"
#include "core/base/json.h"
#include "core/base/log.h"
#include "core/base/units.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <charconv>
#include <cstring>
#include <filesystem>
#include <limits>
#include <optional>

namespace fs = std::filesystem;

namespace moe::data {
namespace {
constexpr int64_t kSayBytes = int64_t(256) << 20;   // a scan of more than this is announced

template <class F>
auto with_type(TokenType type, F&& f) {
    switch (type) {
        case TokenType::uint16: return f(uint16_t());
        case TokenType::int32: return f(int32_t());
        case TokenType::uint32: return f(uint32_t());
        default: return f(int64_t());
    }
}

template <class T>
int64_t id_at(const uint8_t* ids, int64_t i) {
    T id;
    std::memcpy(&id, ids + i * int64_t(sizeof(T)), sizeof(T));   // a header may leave the ids unaligned
    return int64_t(id);
}

/// The ids of a file: where they begin and how many.
struct TokenLayout {
    int64_t begin_byte = 0, num_tokens = 0;
    TokenType type = TokenType::uint16;
};

void check_bytes(const MappedFile& file, int64_t want, const std::string& key, const std::string& why) {
    MOE_CHECK(file.size() == want, data, key, fmt::format("{}: {} bytes", file.path(), file.size()), fmt::format("{} bytes{}", want, why),
              file.size() < want ? "the shard is truncated: copy it again" : "the shard is damaged, or was written by something else");
}

/// The text after 'name': in the header's dictionary.
std::string_view npy_value(std::string_view header, std::string_view name) {
    size_t at = header.find(fmt::format("'{}':", name));
    if (at == std::string_view::npos) return {};
    header.remove_prefix(at + name.size() + 3);
    header.remove_prefix(std::min(header.find_first_not_of(' '), header.size()));
    return header;
}

std::optional<TokenType> npy_type(std::string_view descr) {
    if (descr.starts_with("'<u2'")) return TokenType::uint16;
    if (descr.starts_with("'<i4'")) return TokenType::int32;
    if (descr.starts_with("'<u4'")) return TokenType::uint32;
    if (descr.starts_with("'<i8'")) return TokenType::int64;
    return {};
}

/// "(12,)" → 12; −1 for another number of dimensions.
int64_t npy_length(std::string_view shape) {
    int64_t n = -1;
    if (!shape.starts_with('(')) return -1;
    auto [end, error] = std::from_chars(shape.data() + 1, shape.data() + shape.size(), n);
    std::string_view rest(end, size_t(shape.data() + shape.size() - end));
    return error == std::errc() && rest.starts_with(",)") ? n : -1;
}

/// Source: numpy.lib.format, versions 1.0 to 3.0: magic, version, length of the header, a Python dictionary.
TokenLayout npy_layout(const MappedFile& file, const std::string& key) {
    auto damaged = [&](const std::string& what) {
        MOE_THROW(data, key, fmt::format("{}: {}", file.path(), what), "a .npy file of one dimension, little endian uint16, int32, uint32 or int64", "write it with numpy.save(path, ids)");
    };
    const uint8_t* p = file.data();
    if (file.size() < 12 || std::memcmp(p, "\x93NUMPY", 6) != 0) damaged(fmt::format("{} bytes that do not begin as .npy", file.size()));
    int64_t length_bytes = p[6] == 1 ? 2 : 4, header_bytes = p[8] | p[9] << 8;
    if (length_bytes == 4) header_bytes |= int64_t(p[10]) << 16 | int64_t(p[11]) << 24;
    TokenLayout layout;
    layout.begin_byte = 8 + length_bytes + header_bytes;
    if (file.size() < layout.begin_byte) check_bytes(file, layout.begin_byte, key, " for its header alone");
    std::string_view header(reinterpret_cast<const char*>(p) + 8 + length_bytes, size_t(header_bytes));
    auto type = npy_type(npy_value(header, "descr"));
    layout.num_tokens = npy_length(npy_value(header, "shape"));
    if (!type || layout.num_tokens < 0) damaged(fmt::format("header {}", header.substr(0, header.find_last_not_of(" \n") + 1)));
    layout.type = *type;
    int64_t room = std::numeric_limits<int64_t>::max() - layout.begin_byte;
    if (layout.num_tokens > room / bytes_of(layout.type)) damaged(fmt::format("{} ids", layout.num_tokens));
    check_bytes(file, layout.begin_byte + layout.num_tokens * bytes_of(layout.type), key, fmt::format(" for {} ids", layout.num_tokens));
    return layout;
}

struct Sidecar {
    TokenType type = TokenType::uint16;
    std::optional<int64_t> end_of_document;
};

Sidecar read_sidecar(const std::string& path) {
    std::string name = fs::path(path).replace_extension(".json").string();
    std::error_code code;
    if (!fs::exists(name, code)) return {};
    nlohmann::json json = read_json(name);
    auto wrong = [&](const std::string& field, const std::string& want) {
        MOE_THROW(data, name, fmt::format("{}: {}", field, json.is_object() && json.contains(field) ? brief(json.at(field)) : brief(json)), want, "it describes the shard of the same name");
    };
    if (!json.is_object()) wrong("content", "an object such as {\"dtype\": \"uint16\", \"eod\": 0}");
    Sidecar out;
    for (const auto& [field, value] : json.items()) {
        if (field == "dtype") {
            if (value != "uint16" && value != "uint32") wrong(field, "\"uint16\" or \"uint32\"");
            out.type = value == "uint16" ? TokenType::uint16 : TokenType::uint32;
        } else if (field == "eod") {
            if (!value.is_number_integer()) wrong(field, "an id");
            out.end_of_document = value.get<int64_t>();
        } else {
            wrong(field, "the fields \"dtype\" and \"eod\"");
        }
    }
    return out;
}

TokenLayout bin_layout(const MappedFile& file, TokenType type, const std::string& key) {
    int64_t size = bytes_of(type), whole = (file.size() + size - 1) / size * size;
    check_bytes(file, whole, key, fmt::format(", a multiple of {}", size));
    return {0, file.size() / size, type};
}

template <class T>
void scan_ids(const uint8_t* ids, int64_t count, int64_t end_of_document, IndexWriter& writer) {
    IndexFacts& f = writer.facts;
    f.min_id = std::numeric_limits<int64_t>::max();
    f.max_id = std::numeric_limits<int64_t>::min();
    f.num_units = count;
    uint64_t sum = 0;
    int64_t begin = 0;
    for (int64_t i = 0; i < count; ++i) {
        int64_t id = id_at<T>(ids, i);
        sum += uint64_t(id);
        if (id < f.min_id) f.min_id = id, f.min_position = i;
        if (id > f.max_id) f.max_id = id, f.max_position = i;
        if (id != end_of_document) continue;
        if (i > begin) writer.add({begin, i + 1 - begin, i + 1 - begin});
        begin = i + 1;
    }
    if (count > begin) writer.add({begin, count - begin, count - begin + 1});   // without its end, which read() adds
    writer.add_ids(sum);
}

std::unique_ptr<DocumentIndex> index_of_ids(const MappedFile& file, const TokenLayout& layout, const CacheKey& cached, int64_t end_of_document) {
    if (auto index = DocumentIndex::open(cached)) return index;
    if (file.size() > kSayBytes) log::info(fmt::format("{}: looking for documents in {}, once", file.path(), format_bytes(double(file.size()))));
    IndexWriter writer(cached);
    with_type(layout.type, [&](auto type) { scan_ids<decltype(type)>(file.data() + layout.begin_byte, layout.num_tokens, end_of_document, writer); });
    writer.commit();
    auto index = DocumentIndex::open(cached);
    MOE_CHECK(index, internal, "data.cache_dir", "an index that cannot be read back", cached.stem, "");
    return index;
}
}  // namespace

int64_t bytes_of(TokenType type) {
    return with_type(type, [](auto id) { return int64_t(sizeof id); });
}

TokenShard::TokenShard(std::unique_ptr<DocumentIndex> index, std::unique_ptr<MappedFile> file, int64_t begin_byte, TokenType type, int64_t end_of_document)
    : Shard(std::move(index)), file_(std::move(file)), begin_byte_(begin_byte), type_(type), end_of_document_(end_of_document) {}

void TokenShard::read(const DocumentEntry& document, int64_t offset, std::span<int64_t> out) const {
    file_->check_size();
    int64_t stored = std::clamp<int64_t>(document.size - offset, 0, int64_t(out.size()));
    with_type(type_, [&](auto type) {
        using T = decltype(type);
        const uint8_t* from = file_->data() + begin_byte_ + (document.begin + offset) * int64_t(sizeof(T));
        for (int64_t i = 0; i < stored; ++i) out[size_t(i)] = id_at<T>(from, i);
    });
    if (stored < int64_t(out.size())) out[size_t(stored)] = end_of_document_;
}

bool is_token_file(const std::string& path) { return path.ends_with(".npy") || path.ends_with(".bin"); }

std::unique_ptr<Shard> open_token_file(const std::string& path, const TokenOptions& options, const std::string& key) {
    auto file = std::make_unique<MappedFile>(path, key);
    Sidecar sidecar = read_sidecar(path);
    TokenLayout layout = path.ends_with(".npy") ? npy_layout(*file, key) : bin_layout(*file, sidecar.type, key);
    int64_t end = sidecar.end_of_document.value_or(options.end_of_document);
    MOE_CHECK(end >= 0 && end < options.vocab_size, data, key, fmt::format("{}: end-of-document id {}", path, end), fmt::format("an id in [0, {}), model.vocab_size", options.vocab_size),
              "vocabulary mismatch: set model.vocab_size, data.tokenizer, or \"eod\" in the .json beside the shard");
    CacheKey cached = cache_key(options.cache_dir, path, fmt::format("ids of {} bytes, end {}", bytes_of(layout.type), end), key);
    auto index = index_of_ids(*file, layout, cached, end);
    const IndexFacts& f = index->facts();
    bool negative = f.min_id < 0;
    MOE_CHECK(layout.num_tokens == 0 || (!negative && f.max_id < options.vocab_size), data, key,
              fmt::format("{}: id {} at position {}", path, negative ? f.min_id : f.max_id, negative ? f.min_position : f.max_position),
              fmt::format("ids in [0, {}), model.vocab_size", options.vocab_size), "vocabulary mismatch: set model.vocab_size and data.tokenizer to those of the shard");
    return std::make_unique<TokenShard>(std::move(index), std::move(file), layout.begin_byte, layout.type, end);
}

}  // namespace moe::data
