#pragma once
#include "core/config/config.h"
#include "core/dist/group.h"

#include <filesystem>
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

/// For rank 0 of a resumed run: the folder's config.json becomes this configuration (another one that was there is kept as
/// config.before_attempt_N.json), env.attempt_N.json is written. Throws moe::Error (io).
void reopen_run_folder(const Config& config, const std::filesystem::path& folder, const Environment& environment, int64_t attempt);

/// Appends a line to events.jsonl. Throws moe::Error (io).
void append_event(const std::string& folder, const std::string& line);

}  // namespace moe::train
