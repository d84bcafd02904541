#include "core/config/load.h"

#include "core/base/json.h"
#include "core/base/suggest.h"
#include "core/config/names.h"
#include "core/config/schema.h"

#include <algorithm>
#include <filesystem>

namespace moe {
namespace {
namespace fs = std::filesystem;
using reflect::Field;
using reflect::Json;
using reflect::Schema;
using Problems = std::vector<Problem>;

const Schema& root() { return reflect::schema<Config>(); }

/// logging.log_interval is another name of training.log_interval: the only key that two sections have.
void move_log_interval(Json& value, Problems& problems) {
    if (!value.is_object() || !value.contains("logging") || !value["logging"].is_object() || !value["logging"].contains("log_interval")) return;
    Json interval = value["logging"]["log_interval"];
    value["logging"].erase("log_interval");
    if (value.contains("training") && !value["training"].is_object()) return;     // reported where the section is read
    Json& training = value["training"];
    if (training.contains("log_interval") && training["log_interval"] != interval)
        problems.push_back({"training.log_interval", fmt::format("{}, and logging.log_interval = {}", brief(training["log_interval"]), brief(interval)), "one value", "they are two names of one key: keep one"});
    training["log_interval"] = interval;
}

Json canonical(Json value, Problems& problems) {
    move_log_interval(value, problems);
    return root().canonical(value, "", root(), problems);
}

/// Canonical keys and right types, or one error; `where` is the file, `text` its content.
Json checked(const Json& value, const std::string& where, const std::string& text) {
    Problems problems;
    Json keys = canonical(value, problems);
    Config scratch;
    root().read(&scratch, keys, "", problems);
    for (Problem& p : problems) {
        if (where.empty()) break;
        std::string leaf = fmt::format("\"{}\"", p.path.substr(p.path.rfind('.') + 1));
        size_t first = text.find(leaf);
        bool once = first != std::string::npos && text.find(leaf, first + 1) == std::string::npos;
        std::string place = once ? fmt::format("{}:{}", where, 1 + std::count(text.begin(), text.begin() + long(first), '\n')) : where;
        p.hint += (p.hint.empty() ? "in " : "; in ") + place;
    }
    throw_problems(ErrorKind::config, where.empty() ? "configuration" : where, problems, where);
    return keys;
}

Json resolved_file(const std::string& path, std::vector<std::string> chain);

/// `keys` over what it inherits. `chain` holds the files that led here.
Json resolved(Json keys, const fs::path& folder, const std::vector<std::string>& chain) {
    auto it = keys.find("inherits");
    if (it == keys.end()) return keys;
    Json name = *it;
    keys.erase(it);
    if (name.is_null()) return keys;
    auto base_name = name.get<std::string>();
    fs::path file = folder / base_name;
    std::error_code none;
    Json base;
    if (fs::is_regular_file(file, none)) {
        base = resolved_file(file.string(), chain);
    } else if (const std::string* text = embedded_config(base_name)) {
        std::vector<std::string> longer = chain;
        longer.push_back(base_name);
        MOE_CHECK(std::find(chain.begin(), chain.end(), base_name) == chain.end(), config, "inherits", fmt::format("{}", fmt::join(longer, " → ")), "names that do not inherit from themselves", "");
        base = resolved(checked(parse_json(*text, base_name, ErrorKind::config), base_name, *text), ".", longer);
    } else {
        MOE_THROW(config, "inherits", "\"" + base_name + "\"", fmt::format("a file below {} or a ready name", folder.string()), did_you_mean(base_name, config_names()));
    }
    reflect::merge(base, keys);
    return base;
}

Json resolved_file(const std::string& path, std::vector<std::string> chain) {
    std::error_code none;
    std::string full = fs::weakly_canonical(path, none).string();
    bool seen = std::find(chain.begin(), chain.end(), full) != chain.end();
    chain.push_back(full);
    MOE_CHECK(!seen, config, "inherits", fmt::format("{}", fmt::join(chain, " → ")), "files that do not inherit from themselves", "remove one inherits key");
    std::string text = read_text(path);
    return resolved(checked(parse_json(text, path, ErrorKind::config), path, text), fs::path(path).parent_path(), chain);
}

Config from_resolved(const Json& keys) {
    Config config;
    Problems problems;
    root().read(&config, keys, "", problems);
    throw_problems(ErrorKind::config, "configuration", problems);
    return config;
}

/// A field by path, and the path in canonical keys. Null where there is none.
const Field* find_path(const std::string& path, std::string& canonical_path) {
    const Schema* at = &root();
    const Field* field = nullptr;
    std::string rest = path == "logging.log_interval" ? "training.log_interval" : path;
    canonical_path.clear();
    while (!rest.empty()) {
        size_t dot = rest.find('.');
        field = at ? at->find(rest.substr(0, dot)) : nullptr;
        if (!field) return nullptr;
        canonical_path = reflect::join(canonical_path, field->name);
        at = field->child && !field->is_list ? &field->child() : nullptr;
        rest = dot == std::string::npos ? "" : rest.substr(dot + 1);
    }
    return field;
}

Json nested(const std::string& path, Json value) {
    size_t dot = path.rfind('.');
    Json out = Json::object();
    out[path.substr(dot == std::string::npos ? 0 : dot + 1)] = std::move(value);
    return dot == std::string::npos ? out : nested(path.substr(0, dot), std::move(out));
}

/// The value that a person typed: JSON where the field wants JSON, the bare text where it wants a text.
Json typed(const Field& field, const std::string& text, const std::string& path) {
    bool plain = std::string_view(field.type) == "text";
    if (text == "null" && field.nullable) return nullptr;
    if (plain && !field.true_word.empty() && (text == "true" || text == "false")) return text == "true";
    if (plain && (text.empty() || text.front() != '"')) return text;
    if (std::string_view(field.type) == "list of texts" && (text.empty() || text.front() != '[')) {
        Json list = Json::array();
        for (size_t start = 0; start < text.size();) {
            size_t comma = std::min(text.find(',', start), text.size());
            list.push_back(text.substr(start, comma - start));
            start = comma + 1;
        }
        return list;
    }
    Json value = Json::parse(text, nullptr, false, true);
    MOE_CHECK(!value.is_discarded(), config, path, "\"" + text + "\"", field.want(), field.child ? "sections and lists are written as JSON" : "");
    return value;
}
}  // namespace

Config load_config(const std::string& path) { return from_resolved(resolved_file(path, {})); }

Config config_from_json(const Json& value, const std::string& folder) { return from_resolved(resolved(checked(value, "", ""), folder, {})); }

nlohmann::ordered_json to_json(const Config& config) { return root().write(&config); }

Config with_overrides(const Config& config, const Json& changes) {
    Json keys = checked(changes, "", "");
    MOE_CHECK(!keys.contains("inherits") || keys["inherits"].is_null(), config, "inherits", brief(keys["inherits"]), "a key of a file", "load that file or name instead, then override");
    Config out = config;
    Problems problems;
    root().read(&out, keys, "", problems);
    throw_problems(ErrorKind::config, "configuration", problems);
    return out;
}

Config with_overrides(const Config& config, const nlohmann::ordered_json& changes) { return with_overrides(config, Json(changes)); }

Config with_overrides(const Config& config, const std::vector<std::string>& assignments) {
    Config out = config;
    for (const std::string& text : assignments) {
        size_t equals = text.find('=');
        MOE_CHECK(equals != std::string::npos && equals > 0, usage, text, "no key=value", "key=value", "for example training.train_steps=100");
        std::string given = text.substr(0, equals), path;
        const Field* field = find_path(given, path);
        // An unknown path goes through the same reader as a file's keys, which names the nearest.
        Json value = field ? typed(*field, text.substr(equals + 1), path) : Json(nullptr);
        out = with_overrides(out, nested(field ? path : given, std::move(value)));
    }
    return out;
}
}  // namespace moe
