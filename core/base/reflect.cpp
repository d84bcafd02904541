#include "core/base/reflect.h"

#include "core/base/json.h"
#include "core/base/suggest.h"

#include <algorithm>
#include <cmath>

namespace moe::reflect {
namespace {
std::string shown(const Json& value) {
    const char* what = value.is_string() ? "text" : value.is_boolean() ? "true or false" : value.is_number() ? "number" : value.is_array() ? "list" : value.is_object() ? "section" : "null";
    return value.is_null() ? "null" : fmt::format("{} ({})", brief(value), what);
}

std::string number(double value) { return value == std::floor(value) && std::abs(value) < 1e15 ? fmt::format("{:.0f}", value) : fmt::format("{:g}", value); }

/// Paths of all sections below `path` that have the key, e.g. {"model.moe.num_experts"}.
void places_of(std::string_view key, const Schema& at, const std::string& path, std::vector<std::string>& places) {
    if (const Field* f = at.find(key)) places.push_back(join(path, f->name));
    for (const Field& f : at.fields())
        if (f.child && !f.is_list) places_of(key, f.child(), join(path, f.name), places);
}

Problem unknown_key(const std::string& key, const std::string& path, const Schema& at, const Schema& root) {
    std::vector<std::string> names, places;
    for (const Field& f : at.fields()) {
        names.push_back(f.name);
        names.insert(names.end(), f.aliases.begin(), f.aliases.end());
    }
    std::string near = nearest(key, names);
    places_of(key, root, "", places);
    std::string hint;
    if (!places.empty()) hint = fmt::format("it belongs to {}", fmt::join(places, " or "));
    else if (!near.empty()) hint = fmt::format("did you mean {}?", join(path, near));
    else hint = "moelab config --keys lists them";
    return {join(path, key), "an unknown key", path.empty() ? "a section or key of the configuration" : "a key of " + path, hint};
}
}  // namespace

std::string join(const std::string& path, std::string_view key) { return path.empty() ? std::string(key) : path + "." + std::string(key); }

void merge(Json& base, const Json& over) {
    if (!base.is_object() || !over.is_object()) {
        base = over;
        return;
    }
    for (auto it = over.begin(); it != over.end(); ++it) merge(base[it.key()], it.value());
}

std::string Field::range() const {
    if (!choices.empty()) {
        std::string text = choices.front();
        for (size_t i = 1; i < choices.size(); ++i) text += (i + 1 == choices.size() ? " or " : ", ") + choices[i];
        return text;
    }
    bool low = std::isfinite(lowest), high = std::isfinite(highest);
    if (low && high) return fmt::format("in {}{}, {}{}", open_low ? "(" : "[", number(lowest), number(highest), open_high ? ")" : "]");
    if (low) return open_low ? fmt::format("more than {}", number(lowest)) : fmt::format("{} or more", number(lowest));
    if (high) return open_high ? fmt::format("less than {}", number(highest)) : fmt::format("{} or less", number(highest));
    return "";
}

std::string Field::want() const {
    std::string kind = type, text = range();
    if (choices.empty()) {
        if (kind != "true or false") kind = (kind == "integer" ? "an " : "a ") + kind;
        text = text.empty() ? kind : fmt::format("{} {}", kind, text);
    }
    if (!true_word.empty()) text += ", true or false";
    return nullable ? text + ", or null" : text;
}

const Field* Schema::find(std::string_view key) const {
    for (const Field& f : fields_)
        if (f.name == key || std::find(f.aliases.begin(), f.aliases.end(), key) != f.aliases.end()) return &f;
    return nullptr;
}

Json Schema::canonical(const Json& value, const std::string& path, const Schema& root, std::vector<Problem>& problems) const {
    Json out = Json::object();
    std::vector<std::pair<std::string, std::string>> spelled;   // canonical name, as it was written
    if (!value.is_object()) {
        problems.push_back({path.empty() ? "configuration" : path, shown(value), "a section { … }", ""});
        return out;
    }
    for (auto it = value.begin(); it != value.end(); ++it) {
        const Field* f = find(it.key());
        if (!f) {
            problems.push_back(unknown_key(it.key(), path, *this, root));
            continue;
        }
        std::string at = join(path, f->name);
        Json item = it.value();
        if (f->child && item.is_object() && !f->is_list) item = f->child().canonical(item, at, root, problems);
        if (f->child && item.is_array() && f->is_list)
            for (size_t i = 0; i < item.size(); ++i) item[i] = f->child().canonical(item[i], fmt::format("{}[{}]", at, i), root, problems);
        if (out.contains(f->name) && out[f->name] != item) {
            auto first = std::find_if(spelled.begin(), spelled.end(), [&](auto& s) { return s.first == f->name; });
            problems.push_back({at, fmt::format("{} = {} and {} = {}", first->second, brief(out[f->name]), it.key(), brief(item)), "one value", "they are two names of one key: keep one"});
            continue;
        }
        spelled.emplace_back(f->name, it.key());
        out[f->name] = std::move(item);
    }
    return out;
}

void Schema::read(void* object, const Json& value, const std::string& path, std::vector<Problem>& problems) const {
    for (const Field& f : fields_) {
        auto it = value.find(f.name);
        if (it != value.end()) f.read(f, object, *it, join(path, f.name), problems);
    }
}

OrderedJson Schema::write(const void* object) const {
    OrderedJson out = OrderedJson::object();
    for (const Field& f : fields_) out[f.name] = f.write(object);
    return out;
}

void Schema::check(const OrderedJson& value, const std::string& path, std::vector<Problem>& problems) const {
    for (const Field& f : fields_) {
        const OrderedJson& item = value.at(f.name);
        std::string at = join(path, f.name);
        if (item.is_null() && f.nullable) continue;
        if (f.child && f.is_list) {
            for (size_t i = 0; i < item.size(); ++i) f.child().check(item[i], fmt::format("{}[{}]", at, i), problems);
        } else if (f.child) {
            f.child().check(item, at, problems);
        } else if (item.is_string() && !f.choices.empty()) {
            auto word = item.get<std::string>();
            if (std::find(f.choices.begin(), f.choices.end(), word) == f.choices.end())
                problems.push_back({at, "\"" + word + "\"", f.range(), did_you_mean(word, f.choices)});
        } else if (item.is_number() || item.is_null()) {     // a NaN is written as null
            double v = item.is_number() ? item.get<double>() : std::nan("");
            bool in = (f.open_low ? v > f.lowest : v >= f.lowest) && (f.open_high ? v < f.highest : v <= f.highest) && std::isfinite(v);
            if (!in) problems.push_back({at, fmt::format("{}", v), f.want(), f.help_text.substr(0, f.help_text.find('.'))});
        }
    }
}

namespace detail {
void wrong(const Field& field, const Json& value, const std::string& path, std::vector<Problem>& problems) {
    problems.push_back({path, shown(value), field.want(), ""});
}

void read_value(const Field& field, bool& to, const Json& value, const std::string& path, std::vector<Problem>& problems) {
    if (!value.is_boolean()) return wrong(field, value, path, problems);
    to = value.get<bool>();
}

void read_value(const Field& field, int64_t& to, const Json& value, const std::string& path, std::vector<Problem>& problems) {
    if (value.is_number_unsigned() && value.get<uint64_t>() > uint64_t(std::numeric_limits<int64_t>::max())) return wrong(field, value, path, problems);
    if (value.is_number_integer()) {
        to = value.get<int64_t>();
        return;
    }
    // Lua and people write 5e8 for an integer: taken where the float is exactly one.
    double number = value.is_number_float() ? value.get<double>() : std::nan("");
    if (!(std::abs(number) <= 0x1p53 && number == std::floor(number))) return wrong(field, value, path, problems);
    to = int64_t(number);
}

void read_value(const Field& field, double& to, const Json& value, const std::string& path, std::vector<Problem>& problems) {
    if (!value.is_number()) return wrong(field, value, path, problems);
    to = value.get<double>();
}

void read_value(const Field& field, std::string& to, const Json& value, const std::string& path, std::vector<Problem>& problems) {
    if (value.is_boolean() && !field.true_word.empty()) {
        to = value.get<bool>() ? field.true_word : field.false_word;
        return;
    }
    if (!value.is_string()) return wrong(field, value, path, problems);
    to = value.get<std::string>();
}

void read_value(const Field& field, std::vector<std::string>& to, const Json& value, const std::string& path, std::vector<Problem>& problems) {
    if (value.is_object() && value.empty()) return to.clear();     // Lua's {}
    bool texts = value.is_array() && std::all_of(value.begin(), value.end(), [](const Json& v) { return v.is_string(); });
    if (!texts) return wrong(field, value, path, problems);
    to = value.get<std::vector<std::string>>();
}
}  // namespace detail
}  // namespace moe::reflect
