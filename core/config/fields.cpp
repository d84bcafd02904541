// Listings of the configuration's keys: fields(), help(), describe() and the README's table.
#include "core/base/json.h"
#include "core/base/suggest.h"
#include "core/config/load.h"
#include "core/config/not_built.h"
#include "core/config/schema.h"

#include <algorithm>

namespace moe {
namespace {
using reflect::Field;
using reflect::OrderedJson;
using reflect::Schema;

std::string not_built_text(const std::string& path) {
    std::string text;
    for (const NotBuilt& n : not_built()) {
        if (n.path != path && !path.starts_with(n.path + ".")) continue;
        std::string values = n.values.empty() ? "other values than the default" : fmt::format("{}", fmt::join(n.values, ", "));
        text += (text.empty() ? "" : "; ") + values;
    }
    return text;
}

FieldInfo info_of(const Field& f, const std::string& path, const OrderedJson& default_value) {
    FieldInfo info;
    info.path = path;
    info.type = f.type;
    info.nullable = f.nullable;
    info.section = f.child && !f.is_list;
    info.default_value = info.section && !f.nullable ? "" : default_value.dump();
    info.unit = f.unit_text;
    info.range = f.range();
    info.help = f.help_text;
    info.row = f.row_id;
    info.not_built = not_built_text(path);
    info.aliases = f.aliases;
    if (path == "training.log_interval") info.aliases.push_back("logging.log_interval");
    return info;
}

void list(const Schema& schema, const OrderedJson& defaults, const std::string& path, std::vector<FieldInfo>& out) {
    for (const Field& f : schema.fields()) {
        std::string at = reflect::join(path, f.name);
        out.push_back(info_of(f, at, defaults.at(f.name)));
        if (!f.child) continue;
        const OrderedJson& value = defaults.at(f.name);
        list(f.child(), value.is_object() ? value : f.child_defaults(), f.is_list ? at + "[]" : at, out);
    }
}

std::string text_of(const FieldInfo& field, const std::vector<std::string>& keys) {
    std::string text = (field.path.empty() ? std::string("configuration") : field.path) + "\n  " + field.help + "\n";
    auto line = [&](const char* name, const std::string& value) {
        if (!value.empty()) text += fmt::format("  {:<10} {}\n", name, value);
    };
    line("type", field.type + (field.nullable ? " or null" : ""));
    line("unit", field.unit);
    line("default", field.default_value);
    line("range", field.range);
    line("also", fmt::format("{}", fmt::join(field.aliases, ", ")));
    line("not built", field.not_built);
    line("keys", fmt::format("{}", fmt::join(keys, ", ")));
    return text;
}

struct Tree {
    const OrderedJson& base;
    std::string text;

    void line(bool changed, int depth, const std::string& rest) { text += fmt::format("{} {:{}}{}\n", changed ? '*' : ' ', "", 2 * depth, rest); }

    void section(const Schema& schema, const OrderedJson& value, const OrderedJson* other, int depth) {
        size_t width = 0;
        for (const Field& f : schema.fields())
            if (!f.child || f.is_list) width = std::max(width, f.name.size());
        for (const Field& f : schema.fields()) {
            const OrderedJson& item = value.at(f.name);
            const OrderedJson* was = other && other->is_object() ? &other->at(f.name) : nullptr;
            bool changed = !was || *was != item;
            if (f.child && item.is_object()) {
                line(false, depth, f.name);
                section(f.child(), item, was, depth + 1);
            } else {
                std::string note = changed ? fmt::format("   (was {})", was ? brief(*was, 40) : "null") : "";
                line(changed, depth, fmt::format("{:<{}}  {}{}", f.name, width, brief(item, 100), note));
            }
        }
    }
};
}  // namespace

std::vector<FieldInfo> fields() {
    std::vector<FieldInfo> out;
    list(reflect::schema<Config>(), to_json(Config()), "", out);
    return out;
}

FieldHelp help(const std::string& path) {
    FieldHelp out;
    std::vector<FieldInfo> all = fields();
    auto spelled = [&](const FieldInfo& f) {
        if (f.path == path) return true;
        std::string folder = f.path.substr(0, f.path.rfind('.') + 1);
        return std::any_of(f.aliases.begin(), f.aliases.end(), [&](const std::string& a) { return folder + a == path || (a.find('.') != std::string::npos && a == path); });
    };
    if (path.empty()) {
        out.field.section = true;
        out.field.type = "section";
        out.field.help = "Everything about a run.";
    } else {
        auto it = std::find_if(all.begin(), all.end(), spelled);
        if (it == all.end()) {
            std::vector<std::string> paths, same;
            for (const FieldInfo& f : all) {
                paths.push_back(f.path);
                if (f.path.ends_with("." + path)) same.push_back(f.path);
            }
            std::string hint = same.empty() ? did_you_mean(path, paths) : fmt::format("its whole path is {}", fmt::join(same, " or "));
            MOE_THROW(usage, "configuration", "\"" + path + "\"", "a key that it has", hint);
        }
        out.field = *it;
    }
    std::string folder = out.field.path.empty() ? "" : out.field.path + (out.field.section ? "." : "[].");
    for (const FieldInfo& f : all)
        if (f.path.starts_with(folder) && f.path.find('.', folder.size()) == std::string::npos) out.keys.push_back(f.path.substr(folder.size()));
    out.text = text_of(out.field, out.keys);
    return out;
}

std::string describe(const Config& config, const Config* base) {
    OrderedJson value = to_json(config), other = to_json(base ? *base : Config());
    Tree tree{other, {}};
    tree.section(reflect::schema<Config>(), value, &other, 0);
    return tree.text;
}

std::string fields_markdown() {
    std::string text = "| key | default | meaning |\n| --- | --- | --- |\n";
    auto cell = [](const std::string& s) {
        std::string out;
        for (char c : s) {
            if (c == '|') out += '\\';
            out += c;
        }
        return out;
    };
    for (const FieldInfo& f : fields()) {
        std::string aliases = f.aliases.empty() ? "" : fmt::format(" [{}]", fmt::join(f.aliases, ", "));
        std::string notes = f.unit.empty() ? "" : fmt::format(" Unit: {}.", f.unit);
        if (!f.range.empty()) notes += fmt::format(" Range: {}.", f.range);
        text += fmt::format("| {}{} | {} | {}{} |\n", f.path, aliases, f.default_value.empty() ? "" : fmt::format("`{}`", cell(f.default_value)), cell(f.help), cell(notes));
    }
    return text;
}
}  // namespace moe
