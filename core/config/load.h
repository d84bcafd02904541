// Reading, overriding, checking and explaining a configuration. Everything here walks the one list of fields in schema_*.cpp.
#pragma once
#include "core/base/problem.h"
#include "core/config/config.h"

#include <nlohmann/json_fwd.hpp>

#include <string>
#include <vector>

namespace moe {

/// Reads a JSON file (comments allowed), its `inherits` chain included: the keys of a file are merged over those of the file or
/// ready name that it inherits, objects deeply, lists and values whole. Aliases become canonical keys. Types and keys are checked
/// here, values by validate(). Throws moe::Error: io for an unreadable file, config for malformed JSON (file and line), unknown
/// keys (with the nearest), wrong types, two spellings of a key with different values, and a cycle of files.
Config load_config(const std::string& path);

/// The same for a value; `inherits` is relative to `folder`. Floats that are integers are taken for integers. Throws as load_config.
Config config_from_json(const nlohmann::json& value, const std::string& folder = ".");

/// All keys with their values, in the order of the structs. config_from_json(to_json(c)) == c.
nlohmann::ordered_json to_json(const Config& config);

/// A copy with the keys that `changes` has, nested as in a file: {"model": {"moe": {"num_experts": 16}}}. Throws moe::Error (config).
Config with_overrides(const Config& config, const nlohmann::json& changes);
Config with_overrides(const Config& config, const nlohmann::ordered_json& changes);

/// A copy with "key=value" texts applied in order: "model.moe.num_experts=16", "training.train_steps=null",
/// "training.recompute=norm,attention", "data.sources=[{…}]". Throws moe::Error (config), for a text without "=" kind usage.
Config with_overrides(const Config& config, const std::vector<std::string>& assignments);

/// A tree of all keys and values. Those that differ from `base` (null: the defaults) start with "*" and show the base's value.
std::string describe(const Config& config, const Config* base = nullptr);

/// Everything about one key.
struct FieldInfo {
    std::string path;                     ///< "model.moe.num_experts"; a key of a list's sections is "data.sources[].weight"
    std::string type;                     ///< "integer", "number", "true or false", "text", "list of texts", "section", "list of sections"
    bool nullable = false, section = false;
    std::string default_value;            ///< as JSON; "" for a section
    std::string unit, range, help;
    std::string row;                      ///< identifier of its feature
    std::string not_built;                ///< which of its values are not built yet; "" when all are
    std::vector<std::string> aliases;
};

/// Every key and section, in the order of the structs.
std::vector<FieldInfo> fields();

/// A key's or section's explanation.
struct FieldHelp {
    FieldInfo field;
    std::vector<std::string> keys;        ///< names inside a section
    std::string text;                     ///< all of it, for a terminal
};

/// Explains a key by path (aliases allowed); "" is the whole configuration. Throws moe::Error (usage) with the nearest path.
FieldHelp help(const std::string& path);

/// A Markdown table of all keys: key, default, meaning.
std::string fields_markdown();

/// Everything that is wrong with the values: ranges, choices, and keys that contradict each other.
std::vector<Problem> problems(const Config& config);

/// Throws one moe::Error (config) that lists all problems.
void validate(const Config& config);

/// Throws one moe::Error (config) that lists all keys whose feature is not built yet. The defaults pass.
void require_built(const Config& config);

}  // namespace moe
