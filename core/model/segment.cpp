#include "core/model/segment.h"

#include "core/config/config.h"

#include <fmt/format.h>

namespace moe {
std::vector<std::string> segment_names(const Config& config) {
    const ModelConfig& m = config.model;
    std::vector<std::string> names = {"embed"};
    auto add_layer = [&](int64_t layer, bool is_moe) {
        std::vector<std::string> kinds = {"attention"};
        if (!is_moe) kinds.push_back("feed_forward");
        else if (m.shared_width() > 0) kinds.insert(kinds.end(), {"route", "dispatch", "experts", "shared_experts", "combine"});
        else kinds.insert(kinds.end(), {"route", "dispatch", "experts", "combine"});
        for (auto& kind : kinds) names.push_back(fmt::format("layers.{}.{}", layer, kind));
    };
    for (int64_t layer = 0; layer < m.num_layers; ++layer) add_layer(layer, m.is_moe_layer(layer));
    names.insert(names.end(), {"final_norm", "head"});
    for (int64_t k = 1; k <= config.training.mtp_depth(); ++k) {
        names.push_back(fmt::format("mtp.{}.join", k));
        add_layer(m.num_layers + k - 1, true);
        for (auto kind : {"norm", "head"}) names.push_back(fmt::format("mtp.{}.{}", k, kind));
    }
    return names;
}
}  // namespace moe
