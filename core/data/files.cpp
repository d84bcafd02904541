#include "core/data/files.h"

#include "core/base/error.h"

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <filesystem>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

namespace fs = std::filesystem;

namespace moe::data {
namespace {
// Descriptors that stay open in the process; further files are opened for every read. Well below the usual limit of 1024.
constexpr int kMaxOpenFiles = 256;
std::atomic<int> num_open_files = 0;

bool is_hidden(const fs::path& path) { return path.filename().string().starts_with('.'); }
}  // namespace

void throw_unreadable(const std::string& key, const std::string& path, const std::string& why) {
    MOE_THROW(io, key, fmt::format("{}: {}", path, why), "a readable file or folder of data", "check the path and its permissions");
}

std::vector<std::pair<std::string, int64_t>> list_files(const std::string& path, const std::string& key) {
    std::error_code code;
    auto status = fs::status(path, code);
    if (!fs::exists(status)) throw_unreadable(key, path, code ? code.message() : "No such file or directory");
    std::vector<std::pair<std::string, int64_t>> files;
    if (fs::is_regular_file(status)) {
        files.emplace_back(path, int64_t(fs::file_size(path, code)));
        if (code) throw_unreadable(key, path, code.message());
    } else {
        if (!fs::is_directory(status)) throw_unreadable(key, path, "neither a file nor a folder");
        fs::recursive_directory_iterator it(path, code), end;
        while (!code && it != end) {
            if (is_hidden(it->path())) {
                it.disable_recursion_pending();
            } else if (it->is_regular_file(code)) {
                files.emplace_back(it->path().string(), int64_t(it->file_size(code)));
            }
            if (!code) it.increment(code);
        }
        if (code) throw_unreadable(key, it == end ? path : it->path().string(), code.message());
    }
    for (const auto& [file, bytes] : files) {
        if (access(file.c_str(), R_OK) != 0) throw_unreadable(key, file, std::strerror(errno));
    }
    std::sort(files.begin(), files.end());
    return files;
}

ReadableFile::~ReadableFile() {
    if (descriptor_ < 0) return;
    close(descriptor_);
    --num_open_files;
}

int ReadableFile::open_descriptor(bool& keep) const {
    keep = true;
    if (int kept = descriptor_.load(); kept >= 0) return kept;
    int opened = open(path_.c_str(), O_RDONLY | O_CLOEXEC), none = -1;
    if (opened < 0) throw_unreadable("data", path_, std::strerror(errno));
    // Another thread may have kept a descriptor meanwhile: then this one serves one read only.
    keep = num_open_files.fetch_add(1) < kMaxOpenFiles && descriptor_.compare_exchange_strong(none, opened);
    if (!keep) --num_open_files;
    return opened;
}

void ReadableFile::read(int64_t begin, std::span<uint8_t> out) const {
    if (out.empty()) return;
    bool keep = true;
    int descriptor = open_descriptor(keep);
    size_t done = 0;
    ssize_t got = 1;
    while (done < out.size() && got > 0) {
        got = pread(descriptor, out.data() + done, out.size() - done, begin + int64_t(done));
        if (got < 0 && errno == EINTR) got = 1;
        else if (got > 0) done += size_t(got);
    }
    int error = errno;
    if (!keep) close(descriptor);
    if (got < 0) throw_unreadable("data", path_, std::strerror(error));
    MOE_CHECK(done == out.size(), data, "data", fmt::format("{} ends at byte {}", path_, begin + int64_t(done)), fmt::format("at least {} bytes", begin + int64_t(out.size())),
              "the file became shorter after it was opened");
}

MappedFile::MappedFile(std::string path, const std::string& key) : path_(std::move(path)) {
    int descriptor = open(path_.c_str(), O_RDONLY | O_CLOEXEC);
    if (descriptor < 0) throw_unreadable(key, path_, std::strerror(errno));
    struct stat status {};
    void* mapped = MAP_FAILED;
    bool known = fstat(descriptor, &status) == 0;
    size_ = known ? int64_t(status.st_size) : 0;
    if (size_ > 0) mapped = mmap(nullptr, size_t(size_), PROT_READ, MAP_SHARED, descriptor, 0);
    int error = errno;
    close(descriptor);
    if (!known || (size_ > 0 && mapped == MAP_FAILED)) throw_unreadable(key, path_, std::strerror(error));
    if (size_ > 0) data_ = static_cast<const uint8_t*>(mapped);
}

MappedFile::~MappedFile() {
    if (data_) munmap(const_cast<uint8_t*>(data_), size_t(size_));
}

void MappedFile::check_size() const {
    struct stat status {};
    // A file that was removed or replaced lives on in the mapping.
    if (stat(path_.c_str(), &status) != 0) return;
    MOE_CHECK(int64_t(status.st_size) >= size_, data, "data", fmt::format("{} of {} bytes", path_, int64_t(status.st_size)), fmt::format("{} bytes", size_),
              "the file became shorter after it was opened");
}

AtomicFile::AtomicFile(std::string path) : path_(std::move(path)) {
    std::error_code code;
    fs::create_directories(fs::path(path_).parent_path(), code);
    std::string name = path_ + ".XXXXXX";
    int descriptor = code ? -1 : mkstemp(name.data());
    if (code) errno = code.value();
    if (descriptor < 0) fail();
    temporary_ = name;
    // mkstemp's files are the owner's alone; a cache is shared.
    file_ = fchmod(descriptor, 0644) == 0 ? fdopen(descriptor, "wb") : nullptr;
    if (!file_) {
        int error = errno;
        close(descriptor);
        unlink(temporary_.c_str());
        errno = error;
        fail();
    }
}

AtomicFile::~AtomicFile() {
    if (!file_) return;
    std::fclose(file_);
    unlink(temporary_.c_str());
}

void AtomicFile::fail() {
    MOE_THROW(io, "data.cache_dir", fmt::format("{}: {}", path_, std::strerror(errno)), "a folder that can be written, with room", "set data.cache_dir to another folder");
}

void AtomicFile::write(const void* bytes, size_t size) {
    if (size > 0 && std::fwrite(bytes, 1, size, file_) != size) fail();
}

void AtomicFile::rewrite(const void* bytes, size_t size) {
    if (std::fseek(file_, 0, SEEK_SET) != 0) fail();
    write(bytes, size);
    if (std::fseek(file_, 0, SEEK_END) != 0) fail();
}

void AtomicFile::commit() {
    if (std::fflush(file_) != 0 || fsync(fileno(file_)) != 0 || rename(temporary_.c_str(), path_.c_str()) != 0) fail();
    std::fclose(file_);
    file_ = nullptr;
}

}  // namespace moe::data
