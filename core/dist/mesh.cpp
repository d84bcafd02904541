#include "core/base/error.h"
#include "core/dist/group.h"

namespace moe::dist {
namespace {
void check_one(const char* key, int64_t size, const char* row) {
    MOE_CHECK(size == 1, config, fmt::format("distributed.{}", key), fmt::format("{}", size), "1", fmt::format("this axis is not built yet (row {})", row));
}
}  // namespace

Mesh make_mesh(const DistributedConfig& config, const Group& world) {
    check_one("tensor_parallel_size", config.tensor_parallel_size, "D1");
    check_one("pipeline_parallel_size", config.pipeline_parallel_size, "D1");
    check_one("context_parallel_size", config.context_parallel_size, "D1");
    int64_t ranks = world.size(), dp = config.data_parallel_size == -1 ? ranks : config.data_parallel_size, ep = config.expert_parallel_size;
    MOE_CHECK(dp == ranks, config, "distributed.data_parallel_size", fmt::format("{}", dp), fmt::format("{} (the number of ranks), or -1 for all", ranks),
              fmt::format("start {} rank{} (--ranks {}), or change the size", dp, dp == 1 ? "" : "s", dp));
    MOE_CHECK(ep >= 1 && dp % ep == 0, config, "distributed.expert_parallel_size", fmt::format("{}", ep), fmt::format("a divisor of data_parallel_size, which is {}", dp),
              "expert parallel ranks are taken from the data parallel ones");
    Mesh mesh;
    mesh.world = mesh.dp = world;
    if (ep == 1) mesh.expert_dp = world;
    else if (ep == dp) mesh.ep = world;
    else {
        int rank = world.rank();
        mesh.ep = world.split(int(rank / ep), int(rank % ep));
        mesh.expert_dp = world.split(int(rank % ep), int(rank / ep));
    }
    return mesh;
}
}  // namespace moe::dist
