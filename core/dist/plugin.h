// Opening of a communication library at run time.
#pragma once
#include "core/dist/backend.h"

#include <memory>
#include <string>
#include <vector>

namespace moe::dist {

/// File name of the MPI plugin.
constexpr const char* kMpiPlugin = "libmoelab_mpi.so";
/// Where the MPI plugin may be: ../lib of the executable, its own folder, then $MOELAB_MPI_PLUGIN (a file).
std::vector<std::string> plugin_candidates();
/// The world of the first candidate that exists. Throws moe::Error (dist) where none does or the library cannot be opened.
std::shared_ptr<Backend> open_plugin(const std::vector<std::string>& candidates);

}  // namespace moe::dist
