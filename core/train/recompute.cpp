#include "core/train/recompute.h"

#include "core/base/error.h"
#include "core/base/log.h"
#include "core/base/suggest.h"
#include "core/plan/memory.h"

#include <fmt/ranges.h>

#include <set>

namespace moe::train {
namespace {
/// Of a device's memory; the rest is for libraries' workspaces and what lies unused between blocks.
constexpr double kUsableMemory = 0.92;

/// Throws where one of the names is neither a segment nor a kind of segment of the whole model: on several stages it may be another's.
void check_recompute(const Config& c, const std::vector<std::string>& names) {
    std::vector<std::string> all = segment_names(c);
    std::set<std::string> kinds;
    for (auto& segment : all) kinds.insert(segment_kind(segment));
    std::set<std::string> known(all.begin(), all.end());
    known.insert(kinds.begin(), kinds.end());
    all.insert(all.begin(), kinds.begin(), kinds.end());
    for (auto& name : names)
        MOE_CHECK(known.contains(name), config, "training.recompute", '"' + name + '"',
                  fmt::format("a kind of segment ({}), or one segment, like layers.0.attention; the model's layers are 0 to {}", fmt::join(kinds, ", "), c.model.num_layers + c.training.mtp_depth() - 1), did_you_mean(name, all));
}
}  // namespace

std::vector<int> recompute_spans(const Model& model, const std::string& mode, const std::vector<std::string>& kinds) {
    auto& segments = model.segments();
    std::vector<int> spans(segments.size(), -1);
    if (mode == "none") return spans;
    MOE_CHECK(mode == "selective" || mode == "full", config, "training.gradient_checkpointing", mode, "none, selective or full", "");
    if (mode == "full") {
        int span = -1;
        for (size_t s = 0; s < segments.size(); ++s) {
            if (segments[s].layer < 0) continue;
            if (s == 0 || segments[s - 1].layer != segments[s].layer) ++span;
            spans[s] = span;
        }
        return spans;
    }
    check_recompute(model.config(), kinds);
    std::set<std::string> wanted(kinds.begin(), kinds.end());
    for (size_t s = 0; s < segments.size(); ++s)
        if (wanted.contains(segment_kind(segments[s].name)) || wanted.contains(segments[s].name)) spans[s] = int(s);
    return spans;
}

std::vector<std::string> recomputed_segments(const Config& c, const dist::Group& world, double obtainable_bytes) {
    if (c.training.gradient_checkpointing != "selective" || !c.training.recompute.empty()) return c.training.recompute;
    double budget = kUsableMemory * world.all_reduce(obtainable_bytes, dist::ReduceOp::min);
    auto chosen = plan::choose_recompute(c, world.size(), budget);
    if (world.rank() == 0)
        log::info(fmt::format("training.gradient_checkpointing selective: {} in backward, to fit {:.1f} GiB", chosen.empty() ? "nothing is computed again" : fmt::format("{} computed again", fmt::join(chosen, ", ")), budget / (1 << 30)));
    return chosen;
}
}  // namespace moe::train
