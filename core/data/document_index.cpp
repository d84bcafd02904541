#include "core/data/document_index.h"

#include "core/base/error.h"
#include "core/base/random.h"

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <sys/stat.h>
#include <unistd.h>

namespace fs = std::filesystem;

namespace moe::data {
namespace {
constexpr char kMagic[8] = {'M', 'O', 'E', 'I', 'D', 'X', '0', '1'};

// A file is: header, the key's text filled up to a multiple of 8 bytes, the entries.
struct IndexHeader {
    char magic[8] = {};
    int64_t key_bytes = 0;
    IndexFacts facts;
};
}  // namespace

CacheKey cache_key(const std::string& cache_dir, const std::string& path, const std::string& reading, const std::string& key) {
    struct stat status {};
    if (stat(path.c_str(), &status) != 0) throw_unreadable(key, path, std::strerror(errno));
    std::error_code code;
    fs::path absolute = fs::absolute(path, code).lexically_normal();
    std::string text = fmt::format("{} | {} bytes | {}.{:09} | {}", absolute.string(), int64_t(status.st_size), int64_t(status.st_mtim.tv_sec), int64_t(status.st_mtim.tv_nsec), reading);
    // Hidden, because the cache may lie in a folder of data.
    fs::path stem = fs::path(cache_dir) / ".documents" / fmt::format("{}-{:016x}", absolute.filename().string(), hash_name(text));
    while (text.size() % 8) text.push_back(' ');
    return {text, stem.string()};
}

std::unique_ptr<DocumentIndex> DocumentIndex::open(const CacheKey& key) {
    std::string path = key.stem + ".index";
    if (access(path.c_str(), F_OK) != 0) return nullptr;
    std::unique_ptr<DocumentIndex> index(new DocumentIndex(std::make_unique<MappedFile>(path, "data.cache_dir")));
    const MappedFile& file = *index->file_;
    int64_t before = int64_t(sizeof(IndexHeader) + key.text.size());
    if (file.size() < before) return nullptr;
    auto header = reinterpret_cast<const IndexHeader*>(file.data());
    bool ours = std::memcmp(header->magic, kMagic, sizeof kMagic) == 0 && header->key_bytes == int64_t(key.text.size()) &&
                std::memcmp(file.data() + sizeof(IndexHeader), key.text.data(), key.text.size()) == 0;
    if (!ours || file.size() != before + header->facts.num_documents * int64_t(sizeof(DocumentEntry))) return nullptr;
    index->facts_ = &header->facts;
    index->entries_ = reinterpret_cast<const DocumentEntry*>(file.data() + before);
    return index;
}

IndexWriter::IndexWriter(const CacheKey& key) : key_(key.text), file_(key.stem + ".index") {
    IndexHeader header;
    file_.write(&header, sizeof header);
    file_.write(key_.data(), key_.size());
}

void IndexWriter::add(const DocumentEntry& entry) {
    file_.write(&entry, sizeof entry);
    ++facts.num_documents;
    facts.num_tokens += entry.tokens;
    facts.fingerprint = facts.fingerprint * 0x100000001b3ull + uint64_t(entry.tokens);
}

void IndexWriter::commit() {
    IndexHeader header;
    std::memcpy(header.magic, kMagic, sizeof kMagic);
    header.key_bytes = int64_t(key_.size());
    header.facts = facts;
    file_.rewrite(&header, sizeof header);
    file_.commit();
}

}  // namespace moe::data
