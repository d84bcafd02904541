#include "lua/bind/config.h"

#include "core/config/load.h"
#include "core/config/names.h"
#include "core/data/tokenizer.h"
#include "core/plan/count.h"
#include "core/plan/memory.h"
#include "core/train/schedule.h"
#include "lua/bind/bind.h"
#include "lua/bind/control.h"
#include "lua/bind/json.h"

#include "core/base/json.h"
#include "core/base/suggest.h"

#include <utility>

namespace moe::lua {
/// A section of a configuration: cfg.model.moe.
struct ConfigSection {
    ConfigValue of;
    std::string path;
};
template <>
struct TypeName<ConfigSection> {
    static constexpr const char* value = "config section";
};

namespace {
using Json = nlohmann::ordered_json;

/// Dotted keys as nested objects: {"model.moe.num_experts": 8} is {"model": {"moe": {"num_experts": 8}}}.
Json nested(const Json& changes) {
    if (!changes.is_object()) return changes;
    Json result = Json::object();
    for (auto& [key, value] : changes.items()) {
        size_t dot = key.find('.');
        Json inner = dot == std::string::npos ? nested(value) : nested(Json{{key.substr(dot + 1), value}});
        Json& slot = result[key.substr(0, dot)];
        if (slot.is_object() && inner.is_object()) {
            slot.merge_patch(inner);
        } else {
            slot = std::move(inner);
        }
    }
    return result;
}

/// An empty Lua table is a list where the key wants one.
void mend_empty_lists(Json& value, const std::string& path, const std::vector<FieldInfo>& all) {
    if (!value.is_object()) return;
    for (auto& [key, inner] : value.items()) {
        std::string name = path.empty() ? key : path + "." + key;
        if (inner.is_object() && inner.empty()) {
            for (auto& f : all) {
                if (f.path == name && f.type.starts_with("list")) inner = Json::array();
            }
        } else {
            mend_empty_lists(inner, name, all);
        }
    }
}

Json changes_from_table(lua_State* L, int index) {
    Json changes = nested(to_json(L, index));
    mend_empty_lists(changes, "", fields());
    return changes;
}

/// Pushes the value of a key, a section as an object of its own.
int push_key(lua_State* L, const ConfigValue& c, const std::string& path) {
    FieldHelp key = help(path);    // throws with the nearest name, and turns aliases into keys
    Json value = to_json(*c.config);
    for (size_t from = 0; from < key.field.path.size();) {
        size_t dot = std::min(key.field.path.find('.', from), key.field.path.size());
        value = Json(value.at(key.field.path.substr(from, dot - from)));
        from = dot + 1;
        if (value.is_null()) break;
    }
    if (value.is_object()) {
        push<ConfigSection>(L, {c, key.field.path});
    } else if (value.is_null()) {
        lua_pushnil(L);
    } else {
        push_json(L, value);
    }
    return 1;
}

std::vector<std::string> method_names();

/// __index of both types. A key that is null gives nil, so unknown ones must throw here.
template <class T>
int index_key(lua_State* L) {
    auto& object = self<T>(L);
    if (lua_type(L, 2) != LUA_TSTRING) return 0;
    std::string key = lua_tostring(L, 2);
    if constexpr (std::is_same_v<T, ConfigSection>) {
        return push_key(L, object.of, object.path + "." + key);
    } else {
        try {
            return push_key(L, object, key);
        } catch (const Error& e) {                      // it may have been meant as a method
            for (const char* verb : {"set", "update", "change", "override", "merge", "replace"})
                if (key == verb) MOE_THROW(usage, "configuration", '"' + key + '"', "a key or a method", "configurations are frozen: cfg:with { … } makes a changed copy");
            std::string method = did_you_mean(key, method_names());
            MOE_THROW(usage, "configuration", '"' + key + '"', "a key or a method", method.empty() ? e.parts().hint : method);
        }
    }
}

int refuse_assignment(lua_State* L) {
    std::string key = to_string(L, 2);
    MOE_THROW(state, key, "an assignment to a frozen configuration", "cfg:with { … }, which makes a changed copy", "");
}

int config(lua_State* L) {
    push<ConfigValue>(L, check_config(L, 1, "config"));
    return 1;
}

int names(lua_State* L) {
    auto list = config_names();
    lua_createtable(L, int(list.size()), 0);
    for (size_t i = 0; i < list.size(); ++i) {
        push_string(L, list[i]);
        lua_rawseti(L, -2, lua_Integer(i + 1));
    }
    return 1;
}

int keys(lua_State* L) {
    push_string(L, fields_markdown());
    return 1;
}

int with(lua_State* L) {
    auto& c = self<ConfigValue>(L);
    check_table(L, 2, "changes");
    auto changed = std::make_shared<const Config>(with_overrides(*c.config, changes_from_table(L, 2)));
    push<ConfigValue>(L, {changed, c.base ? c.base : c.config});
    return 1;
}

int assign(lua_State* L) {
    auto& c = self<ConfigValue>(L);
    check_table(L, 2, "assignments");
    std::vector<std::string> texts;
    for (lua_Integer i = 1, n = lua_Integer(lua_rawlen(L, 2)); i <= n; ++i) {
        lua_rawgeti(L, 2, i);
        texts.push_back(check_string(L, -1, "assignment"));
        lua_pop(L, 1);
    }
    auto changed = std::make_shared<const Config>(with_overrides(*c.config, texts));
    push<ConfigValue>(L, {changed, c.base ? c.base : c.config});
    return 1;
}

/// The first comment of a ready configuration's file: what it is, in a line.
int about(lua_State* L) {
    std::string name = check_string(L, 1, "name");
    const std::string* text = embedded_config(name);
    if (!text) named_config(name);      // throws with the nearest
    size_t end = std::min(text->find('\n'), text->size());
    push_string(L, text->starts_with("// ") ? text->substr(3, end - 3) : "");
    return 1;
}

/// With the tokenizer's vocabulary where it is null.
Config with_vocabulary(Config c) {
    if (!c.model.vocab_size) c.model.vocab_size = data::open_tokenizer(c.data.tokenizer)->vocab_size();
    return c;
}

/// self with its vocabulary, validated.
Config checked(lua_State* L) {
    Config c = with_vocabulary(*self<ConfigValue>(L).config);
    validate(c);
    return c;
}

/// self as it would run on {ranks =}: validated, with the data-parallel ranks of each pipeline stage and the steps of the run.
struct Length {
    Config config;
    int64_t data_parallel;
    std::optional<int64_t> steps;
};
Length length(lua_State* L) {
    Config c = checked(L);
    Options o(L, 2, {"ranks"});
    const DistributedConfig& d = c.distributed;
    int64_t replicas = std::max<int64_t>(1, o.integer("ranks", 1) / (d.tensor_parallel_size * d.pipeline_parallel_size));
    return {c, replicas, train::num_steps(c, plan::count(c.model).total, replicas)};
}
int push_count(lua_State* L, std::optional<int64_t> count) {
    if (count) lua_pushinteger(L, *count);
    else lua_pushnil(L);
    return 1;
}

int num_steps(lua_State* L) { return push_count(L, length(L).steps); }

int num_tokens(lua_State* L) {
    Length l = length(L);
    return push_count(L, l.steps ? std::optional(train::num_tokens(l.config, *l.steps, l.data_parallel)) : std::nullopt);
}

int memory(lua_State* L) {
    Config c = checked(L);
    Options o(L, 2, {"ranks"});
    plan::Memory m = plan::memory(c, o.integer("ranks", 1));
    push_ordered_table(L, {"weights", "gradients", "optimizer", "activations", "total"});
    auto set = [&](const char* name, double bytes) {
        lua_pushinteger(L, lua_Integer(bytes));
        lua_setfield(L, -2, name);
    };
    set("weights", m.weights);
    set("gradients", m.gradients);
    set("optimizer", m.optimizer);
    set("activations", m.activations);
    set("total", m.total());
    return 1;
}

int params(lua_State* L) {
    Config c = checked(L);
    int64_t depth = c.training.mtp_depth();
    auto counts = plan::count(c.model, depth);
    push_ordered_table(L, {"total", "active", "flops_per_token", "flops_per_token_full", "mtp", "router_bias"});
    auto set = [&](const char* name, int64_t value) {
        lua_pushinteger(L, value);
        lua_setfield(L, -2, name);
    };
    set("total", counts.total);
    set("active", counts.active_without_embedding);
    set("mtp", counts.mtp);
    set("router_bias", counts.router_bias);
    lua_pushnumber(L, plan::flops_per_token(c.model, c.training.seq_length, plan::FlopsRule::causal, depth));
    lua_setfield(L, -2, "flops_per_token");
    lua_pushnumber(L, plan::flops_per_token(c.model, c.training.seq_length, plan::FlopsRule::full, depth));
    lua_setfield(L, -2, "flops_per_token_full");
    return 1;
}

int to_table(lua_State* L) {
    push_json(L, to_json(*self<ConfigValue>(L).config));
    return 1;
}
int save(lua_State* L) {
    std::string path = check_string(L, 2, "path");
    write_text(path, to_json(*self<ConfigValue>(L).config).dump(2) + "\n");
    lua_settop(L, 1);
    return 1;
}
int check_values(lua_State* L) {
    auto& c = *self<ConfigValue>(L).config;
    Options o(L, 2, {"built"});
    validate(c);
    if (o.boolean("built", true)) require_built(c);
    lua_settop(L, 1);
    return 1;
}
std::vector<std::string> lines_of(const std::string& text) {
    std::vector<std::string> lines;
    for (size_t at = 0; at < text.size(); at += lines.back().size() + 1) lines.push_back(text.substr(at, text.find('\n', at) - at));
    return lines;
}

/// describe() without what is at its default and was not changed, and a line that counts it.
std::string folded(const Config& config, const Config* base) {
    std::vector<std::string> lines = lines_of(describe(config, base)), against_defaults = lines_of(describe(config));
    std::vector<std::string> sections;            // that stand above the line at hand and were not shown yet
    std::string out;
    size_t left_out = 0;
    for (size_t i = 0; i < lines.size(); ++i) {
        size_t depth = (lines[i].find_first_not_of("* ") - 2) / 2;
        bool is_section = lines[i].find(' ', 2 + 2 * depth) == std::string::npos;
        sections.resize(std::min(sections.size(), depth));
        if (is_section) {
            sections.push_back(lines[i] + "\n");
        } else if (lines[i][0] == '*' || against_defaults[i][0] == '*') {
            for (auto& s : sections) out += std::exchange(s, "");
            out += lines[i] + "\n";
        } else ++left_out;
    }
    return out + fmt::format("  … {} keys at their defaults; cfg:tree() shows all", left_out);
}

int text(lua_State* L) {
    auto* box = test_box<ConfigValue>(L, 1);
    push_string(L, box && *box ? folded(*(*box)->config, (*box)->base.get()) : "config (freed)");
    return 1;
}
int tree(lua_State* L) {
    auto& cfg = self<ConfigValue>(L);
    push_string(L, describe(*cfg.config, cfg.base.get()));
    return 1;
}
int same(lua_State* L) {
    auto *a = test_box<ConfigValue>(L, 1), *b = test_box<ConfigValue>(L, 2);
    lua_pushboolean(L, a && b && *a && *b && *(*a)->config == *(*b)->config);
    return 1;
}

Json section_json(const ConfigSection& s) {
    std::string pointer = "/" + s.path;
    std::replace(pointer.begin(), pointer.end(), '.', '/');
    return to_json(*s.of.config).at(Json::json_pointer(pointer));
}
int section_to_table(lua_State* L) {
    push_json(L, section_json(self<ConfigSection>(L)));
    return 1;
}
int section_text(lua_State* L) {
    auto* box = test_box<ConfigSection>(L, 1);
    push_string(L, box && *box ? (*box)->path + " " + section_json(**box).dump(2) : "config section (freed)");
    return 1;
}
template <int (*ToTable)(lua_State*)>
int pairs_of(lua_State* L) {
    ToTable(L);
    lua_replace(L, 1);
    lua_settop(L, 1);
    return sorted_pairs(L);
}

const Binding kFunctions[] = {
    {"config", config,
     "moe.config(name), moe.config(\"file.json\"), moe.config { model = { … } }: a configuration: a ready one (moe.config_names() lists them), a file's, or a table's over the defaults. cfg.model.moe.num_experts reads a key.\n"
     "Example: print(moe.config(\"tiny\").model.moe.num_experts)"},
    {"config_names", names, "moe.config_names(): names of the ready configurations.\n"
     "Example: print(table.concat(moe.config_names(), \", \"))"},
    {"config_about", about, "moe.config_about(name): what a ready configuration is, in a line.\n"
     "Example: print(moe.config_about \"tiny\")"},
    {"config_keys", keys, "moe.config_keys(): a Markdown table of every key, its default and its meaning.\n"
     "Example: print(#moe.config_keys())"},
};
const Binding kMethods[] = {
    {"with", with, "cfg:with { model = { moe = { num_experts = 16 } } }: a changed copy; dotted keys (\"model.moe.num_experts\") work too, moe.null is null. Printing it marks the differences.\n"
     "Example: print(moe.config \"tiny\":with { model = { moe = { num_experts = 16 } }, [\"training.learning_rate\"] = 1e-4 }.model.moe.num_experts)"},
    {"assign", assign, "cfg:assign { \"model.moe.num_experts=16\", \"training.train_steps=null\" }: a changed copy by key=value texts as on the command line: a key's type says how its text is read.\n"
     "Example: print(moe.config \"tiny\":assign { \"training.train_steps=null\" }.training.train_steps)"},
    {"params", params, "cfg:params(): {total, active (a token's, without the embedding), flops_per_token (forward and backward at training.seq_length, the causal half of attention counted), flops_per_token_full (all of it: torchtitan's rule), mtp, router_bias}.\n"
     "Example: print(moe.config \"tiny\":params().total)"},
    {"num_steps", num_steps, "cfg:num_steps {ranks = 1}: optimizer steps of a run, by training.train_steps, total_training_tokens or tokens_per_parameter_ratio; nil where none is set.\n"
     "Example: print(moe.config \"cpu_quick\":with { training = { train_steps = 20 } }:num_steps())"},
    {"num_tokens", num_tokens, "cfg:num_tokens {ranks = 1}: tokens that those steps see, a batch ramp's smaller steps as they are; nil where no length is set.\n"
     "Example: print(moe.config \"cpu_quick\":with { training = { train_steps = 20 } }:num_tokens())"},
    {"memory", memory, "cfg:memory {ranks = 1}: bytes that training needs on the fullest rank: {weights, gradients, optimizer (master weights and moments), activations (an estimate, within about a factor of two), total}.\n"
     "Example: print(moe.format_bytes(moe.config \"tiny\":memory().total))"},
    {"to_table", to_table, "cfg:to_table(): all keys as nested tables.\n"
     "Example: print(moe.config \"tiny\":to_table().model.num_layers)"},
    {"tree", tree, "cfg:tree(): a tree of all keys as a text; those that differ from the base are marked. print(cfg) leaves those out that are at their defaults.\n"
     "Example: print(#moe.config \"tiny\":tree())"},
    {"save", save, "cfg:save(path): writes all keys as a JSON file. Returns cfg."},
    {"validate", check_values, "cfg:validate {built = true}: raises one error that lists everything wrong, or not built yet; built = false asks for the first alone. Returns cfg.\n"
     "Example: print(pcall(function() moe.config \"tiny\":with { training = { seq_length = 0 } }:validate() end))"},
};
std::vector<std::string> method_names() {
    std::vector<std::string> names;
    for (auto& m : kMethods) names.emplace_back(m.name);
    return names;
}
const Binding kMeta[] = {
    {"__tostring", text, "tostring(cfg): a tree of the keys that are not at their defaults, or differ from the base, which is marked; cfg:tree() has all."},
    {"__newindex", refuse_assignment, "cfg.key = value: an error: configurations are frozen; cfg:with makes a changed copy."},
    {"__eq", same, "a == b: true where all keys are equal."},
    {"__pairs", pairs_of<to_table>, "pairs(cfg): keys and values, in their order."},
};
const Binding kSectionMethods[] = {{"to_table", section_to_table, "section:to_table(): its keys as nested tables."}};
const Binding kSectionMeta[] = {
    {"__tostring", section_text, "tostring(section): its keys as JSON."},
    {"__newindex", refuse_assignment, "section.key = value: an error: configurations are frozen; cfg:with makes a changed copy."},
    {"__pairs", pairs_of<section_to_table>, "pairs(section): keys and values, in their order."},
};
}  // namespace

ConfigValue check_config(lua_State* L, int index, const char* name) {
    if (test_box<ConfigValue>(L, index)) return check<ConfigValue>(L, index, name);
    if (lua_type(L, index) == LUA_TSTRING) return {std::make_shared<const Config>(resolve_config(check_string(L, index, name))), nullptr};
    if (!lua_istable(L, index)) bad_argument(L, index, name, "a ready name, the path of a JSON file, or a table of keys", "moe.config_names() lists the ready ones");
    Json changes = changes_from_table(L, index);
    return {std::make_shared<const Config>(config_from_json(nlohmann::json(changes))), nullptr};
}

Config changed_config(lua_State* L, int index, const Config& config) {
    if (lua_isnoneornil(L, index)) return config;
    check_table(L, index, "changes");
    return with_overrides(config, changes_from_table(L, index));
}

Config with_session_device(lua_State* L, const Config& config) {
    Config c = config;
    if (!control(L).device.empty()) c.device = control(L).device;
    return c;
}

void open_config(lua_State* L) {
    set_functions(L, "moe.", kFunctions);
    register_type<ConfigValue>(L, {.name = nullptr, .help = "config: a frozen configuration. cfg.model.moe.num_experts reads a key; cfg:with { … } makes a changed copy.",
                                   .methods = kMethods, .fields = {}, .meta = kMeta, .index = index_key<ConfigValue>});
    register_type<ConfigSection>(L, {.name = nullptr, .help = "config section: keys of a configuration that belong together.",
                                     .methods = kSectionMethods, .fields = {}, .meta = kSectionMeta, .index = index_key<ConfigSection>});
}
}  // namespace moe::lua
