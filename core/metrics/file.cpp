#include "core/metrics/file.h"

#include "core/base/error.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <sys/stat.h>
#include <unistd.h>

namespace moe::metrics {
namespace {
constexpr int64_t kWindowBytes = int64_t(4) << 20;

std::string read_window(int descriptor, const std::string& path, int64_t offset, int64_t size) {
    std::string bytes(size_t(size), '\0');
    int64_t done = 0;
    while (done < size) {
        ssize_t got = pread(descriptor, bytes.data() + done, size_t(size - done), offset + done);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) throw_file_error(path, errno);
        if (got == 0) break;
        done += got;
    }
    bytes.resize(size_t(done));
    return bytes;
}
}  // namespace

void throw_file_error(const std::string& path, int error) {
    MOE_THROW(io, "metrics", fmt::format("{}: {}", path, std::strerror(error)), "a run's metrics folder that can be read and written",
              error == ENOSPC || error == EDQUOT ? "the disk is full: free some space or choose another output_dir" : "check output_dir and its permissions");
}

int64_t scan_records(int descriptor, const std::string& path, int64_t offset, const std::function<void(std::string_view, int64_t)>& take) {
    struct stat status {};
    if (fstat(descriptor, &status) != 0) throw_file_error(path, errno);
    int64_t size = status.st_size, window = kWindowBytes;
    while (offset < size) {
        std::string bytes = read_window(descriptor, path, offset, std::min(window, size - offset));
        if (bytes.empty()) break;
        std::string_view rest = bytes;
        bool is_end = offset + int64_t(bytes.size()) >= size;
        Frame frame = next_frame(rest, is_end);
        for (; frame.state == FrameState::whole; frame = next_frame(rest, is_end)) {
            offset += frame.needed;
            rest.remove_prefix(size_t(frame.needed));
            take(frame.payload, offset);
        }
        MOE_CHECK(frame.state != FrameState::damaged, data, "metrics", fmt::format("{}: a damaged record at byte {}", path, offset), "records whose checksums are right",
                  "the file was changed or damaged; what is before this byte can be kept by cutting it there");
        if (is_end) break;
        window = std::max(kWindowBytes, frame.needed);
    }
    return offset;
}

}  // namespace moe::metrics
