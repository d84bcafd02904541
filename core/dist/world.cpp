#include "core/base/error.h"
#include "core/dist/group.h"
#include "core/dist/plugin.h"
#include "core/dist/world_rank.h"

#include <dlfcn.h>

#include <atomic>
#include <cstdlib>
#include <filesystem>

namespace moe::dist {
namespace {
std::atomic<int> opened_rank{-1};

const char* kInstall = "install libopenmpi-dev and build again, or set MOELAB_MPI_PLUGIN to the plugin's file; one rank needs neither";

int env_int(const char* name) {
    const char* text = std::getenv(name);
    return text ? std::atoi(text) : 0;
}

Group open_world() {
    if (!launched_with_ranks()) return {};
    Group group(open_plugin(plugin_candidates()));
    if (group.size() > 1) opened_rank = group.rank();
    return group;
}
}  // namespace

int world_rank() { return opened_rank; }

bool launched_with_ranks() {
    if (env_int("OMPI_COMM_WORLD_SIZE") > 1 || env_int("PMI_SIZE") > 1) return true;
    const char* backend = std::getenv("MOELAB_BACKEND");      // a Slurm job has SLURM_NTASKS without being started by srun
    return backend && std::string(backend) == "mpi" && env_int("SLURM_NTASKS") > 1;
}

std::vector<std::string> plugin_candidates() {
    std::vector<std::string> files;
    std::error_code failed;
    auto exe = std::filesystem::read_symlink("/proc/self/exe", failed);
    if (!failed) {
        files.push_back((exe.parent_path().parent_path() / "lib" / kMpiPlugin).string());
        files.push_back((exe.parent_path() / kMpiPlugin).string());
    }
    if (const char* file = std::getenv("MOELAB_MPI_PLUGIN")) files.push_back(file);
    return files;
}

std::shared_ptr<Backend> open_plugin(const std::vector<std::string>& candidates) {
    std::string tried;
    for (const auto& file : candidates) {
        tried += (tried.empty() ? "" : ", ") + file;
        if (!std::filesystem::exists(file)) continue;
        // Global: MPI opens components of its own, which look for its symbols there.
        void* library = dlopen(file.c_str(), RTLD_NOW | RTLD_GLOBAL);
        if (!library) {
            const char* why = dlerror();
            MOE_THROW(dist, "MPI plugin", fmt::format("{}: {}", file, why ? why : "it cannot be opened"), "a plugin whose MPI library is installed", kInstall);
        }
        auto open = reinterpret_cast<OpenBackend>(dlsym(library, kOpenBackend));
        MOE_CHECK(open, dist, "MPI plugin", fmt::format("{} without {}", file, kOpenBackend), "a plugin of this version", kInstall);
        try {
            return std::shared_ptr<Backend>(open());
        } catch (const std::runtime_error& e) {
            MOE_THROW(dist, "MPI", e.what(), "a world of ranks", "start the ranks with the mpirun of the same MPI installation");
        }
    }
    MOE_THROW(dist, "MPI plugin", tried.empty() ? "no place to look" : "none of " + tried, kMpiPlugin, kInstall);
}

const Group& world() {
    static const Group group = open_world();
    return group;
}
}  // namespace moe::dist
