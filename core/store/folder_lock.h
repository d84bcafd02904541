// One writer a folder.
#pragma once
#include <string>

namespace moe::store {

/// The right to write to a run's folder: an exclusive lock on <folder>/lock, which ends with the process, however it ends.
class FolderLock {
public:
    /// Throws moe::Error (state) where another process, or another object of this one, holds it; (io) where the file cannot be made.
    explicit FolderLock(const std::string& folder);
    ~FolderLock();
    FolderLock(const FolderLock&) = delete;
    FolderLock& operator=(const FolderLock&) = delete;

private:
    int descriptor_ = -1;
};

}  // namespace moe::store
