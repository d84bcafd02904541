// The ready configurations. Their JSON files (configs/) are inside the binary: no file is needed when it runs.
#pragma once
#include "core/config/config.h"

#include <string>
#include <vector>

namespace moe {

/// All names, sorted: those of configs/models/<name>.json and configs/train_config_<name>.json.
std::vector<std::string> config_names();

/// JSON text of a ready configuration, null for an unknown name.
const std::string* embedded_config(const std::string& name);

/// The ready configuration of that name. Throws moe::Error (config) with the nearest name.
Config named_config(const std::string& name);

/// A ready name or the path of a JSON file; a name goes before a file of the same name without ".json" or "/". Throws moe::Error as
/// named_config and load_config.
Config resolve_config(const std::string& name_or_path);

}  // namespace moe
