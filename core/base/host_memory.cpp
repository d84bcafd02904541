#include "core/base/host_memory.h"

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <optional>
#include <vector>

namespace moe {
namespace {
constexpr int64_t kNoLimit = int64_t(1) << 60;      // cgroup v1 writes a number near 2^63 for "no limit"

std::optional<int64_t> number_in(const std::string& file) {
    std::ifstream in(file);
    int64_t value = 0;
    if (in >> value) return value;
    return std::nullopt;                            // no such file, or the word "max"
}

/// "MemTotal:   24103000 kB" as bytes, 0 where there is none.
int64_t meminfo_bytes(const std::string& root, const std::string& key) {
    std::ifstream in(root + "/proc/meminfo");
    for (std::string line; std::getline(in, line);)
        if (line.starts_with(key + ":")) return std::atoll(line.c_str() + key.size() + 1) * 1024;
    return 0;
}

/// Folders that may limit this process: of its own cgroup and of all above, v2 ("0::/a/b") and v1 ("7:memory:/a/b").
std::vector<std::string> cgroup_folders(const std::string& root, const std::string& cgroup_of) {
    std::vector<std::string> folders;
    std::ifstream in(root + cgroup_of);
    for (std::string line; std::getline(in, line);) {
        size_t first = line.find(':'), second = line.find(':', first + 1);
        if (first == std::string::npos || second == std::string::npos) continue;
        std::string controllers = line.substr(first + 1, second - first - 1), path = line.substr(second + 1);
        bool v2 = controllers.empty();
        if (!v2 && ("," + controllers + ",").find(",memory,") == std::string::npos) continue;
        std::string base = root + (v2 ? "/sys/fs/cgroup" : "/sys/fs/cgroup/memory");
        while (path.size() > 1) {
            folders.push_back(base + path);
            path.resize(path.rfind('/'));
        }
        folders.push_back(base);
    }
    return folders;
}

/// Pages of files count as used, but the kernel takes them back first.
int64_t reclaimable(const std::string& folder) {
    std::ifstream in(folder + "/memory.stat");
    for (std::string key, value; in >> key >> value;)
        if (key == "inactive_file" || key == "total_inactive_file") return std::atoll(value.c_str());
    return 0;
}
}  // namespace

HostMemory host_memory(const std::string& root, const std::string& cgroup_of) {
    HostMemory m{meminfo_bytes(root, "MemTotal"), meminfo_bytes(root, "MemAvailable")};
    for (auto& folder : cgroup_folders(root, cgroup_of)) {
        for (auto [limit_name, used_name] : {std::pair{"/memory.max", "/memory.current"}, std::pair{"/memory.limit_in_bytes", "/memory.usage_in_bytes"}}) {
            auto limit = number_in(folder + limit_name);
            if (!limit || *limit >= kNoLimit) continue;
            m.total = std::min(m.total, *limit);
            m.available = std::min(m.available, *limit - number_in(folder + used_name).value_or(0) + reclaimable(folder));
        }
    }
    m.available = std::max<int64_t>(0, m.available);
    return m;
}
}  // namespace moe
