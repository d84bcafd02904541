// A domain: an indexable set of documents of tokens, and the interface that a new kind of source implements.
#pragma once
#include <cstdint>
#include <span>
#include <string>

namespace moe::data {

/// A run of tokens of one document: at most one sequence long where documents can be read from anywhere.
struct Chunk {
    int64_t document = 0, offset = 0, length = 0;
    bool operator==(const Chunk&) const = default;
};

/// Documents of one source. Reading is a pure function of (document, offset), so that any rank can make any sequence.
/// Every document ends with the end-of-document token, which its lengths count. All of it is safe to call from several threads.
class Domain {
public:
    explicit Domain(std::string name) : name_(std::move(name)) {}
    virtual ~Domain() = default;
    const std::string& name() const { return name_; }
    /// Chunks of an epoch, at least 1; −1 where documents never end.
    virtual int64_t num_chunks() const = 0;
    /// Tokens of an epoch; −1 where documents never end.
    virtual int64_t num_tokens() const = 0;
    /// Lines that were left out because they could not be read (data.bad_lines = "skip").
    virtual int64_t num_bad_lines() const { return 0; }
    /// Changes when the documents change: a checkpoint's data position is only good for the same documents.
    virtual uint64_t fingerprint() const = 0;
    /// Chunk i of [0, num_chunks()), in the order of the documents; length > 0.
    virtual Chunk chunk(int64_t i) const = 0;
    /// Reads tokens [offset, offset + out.size()) of a document; returns how many there were before its end.
    /// Throws moe::Error (io, data).
    virtual int64_t read(int64_t document, int64_t offset, std::span<int64_t> out) const = 0;

private:
    std::string name_;
};

}  // namespace moe::data
