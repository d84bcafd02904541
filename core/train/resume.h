// Where checkpoints are found, and what a resumed run may change.
#pragma once
#include "core/config/config.h"
#include "core/store/checkpoint.h"

#include <nlohmann/json_fwd.hpp>

#include <string>
#include <vector>

namespace moe::train {

/// Where a run keeps its checkpoints: <run folder>/checkpoints, with checkpointing.dir <dir>/<name>/<start time> (the run folder's
/// last two parts), so that runs never share one.
std::string checkpoint_folder(const Config& config, const std::string& run_folder);

/// The folder that run:save(name) writes: `name` in `checkpoints`, a path where it has a "/", "" (the periodic one of the step) for
/// "". Throws moe::Error (usage) for "last", step_N of another step and hidden names, (state) for a plain name without checkpoints.
std::string save_path(const std::string& name, const std::string& checkpoints, int64_t step);

/// The checkpoint that `what` means. With a "/" it is a path: of a checkpoint, or of a run folder or folder of checkpoints, then the
/// newest complete one in it. Else a name of one in the newest run of <output_dir>/<name>/ that has it; "last" is the newest
/// complete one of the newest run that has any. `name` "" looks through all runs of output_dir. Throws moe::Error (io) where
/// there is none, with the nearest name and all that are there; `elsewhere` are names that the caller knows of besides.
std::string find_checkpoint(const std::string& what, const std::string& output_dir, const std::string& name, const std::vector<std::string>& elsewhere = {});

/// The resolved configuration that a checkpoint's run had. Throws moe::Error (data, config).
Config saved_config(const store::Checkpoint& checkpoint);

/// The run folder that a run goes on in from a checkpoint: the one that it lies in, else the one that it was saved by and that is
/// still there. "" where there is neither, and where output_dir or experiment_name of `now` are not the saved ones.
std::string folder_to_continue(const store::Checkpoint& checkpoint, const Config& now);

/// Keys and sections that may differ from the saved run's; everything else decides what the saved state means.
const std::vector<std::string>& changeable_keys();
/// What differs: [{"key", "old", "new"}, …].
nlohmann::ordered_json changes(const Config& saved, const Config& now);
/// Throws one moe::Error (config) that lists every key that differs and may not, with both values.
void check_changes(const Config& saved, const Config& now);

}  // namespace moe::train
