#include "core/data/jsonl_shard.h"

#include "core/base/error.h"
#include "core/base/log.h"
#include "core/base/units.h"
#include "core/data/byte_stream.h"
#include "core/data/token_shard.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <atomic>
#include <filesystem>

namespace fs = std::filesystem;

namespace moe::data {
namespace {
constexpr int64_t kSayCompressedBytes = int64_t(64) << 20;   // more than this is announced

/// The value that a dotted path leads to; a key that has the dots itself comes first. Null where there is none.
const nlohmann::json* find_field(const nlohmann::json& object, const std::string& field) {
    if (!object.is_object()) return nullptr;
    if (auto it = object.find(field); it != object.end()) return &*it;
    for (size_t dot = field.find('.'); dot != std::string::npos; dot = field.find('.', dot + 1)) {
        auto it = object.find(field.substr(0, dot));
        if (it == object.end()) continue;
        if (auto found = find_field(*it, field.substr(dot + 1))) return found;
    }
    return nullptr;
}

std::string syntax_error(const std::string& line) {
    try {
        [[maybe_unused]] auto json = nlohmann::json::parse(line);
    } catch (const nlohmann::json::parse_error& e) {
        return fmt::format("no JSON from byte {} on", e.byte);
    } catch (const nlohmann::json::exception& e) {
        return e.what();
    }
    return "no JSON";
}

/// Puts the text of a line into `text`; what is wrong with the line, or "".
std::string extract_text(const std::string& line, const std::string& field, std::string& text) {
    auto json = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    if (json.is_discarded()) return syntax_error(line);
    auto value = find_field(json, field);
    if (!value) return fmt::format("no field \"{}\"", field);
    if (!value->is_string()) return fmt::format("field \"{}\" is a {}", field, value->type_name());
    text = value->get<std::string>();
    return "";
}

bool is_blank(const std::string& line) { return line.find_first_not_of(" \t\r") == std::string::npos; }

/// How the encoded copy of a compressed file stores its ids.
TokenType copy_type(const JsonlOptions& options) { return options.tokenizer->vocab_size() <= 1 << 16 ? TokenType::uint16 : TokenType::uint32; }

/// Goes once through the lines of a file and writes its index and, for a compressed one, its encoded copy.
class LineIndexer {
public:
    LineIndexer(const std::string& path, const JsonlOptions& options, const std::string& key) : path_(path), options_(options), key_(key) {}
    void run(const CacheKey& cached) {
        IndexWriter index(cached);
        std::unique_ptr<AtomicFile> copy;
        if (is_compressed(path_)) copy = std::make_unique<AtomicFile>(cached.stem + ".tokens");
        LineReader lines(open_byte_stream(path_, key_));
        Line line;
        while (lines.next(line)) {
            ++index.facts.num_lines;
            if (!is_blank(line.text) && encode(line, index.facts)) add(line, index, copy.get());
        }
        if (copy) copy->commit();       // before the index, which says that it is there
        index.commit();
    }

private:
    /// False for a line to leave out.
    bool encode(const Line& line, IndexFacts& facts) {
        std::string wrong = line.too_long() ? fmt::format("{} long", format_bytes(double(line.bytes))) : extract_text(line.text, options_.text_field, text_);
        ids_.clear();
        if (wrong.empty()) {
            options_.tokenizer->encode(text_, ids_);
            return !ids_.empty();
        }
        MOE_CHECK(options_.skip_bad_lines, data, key_, fmt::format("{}:{}: {}", path_, line.number, wrong),
                  fmt::format("an object with a text in \"{}\", at most {} long", options_.text_field, format_bytes(double(kMaxLineBytes))),
                  "data.text_field names the text; data.bad_lines = \"skip\" leaves such lines out");
        if (facts.num_bad_lines++ == 0) facts.first_bad_line = line.number;
        return false;
    }

    void add(const Line& line, IndexWriter& index, AtomicFile* copy) {
        int64_t count = int64_t(ids_.size());
        uint64_t sum = 0;
        for (int64_t id : ids_) sum += uint64_t(id);
        index.add_ids(sum);
        if (copy) {
            index.add({index.facts.num_units, count, count + 1});
            if (copy_type(options_) == TokenType::uint16) write_ids<uint16_t>(*copy);
            else write_ids<uint32_t>(*copy);
        } else {
            index.add({line.begin, line.bytes, count + 1});
        }
        index.facts.num_units += count;
    }

    template <class T>
    void write_ids(AtomicFile& copy) const {
        std::vector<T> narrow(ids_.begin(), ids_.end());
        copy.write(narrow.data(), narrow.size() * sizeof(T));
    }

