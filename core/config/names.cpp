#include "core/config/names.h"

#include "core/base/embedded.h"
#include "core/base/json.h"
#include "core/base/suggest.h"
#include "core/config/load.h"

#include <nlohmann/json.hpp>

#include <filesystem>
#include <map>

namespace moe {
/// The files of configs/, in a source file that the build writes.
const std::vector<EmbeddedFile>& embedded_configs();

namespace {
/// "models/moonlight_16b.json" → "moonlight_16b", "train_config_tiny.json" → "tiny".
std::string ready_name(std::string_view path) {
    constexpr std::string_view kPrefix = "train_config_";
    std::string name = std::filesystem::path(path).stem().string();
    return name.starts_with(kPrefix) ? name.substr(kPrefix.size()) : name;
}

const std::map<std::string, std::string>& all() {
    static const std::map<std::string, std::string> map = [] {
        std::map<std::string, std::string> out;
        for (const EmbeddedFile& file : embedded_configs()) out[ready_name(file.path)] = file.text;
        return out;
    }();
    return map;
}
}  // namespace

std::vector<std::string> config_names() {
    std::vector<std::string> names;
    for (const auto& [name, text] : all()) names.push_back(name);
    return names;
}

const std::string* embedded_config(const std::string& name) {
    auto it = all().find(name);
    return it == all().end() ? nullptr : &it->second;
}

Config named_config(const std::string& name) {
    const std::string* text = embedded_config(name);
    MOE_CHECK(text, config, "configuration", "\"" + name + "\"", fmt::format("one of {}", fmt::join(config_names(), ", ")), did_you_mean(name, config_names()));
    return config_from_json(parse_json(*text, name, ErrorKind::config));
}

Config resolve_config(const std::string& name_or_path) {
    if (embedded_config(name_or_path)) return named_config(name_or_path);
    bool path = name_or_path.find('/') != std::string::npos || name_or_path.ends_with(".json");
    std::error_code error;                 // a folder that may not be read: then reading says why
    bool exists = std::filesystem::exists(name_or_path, error);
    MOE_CHECK(!path || exists || error, io, "configuration", fmt::format("\"{}\": no such file", name_or_path), "the path of a JSON file, or a ready name", did_you_mean(ready_name(name_or_path), config_names()));
    if (exists || (path && error)) return load_config(name_or_path);
    return named_config(name_or_path);     // throws with the nearest name
}
}  // namespace moe
