#include "core/base/host_memory.h"

#include "tests/catch.h"
#include "tests/folder.h"

using namespace moe;

namespace {
constexpr int64_t kMiB = 1 << 20;
}  // namespace

TEST_CASE("host memory: this machine has some, and not more available than there is", "[base]") {
    HostMemory m = host_memory();
    CHECK(m.total > 64 * kMiB);
    CHECK(m.available > 0);
    CHECK(m.available <= m.total);
}

TEST_CASE("host memory: the smallest limit of the cgroups above counts", "[base]") {
    test::Folder root;
    std::string r = root.path();
    root.write("proc/meminfo", "MemTotal:       8388608 kB\nMemFree:  1 kB\nMemAvailable:   4194304 kB\n");
    CHECK(host_memory(r).total == 8192 * kMiB);
    CHECK(host_memory(r).available == 4096 * kMiB);
    root.write("proc/self/cgroup", "0::/jobs/step\n");
    root.write("sys/fs/cgroup/jobs/step/memory.max", "max\n");
    root.write("sys/fs/cgroup/jobs/memory.max", std::to_string(1024 * kMiB));
    root.write("sys/fs/cgroup/jobs/memory.current", std::to_string(700 * kMiB));
    root.write("sys/fs/cgroup/jobs/memory.stat", "anon 5\ninactive_file " + std::to_string(100 * kMiB) + "\n");
    CHECK(host_memory(r).total == 1024 * kMiB);
    CHECK(host_memory(r).available == 424 * kMiB);
}

TEST_CASE("host memory: cgroups of the first version, and their number for no limit", "[base]") {
    test::Folder root;
    std::string r = root.path();
    root.write("proc/meminfo", "MemTotal: 8388608 kB\nMemAvailable: 4194304 kB\n");
    root.write("proc/self/cgroup", "12:cpu:/x\n5:memory,hugetlb:/box\n");
    root.write("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712");
    CHECK(host_memory(r).total == 8192 * kMiB);
    root.write("sys/fs/cgroup/memory/box/memory.limit_in_bytes", std::to_string(512 * kMiB));
    root.write("sys/fs/cgroup/memory/box/memory.usage_in_bytes", std::to_string(600 * kMiB));
    CHECK(host_memory(r).total == 512 * kMiB);
    CHECK(host_memory(r).available == 0);
}
