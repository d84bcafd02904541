#pragma once
#include "core/config/config.h"
#include "core/dist/group.h"

#include <string>

namespace moe::train {

/// What env.json says about where a run happened.
struct Environment {
    std::string command, script, device;
    int64_t ranks = 1;
};

/// Makes <output_dir>/<name>/<unix time>/ exclusively (+1 s on a collision) with config.json, script.lua, env.json and metrics/, on rank 0
/// of `world`; every rank gets the path. Throws moe::Error (io) on all ranks where it cannot be written.
std::string make_run_folder(const Config& config, const std::string& name, const Environment& environment, const dist::Group& world);

}  // namespace moe::train
