#include "core/base/error.h"
#include "core/dist/group.h"

namespace moe::dist {
Mesh make_mesh(const DistributedConfig& config, const Group& world) {
    MOE_CHECK(config.context_parallel_size == 1, config, "distributed.context_parallel_size", fmt::format("{}", config.context_parallel_size), "1", "this axis is not built yet");
    int64_t ranks = world.size(), tp = config.tensor_parallel_size, pp = config.pipeline_parallel_size, ep = config.expert_parallel_size;
    MOE_CHECK(tp >= 1 && pp >= 1 && ranks % (tp * pp) == 0, config, "distributed.tensor_parallel_size", fmt::format("tensor_parallel_size {} x pipeline_parallel_size {} on {} ranks", tp, pp, ranks),
              "a product that divides the number of ranks", fmt::format("start {} ranks (--ranks {}), or change the sizes", tp * pp, tp * pp));
    int64_t left = ranks / (tp * pp), dp = config.data_parallel_size == -1 ? left : config.data_parallel_size;
    MOE_CHECK(dp == left, config, "distributed.data_parallel_size", fmt::format("{}", dp), fmt::format("{} (ranks / tensor / pipeline), or -1 for all", left),
              fmt::format("start {} rank{} (--ranks {}), or change the size", dp * tp * pp, dp * tp * pp == 1 ? "" : "s", dp * tp * pp));
    int64_t in_stage = dp * tp;
    MOE_CHECK(ep >= 1 && in_stage % ep == 0, config, "distributed.expert_parallel_size", fmt::format("{}", ep), fmt::format("a divisor of data_parallel_size x tensor_parallel_size, which is {}", in_stage),
              "expert parallel ranks are taken from those of a stage");
    Mesh mesh;
    mesh.world = world;
    int rank = world.rank(), part = int(rank % tp), replica = int(rank / tp % dp), stage = int(rank / in_stage), place = int(rank % in_stage);
    // Splitting is a collective, so every rank makes every call; a whole group is taken as it is.
    auto split = [](const Group& group, int64_t size, int colour, int key) { return size == 1 ? Group() : size == group.size() ? group : group.split(colour, key); };
    mesh.stage = split(world, in_stage, stage, place);
    mesh.tp = split(mesh.stage, tp, replica, part);
    mesh.dp = split(mesh.stage, dp, part, replica);
    mesh.ep = split(mesh.stage, ep, int(place / ep), int(place % ep));
    mesh.expert_dp = split(mesh.stage, in_stage / ep, int(place % ep), int(place / ep));
    mesh.pp = split(world, pp, place, stage);
    bool at_an_end = stage == 0 || stage + 1 == pp;
    mesh.tied = pp == 1 ? mesh.stage : pp == 2 ? world : world.split(at_an_end ? 0 : 1 + rank, rank);
    return mesh;
}
}  // namespace moe::dist
