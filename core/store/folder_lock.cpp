#include "core/store/folder_lock.h"

#include "core/base/error.h"

#include <cerrno>
#include <cstring>
#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

namespace moe::store {
namespace {
/// The holder's process, as it wrote it; "another process" where that is not known.
std::string holder(int descriptor) {
    char text[32] = "";
    ssize_t size = pread(descriptor, text, sizeof text - 1, 0);
    long pid = size > 0 ? std::strtol(text, nullptr, 10) : 0;
    if (pid == long(getpid())) return "another run of this process";
    return pid > 0 ? fmt::format("process {}", pid) : "another process";
}
}  // namespace

FolderLock::FolderLock(const std::string& folder) {
    std::string path = folder + "/lock";
    descriptor_ = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    MOE_CHECK(descriptor_ >= 0, io, "run folder", fmt::format("{}: {}", path, std::strerror(errno)), "a folder that can be written", "check the path and its permissions");
    int failed;
    while ((failed = flock(descriptor_, LOCK_EX | LOCK_NB)) != 0 && errno == EINTR) {}
    if (failed) {
        int error = errno;
        std::string who = holder(descriptor_);
        close(descriptor_);
        MOE_CHECK(error == EWOULDBLOCK, io, "run folder", fmt::format("{}: {}", path, std::strerror(error)), "a file system with locks", "");
        MOE_THROW(state, "run folder", fmt::format("{} is written to by {}", folder, who), "one run at a time", "wait until it has ended, or resume from a copy of the folder");
    }
    // Only for the message above: the lock itself does not depend on it.
    std::string pid = std::to_string(getpid()) + "\n";
    if (ftruncate(descriptor_, 0) == 0) (void)!pwrite(descriptor_, pid.data(), pid.size(), 0);
}

FolderLock::~FolderLock() { close(descriptor_); }

}  // namespace moe::store
