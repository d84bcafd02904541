// Chunks of a trace, and the file that keeps them.
// Letters: n tokens of a chunk, K chosen a token, E experts, D domains.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdio>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace moe::routing {

/// What the router did with some tokens, on the host.
struct TraceChunk {
    struct Layer {
        at::Tensor experts;        ///< uint8 [n, K] up to 256 experts, else int16
        at::Tensor weights;        ///< half [n, K], or undefined
        at::Tensor margin;         ///< half [n]: selection score of the K-th expert minus that of the next; undefined without details
        at::Tensor entropy;        ///< half [n]: H(p_t) / ln E of the token's scores as frequencies; with margin
        at::Tensor changed;        ///< uint8 [n]: how many of the chosen would not be chosen without the bias; with margin
        at::Tensor dropped;        ///< uint8 [n]: how many of the chosen capacity dropped; undefined where nothing could be
        at::Tensor probability;    ///< float64 [D, E]: sum of the tokens' p by domain; with margin
    };
    at::Tensor ids;                ///< int32 [n]
    at::Tensor domain;             ///< int16 [n], −1 for padding
    at::Tensor position;           ///< int32 [n], in the token's sequence
    std::map<int64_t, Layer> layers;   ///< by absolute layer
};

/// What holds for a whole trace.
struct TraceFacts {
    int64_t num_experts = 0, num_groups = 1;
    int64_t seq_length = 0;            ///< 0: unknown; a context never crosses the start of a sequence
    std::vector<std::string> domains;
    std::string tokenizer = "bytes";
};

/// A file of chunks: the bytes "MOETRACE", uint32 version (2), uint32 length of a JSON text, the text (the facts), and chunks. A chunk: the bytes
/// "CHNK" ("LAST", empty, at the end), uint32 CRC-32C of the payload, uint64 payload bytes, uint64 tokens, uint64 layers; the payload: for each layer
/// int32 index, K, bytes an expert id, 1 for weights + 2 for details + 4 for what was dropped; then ids, domains, positions; then for each layer experts, weights, margin, entropy,
/// changed, dropped, probability, as TraceChunk has them. Version 1 had no dropped. Little endian.
class TraceFile {
public:
    /// A new file. Throws moe::Error (io). An empty path: a nameless one in the system's temporary folder.
    static std::unique_ptr<TraceFile> create(const std::string& path, const TraceFacts& facts);
    /// An existing one, of which only the chunks' places are read. A torn end is left out, and is_complete() false. Throws moe::Error (io; data for what is no trace).
    static std::unique_ptr<TraceFile> open(const std::string& path);
    ~TraceFile();
    TraceFile(const TraceFile&) = delete;

    const TraceFacts& facts() const { return facts_; }
    const std::string& path() const { return path_; }
    bool is_complete() const { return complete_; }
    int64_t num_tokens() const;
    size_t num_chunks() const { return chunks_.size(); }
    /// Throws moe::Error (io).
    void append(const TraceChunk& chunk);
    /// Nothing comes after it. Throws moe::Error (io).
    void finish();
    /// Chunk i. Throws moe::Error (io; data where its checksum is wrong).
    TraceChunk read(size_t i) const;

private:
    struct Place {
        int64_t begin, bytes, tokens, layers;
        uint32_t crc;
    };
    TraceFile(std::string path, std::FILE* file) : path_(std::move(path)), file_(file) {}
    void write(const void* bytes, size_t size);
    bool try_read(void* bytes, size_t size) const;
    [[noreturn]] void damaged(const std::string& got) const;

    std::string path_;
    std::FILE* file_;
    TraceFacts facts_;
    std::vector<Place> chunks_;
    bool complete_ = false;
};

/// Bytes of a chunk's tensors.
int64_t bytes_of(const TraceChunk& chunk);

}  // namespace moe::routing
