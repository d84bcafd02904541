#include "core/base/error.h"
#include "core/store/safetensors.h"

#include <ATen/ATen.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fcntl.h>
#include <filesystem>
#include <set>
#include <sys/stat.h>
#include <unistd.h>
#include <utility>

namespace fs = std::filesystem;

namespace moe::store {
namespace {
// A file that is complete under its own name or not there at all.
class AtomicFile {
public:
    explicit AtomicFile(const std::string& path) : path_(path) {
        // A device or a pipe cannot be replaced by a rename: it is written to.
        struct stat status {};
        in_place_ = stat(path.c_str(), &status) == 0 && !S_ISREG(status.st_mode) && !S_ISDIR(status.st_mode);
        temporary_ = in_place_ ? path : fmt::format("{}.tmp{}", path, getpid());
        descriptor_ = open(temporary_.c_str(), O_WRONLY | O_CLOEXEC | (in_place_ ? 0 : O_CREAT | O_TRUNC), 0666);
        if (descriptor_ < 0) fail(errno);
    }
    ~AtomicFile() {
        if (descriptor_ < 0) return;
        close(descriptor_);
        remove_temporary();
    }
    AtomicFile(const AtomicFile&) = delete;
    AtomicFile& operator=(const AtomicFile&) = delete;

    void write(const void* data, size_t size) {
        auto bytes = static_cast<const char*>(data);
        while (size > 0) {
            ssize_t done = ::write(descriptor_, bytes, size);
            if (done < 0 && errno != EINTR) fail(errno);
            if (done > 0) bytes += done, size -= size_t(done);
        }
    }

    void commit() {
        if (!in_place_ && fsync(descriptor_) != 0) fail(errno);
        int closed = close(std::exchange(descriptor_, -1));
        if (closed != 0 || (!in_place_ && rename(temporary_.c_str(), path_.c_str()) != 0)) {
            int error = errno;
            remove_temporary();
            fail(error);
        }
        if (!in_place_) sync_folder();
    }

private:
    [[noreturn]] void fail(int error) {
        MOE_THROW(io, "save_safetensors", fmt::format("{}: {}", path_, std::strerror(error)), "a file that can be written",
                  error == ENOSPC || error == EDQUOT ? "the disk is full: free some space or choose another folder" : "check the folder and its permissions");
    }
    void remove_temporary() {
        if (!in_place_) unlink(temporary_.c_str());
    }
    // The rename itself must survive a crash as well; file systems that cannot sync a folder are left alone.
    void sync_folder() {
        auto folder = fs::path(path_).parent_path();
        int descriptor = open(folder.empty() ? "." : folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        if (descriptor < 0) return;
        fsync(descriptor);
        close(descriptor);
    }

    std::string path_, temporary_;
    bool in_place_ = false;
    int descriptor_ = -1;
};
}  // namespace

void save_safetensors(const std::string& path, const NamedTensors& tensors, const std::map<std::string, std::string>& metadata) {
    // Wide dtypes first, so that every tensor is aligned to its own.
    std::vector<const NamedTensors::value_type*> order;
    std::set<std::string> names;
    for (const auto& entry : tensors) {
        MOE_CHECK(entry.first != "__metadata__" && names.insert(entry.first).second, usage, "save_safetensors", fmt::format("the name \"{}\"", entry.first), "names that are used once", "");
        MOE_CHECK(entry.second.defined(), usage, "save_safetensors", fmt::format("no tensor for \"{}\"", entry.first), "a tensor", "");
        order.push_back(&entry);
    }
    std::stable_sort(order.begin(), order.end(), [](auto a, auto b) { return a->second.element_size() > b->second.element_size(); });
    nlohmann::ordered_json header = nlohmann::ordered_json::object();
    if (!metadata.empty()) header["__metadata__"] = metadata;
    int64_t at = 0;
    for (const auto* entry : order) {
        int64_t end = at + int64_t(entry->second.nbytes());
        header[entry->first] = {{"dtype", safetensors_dtype(entry->second.scalar_type())}, {"shape", entry->second.sizes().vec()}, {"data_offsets", {at, end}}};
        at = end;
    }
    std::string text = header.dump();
    text.resize((text.size() + 7) / 8 * 8, ' ');
    uint64_t length = text.size();
    AtomicFile file(path);
    file.write(&length, 8);
    file.write(text.data(), text.size());
    for (const auto* entry : order) {
        at::Tensor t = entry->second.detach().to(at::kCPU).contiguous();
        file.write(t.data_ptr(), t.nbytes());
    }
    file.commit();
}

}  // namespace moe::store
