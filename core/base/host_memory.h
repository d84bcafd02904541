// How much memory this machine has for a process.
#pragma once
#include <cstdint>
#include <string>

namespace moe {

/// Bytes. `available` is what can be taken without swapping or being killed: the kernel's estimate, or what the process's cgroup
/// (a container, a batch job) leaves where that is less.
struct HostMemory {
    int64_t total = 0, available = 0;
};

/// Read anew at each call. `root` stands in front of /proc and /sys, for tests; `cgroup_of` is the process's list of cgroups.
HostMemory host_memory(const std::string& root = "", const std::string& cgroup_of = "/proc/self/cgroup");

}  // namespace moe
