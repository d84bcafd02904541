// Files as the readers of documents need them: found, read from anywhere, mapped, and written in one piece.
#pragma once
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace moe::data {

/// Throws moe::Error (io): `path` cannot be read, for the reason `why`; `key` is the configuration key to name.
[[noreturn]] void throw_unreadable(const std::string& key, const std::string& path, const std::string& why);

/// The regular files below a folder, or the one file, with their bytes, in the order of their paths; names that begin with "." are
/// left out. Throws moe::Error (io) for what is missing or unreadable.
std::vector<std::pair<std::string, int64_t>> list_files(const std::string& path, const std::string& key);

/// A file that is read from anywhere. Thread safe. It is opened at the first read and stays open while the process has few such files.
class ReadableFile {
public:
    explicit ReadableFile(std::string path) : path_(std::move(path)) {}
    ~ReadableFile();
    ReadableFile(const ReadableFile&) = delete;
    ReadableFile& operator=(const ReadableFile&) = delete;
    const std::string& path() const { return path_; }
    /// Bytes [begin, begin + out.size()). Throws moe::Error (io), and (data) where the file ends before.
    void read(int64_t begin, std::span<uint8_t> out) const;

private:
    int open_descriptor(bool& keep) const;

    std::string path_;
    mutable std::atomic<int> descriptor_ = -1;
};

/// A whole file in the address space, read-only; its pages are the system's to drop.
class MappedFile {
public:
    /// Throws moe::Error (io) naming `key`.
    MappedFile(std::string path, const std::string& key);
    ~MappedFile();
    MappedFile(const MappedFile&) = delete;
    MappedFile& operator=(const MappedFile&) = delete;
    const std::string& path() const { return path_; }
    const uint8_t* data() const { return data_; }
    int64_t size() const { return size_; }
    /// Throws moe::Error (data) where the file became shorter: its lost pages would end the process.
    void check_size() const;

private:
    std::string path_;
    const uint8_t* data_ = nullptr;
    int64_t size_ = 0;
};

/// A file that appears under its name only when it is complete: written beside it and renamed.
class AtomicFile {
public:
    /// Makes the folder, too. Throws moe::Error (io), as the other functions do.
    explicit AtomicFile(std::string path);
    ~AtomicFile();   ///< without commit() nothing is left
    AtomicFile(const AtomicFile&) = delete;
    AtomicFile& operator=(const AtomicFile&) = delete;
    void write(const void* bytes, size_t size);
    /// Overwrites bytes at the file's beginning: a header whose counts are known at the end.
    void rewrite(const void* bytes, size_t size);
    void commit();

private:
    [[noreturn]] void fail();

    std::string path_, temporary_;
    std::FILE* file_ = nullptr;
};

}  // namespace moe::data
