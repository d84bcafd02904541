#include "core/config/names.h"

#include "core/base/json.h"
#include "core/base/suggest.h"
#include "core/config/embedded.h"
#include "core/config/load.h"

#include <nlohmann/json.hpp>

#include <filesystem>
#include <map>

namespace moe {
namespace {
const std::map<std::string, std::string>& all() {
    static const std::map<std::string, std::string> map = [] {
        std::map<std::string, std::string> out;
        for (const EmbeddedFile& file : embedded_files()) out[file.name] = file.text;
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
    if (path || std::filesystem::exists(name_or_path)) return load_config(name_or_path);
    return named_config(name_or_path);     // throws with the nearest name
}
}  // namespace moe
