// Generated values (cmake/version.cmake): what was built from what.
#pragma once

namespace moe {
extern const char* const kVersion;        ///< "0.1.0"
extern const char* const kCommit;         ///< short commit, "+" where the tree had changes, "unknown" outside git
extern const char* const kTorchVersion;   ///< "2.11.0+cu130"
}  // namespace moe
