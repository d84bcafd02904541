// Where the documents of a file begin: found once, kept in data.cache_dir, read from there without loading it.
#pragma once
#include "core/data/files.h"

#include <memory>

namespace moe::data {

/// One document of a file. `begin` and `size` count what the file is made of: bytes of a line, or tokens.
struct DocumentEntry {
    int64_t begin = 0, size = 0;
    int64_t tokens = 0;                 ///< with its end-of-document token
};

/// What is known of a whole file. Positions count from 0, lines from 1.
struct IndexFacts {
    int64_t num_documents = 0, num_tokens = 0;
    int64_t num_units = 0;              ///< tokens in the file or in the encoded copy beside the index
    uint64_t fingerprint = 0;           ///< of the documents' lengths and the ids
    int64_t num_lines = 0, num_bad_lines = 0, first_bad_line = 0;
    int64_t min_id = 0, min_position = 0, max_id = 0, max_position = 0;
};

/// Names the cached files of one source file: they hold for this path, size, modification time and way of reading.
struct CacheKey {
    std::string text;                   ///< written into the index and compared
    std::string stem;                   ///< path without ending
};
/// `reading` is everything else that the content of the cache depends on. Throws moe::Error (io) where `path` is not there.
CacheKey cache_key(const std::string& cache_dir, const std::string& path, const std::string& reading, const std::string& key);

/// The documents of a file, mapped. Thread safe.
class DocumentIndex {
public:
    /// The cached index; null where there is none that holds for `key`.
    static std::unique_ptr<DocumentIndex> open(const CacheKey& key);
    const IndexFacts& facts() const { return *facts_; }
    const DocumentEntry& operator[](int64_t i) const { return entries_[i]; }

private:
    explicit DocumentIndex(std::unique_ptr<MappedFile> file) : file_(std::move(file)) {}

    std::unique_ptr<MappedFile> file_;
    const IndexFacts* facts_ = nullptr;
    const DocumentEntry* entries_ = nullptr;
};

/// Writes an index, document by document; counts documents and tokens by itself.
class IndexWriter {
public:
    explicit IndexWriter(const CacheKey& key);
    void add(const DocumentEntry& entry);
    /// Facts that the reader fills; `ids` goes into the fingerprint.
    IndexFacts facts;
    void add_ids(uint64_t sum) { facts.fingerprint += sum * 0x9e3779b97f4a7c15ull; }
    /// From here on DocumentIndex::open() finds it. Throws moe::Error (io).
    void commit();

private:
    std::string key_;
    AtomicFile file_;
};

}  // namespace moe::data
