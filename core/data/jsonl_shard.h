// Files of JSON lines: .jsonl, .jsonl.gz, .jsonl.zst; a line is a document.
#pragma once
#include "core/data/shard_domain.h"
#include "core/data/tokenizer.h"

namespace moe::data {

struct JsonlOptions {
    std::string cache_dir;
    std::string text_field;             ///< key of the text; dots lead into objects: "document.body"
    bool skip_bad_lines = false;
    std::string tokenizer_name;         ///< the cache holds for this one only
    std::shared_ptr<const Tokenizer> tokenizer;
};

/// True for the endings .jsonl, .jsonl.gz, .jsonl.zst, and for .json.gz and .json.zst, as Dolma's and C4's shards are called; a plain
/// .json in a folder is something else more often than not.
bool is_jsonl_file(const std::string& path);

/// Opens one file. Its lines are parsed once, for an index in options.cache_dir; a plain file is then read in place, of a compressed
/// one an encoded copy is kept beside the index. Lines of white space and empty texts are no documents. A line that is not
/// JSON, has no such field or is longer than kMaxLineBytes throws moe::Error (data) with file and line, or is left out, counted and
/// warned of once a file. Throws moe::Error (io, data) for what cannot be read or decompressed, (io) for a cache that cannot be written.
std::unique_ptr<Shard> open_jsonl_file(const std::string& path, const JsonlOptions& options, const std::string& key);

}  // namespace moe::data
