// Layouts of a model over the ranks of a test, and a folder that all of them share.
#pragma once
#include "core/config/config.h"
#include "core/dist/group.h"
#include "core/train/agree.h"

#include <fmt/format.h>
#include <unistd.h>

#include <filesystem>
#include <string>
#include <vector>

namespace moe::test {

struct Layout {
    int64_t ep = 1, zero = 0, tp = 1, pp = 1;
    std::string name() const { return fmt::format("EP{} ZeRO-{} TP{} PP{}", ep, zero, tp, pp); }
    Config of(Config c) const {
        c.distributed.expert_parallel_size = ep;
        c.distributed.zero_stage = zero;
        c.distributed.tensor_parallel_size = tp;
        c.distributed.pipeline_parallel_size = pp;
        return c;
    }
    int64_t data_parallel() const { return dist::world().size() / (tp * pp); }
};

/// What differs in where weights, tokens and layers lie, on two or on four ranks.
inline std::vector<Layout> layouts() {
    if (dist::world().size() == 2) return {{}, {.ep = 2, .zero = 1}, {.ep = 2, .zero = 3}, {.ep = 2, .tp = 2}, {.zero = 1, .pp = 2}};
    return {{.ep = 2, .zero = 3}, {.ep = 2, .zero = 1, .tp = 2}, {.ep = 2, .pp = 2}, {.ep = 2, .tp = 2, .pp = 2}};
}

/// The same folder on all ranks; rank 0 removes it.
struct SharedFolder {
    std::string path = train::shared_text((std::filesystem::temp_directory_path() / ("moelab_mpi_" + std::to_string(getpid()))).string(), dist::world());
    ~SharedFolder() {
        dist::world().barrier();
        std::error_code ignored;
        if (dist::world().rank() == 0) std::filesystem::remove_all(path, ignored);
        dist::world().barrier();
    }
};

}  // namespace moe::test