    const std::string& path_;
    const JsonlOptions& options_;
    const std::string& key_;
    std::string text_;
    std::vector<int64_t> ids_;
};

/// What a thread read last: a document's chunks often come one after the other.
struct LastLine {
    uint64_t shard = 0;
    int64_t begin = -1;
    std::vector<int64_t> ids;
};

/// A plain file, read in place by the places of its lines.
class LineShard final : public Shard {
public:
    LineShard(std::unique_ptr<DocumentIndex> index, const std::string& path, const JsonlOptions& options)
        : Shard(std::move(index)), file_(path), field_(options.text_field), tokenizer_(options.tokenizer), end_of_document_(tokenizer_->end_of_document()), number_(++num_made) {}

    void read(const DocumentEntry& document, int64_t offset, std::span<int64_t> out) const override {
        static thread_local LastLine last;
        if (last.shard != number_ || last.begin != document.begin) {
            last.shard = 0;             // until it is complete
            read_line(document, last.ids);
            last.begin = document.begin;
            last.shard = number_;
        }
        std::copy_n(last.ids.begin() + offset, out.size(), out.begin());
    }

private:
    void read_line(const DocumentEntry& document, std::vector<int64_t>& ids) const {
        std::string line(size_t(document.size), '\0'), text;
        file_.read(document.begin, {reinterpret_cast<uint8_t*>(line.data()), line.size()});
        std::string wrong = extract_text(line, field_, text);
        ids.clear();
        if (wrong.empty()) tokenizer_->encode(text, ids);
        ids.push_back(end_of_document_);
        MOE_CHECK(wrong.empty() && int64_t(ids.size()) == document.tokens, data, "data", fmt::format("{}: another line at byte {}", file_.path(), document.begin),
                  "the line that was there when the file was opened", "the file changed while it was read");
    }

    static inline std::atomic<uint64_t> num_made = 0;
    ReadableFile file_;
    std::string field_;
    std::shared_ptr<const Tokenizer> tokenizer_;
    int64_t end_of_document_;
    uint64_t number_;                   ///< of this shard in the process
};

/// The cached index and, where there has to be one, the encoded copy; null where they are not there or not whole.
std::unique_ptr<Shard> open_cached(const std::string& path, const CacheKey& cached, const JsonlOptions& options) {
    auto index = DocumentIndex::open(cached);
    if (!index) return nullptr;
    if (!is_compressed(path)) return std::make_unique<LineShard>(std::move(index), path, options);
    std::string copy = cached.stem + ".tokens";
    std::error_code code;
    if (!fs::exists(copy, code)) return nullptr;
    auto file = std::make_unique<MappedFile>(copy, "data.cache_dir");
    if (file->size() != index->facts().num_units * bytes_of(copy_type(options))) return nullptr;
    return std::make_unique<TokenShard>(std::move(index), std::move(file), 0, copy_type(options), options.tokenizer->end_of_document());
}
}  // namespace

bool is_jsonl_file(const std::string& path) {
    constexpr std::string_view kEndings[] = {".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst"};
    return std::any_of(std::begin(kEndings), std::end(kEndings), [&](auto ending) { return path.ends_with(ending); });
}

std::unique_ptr<Shard> open_jsonl_file(const std::string& path, const JsonlOptions& options, const std::string& key) {
    CacheKey cached = cache_key(options.cache_dir, path,
                                fmt::format("JSON lines, text in {}, bad lines {}, tokenizer {} of {}", options.text_field, options.skip_bad_lines ? "left out" : "refused",
                                            options.tokenizer_name, options.tokenizer->vocab_size()), key);
    auto shard = open_cached(path, cached, options);
    if (!shard) {
        std::error_code code;
        auto bytes = fs::file_size(path, code);
        if (!code && int64_t(bytes) > kSayCompressedBytes) log::info(fmt::format("{}: reading {} of JSON lines, once; the index goes to {}", path, format_bytes(double(bytes)), options.cache_dir));
        LineIndexer(path, options, key).run(cached);
        shard = open_cached(path, cached, options);
    }
    MOE_CHECK(shard, internal, "data.cache_dir", "an index that cannot be read back", cached.stem, "");
    const IndexFacts& facts = shard->index().facts();
    if (facts.num_bad_lines > 0) log::warn(fmt::format("{}: {} of {} lines are left out, the first is line {}", path, facts.num_bad_lines, facts.num_lines, facts.first_bad_line));
    return shard;
}

}  // namespace moe::data
