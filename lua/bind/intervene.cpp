// Handles, events and changes of keys: what every intervention has in common.
#include "lua/bind/intervene.h"

#include "core/base/json.h"
#include "core/base/suggest.h"
#include "core/config/load.h"
#include "lua/bind/control.h"
#include "lua/bind/json.h"
#include "lua/bind/ranks.h"
#include "lua/bind/script.h"
#include "lua/bind/tensor.h"

#include <fmt/ranges.h>

#include <algorithm>

namespace moe::lua {
using train::Values;
namespace {
constexpr const char* kEventsType = "events";

int undo(lua_State* L) {
    HandleValue h = self<HandleValue>(L);
    HeldEdge edge = hold_edge(L, h.of.run);
    if (h.of.run) h.of.run->undo(h.id);
    else h.of.own->undo(h.id);
    return 0;
}

/// `local h <close> = …`: undone at the end of the scope, unless it was before.
int close_handle(lua_State* L) {
    auto* box = test_box<HandleValue>(L, 1);
    if (!box || !*box) return 0;
    HandleValue h = **box;
    HeldEdge edge = hold_edge(L, h.of.run);
    if (!interventions_of(h.of).is_active(h.id)) return 0;
    if (h.of.run) h.of.run->undo(h.id);
    else h.of.own->undo(h.id);
    return 0;
}

int field_id(lua_State* L) { return lua_pushinteger(L, self<HandleValue>(L).id), 1; }
int field_active(lua_State* L) {
    HandleValue h = self<HandleValue>(L);
    HeldEdge edge = hold_edge(L, h.of.run);
    return lua_pushboolean(L, interventions_of(h.of).is_active(h.id)), 1;
}
int text(lua_State* L) {
    auto* box = test_box<HandleValue>(L, 1);
    if (!box || !*box) return lua_pushliteral(L, "intervention (freed)"), 1;
    push_string(L, fmt::format("intervention {}: {}", (*box)->id, (*box)->text));
    return 1;
}

const Binding kMethods[] = {{"undo", on_all_ranks<undo>, "h:undo(): takes the intervention back, in whatever order they were made: what is left is what the others give in their order. An event as well. A second time is an error."}};
const Binding kFields[] = {
    {"id", field_id, "h.id: its number in run.events."},
    {"active", field_active, "h.active: true until it is undone."},
};
const Binding kMeta[] = {{"__tostring", text, "tostring(h): what it does."}};
constexpr Binding kClose = {"__close", on_all_ranks<close_handle>, "local h <close> = …: undone at the end of the scope."};

/// Events as a table of texts.
int events_text(lua_State* L) {
    std::vector<std::vector<std::string>> rows = {{"step", "what", "old", "new"}};
    for (lua_Integer i = 1, n = lua_Integer(lua_rawlen(L, 1)); i <= n; ++i) {
        lua_rawgeti(L, 1, i);
        std::vector<std::string> row;
        for (const char* key : {"step", "text", "old_text", "new_text"}) {
            lua_getfield(L, -1, key);
            row.push_back(lua_isnil(L, -1) ? "" : to_string(L, -1));
            lua_pop(L, 1);
        }
        lua_pop(L, 1);
        rows.push_back(std::move(row));
    }
    size_t widths[4] = {};
    for (auto& row : rows)
        for (size_t c = 0; c < 4; ++c) widths[c] = std::max(widths[c], row[c].size());
    std::string out;
    for (auto& row : rows) {
        std::string line = fmt::format("{:>{}}  {:<{}}  {:<{}}  {}", row[0], widths[0], row[1], widths[1], row[2], widths[2], row[3]);
        out += (out.empty() ? "" : "\n") + line.substr(0, line.find_last_not_of(' ') + 1);
    }
    push_string(L, out);
    return 1;
}
constexpr Binding kEventsText = {"__tostring", events_text, "tostring(events): a table of them."};

void flatten(const nlohmann::ordered_json& value, const nlohmann::ordered_json& known, const std::string& path, Values& out) {
    for (auto it = value.begin(); it != value.end(); ++it) {
        std::string key = path.empty() ? it.key() : path + "." + it.key();
        if (known.is_object() && known.contains(it.key())) {
            const auto& old = known[it.key()];
            if (old.is_object() && it.value().is_object()) flatten(it.value(), old, key, out);
            else out[key] = it.value();
            continue;
        }
        // The last word of a key that may change, or a key with dots.
        std::vector<std::string> found, words;
        for (auto& live : train::Run::live_keys()) {
            words.push_back(live.substr(live.rfind('.') + 1));
            if (live == key || words.back() == key) found.push_back(live);
        }
        if (found.empty() && key.find('.') != std::string::npos) found.push_back(key);
        bool is_field = key == "lr" || key == "schedule" || key == "optimizer";
        if (found.empty()) MOE_THROW(usage, "run:set", key, "a key of the configuration that may change between steps", is_field ? "run." + key + " = … sets it" : did_you_mean(key, words));
        out[found[0]] = it.value();
    }
}
}  // namespace

const train::Interventions& interventions_of(const ModelValue& of) { return of.run ? of.run->interventions() : *of.own; }
std::shared_ptr<train::HookFailures> failures_of(const ModelValue& of) { return of.run || of.own ? interventions_of(of).failures() : nullptr; }

ModelValue& model_to_change(lua_State* L, int index) {
    ModelValue& value = check<ModelValue>(L, index, "model");
    if (!value.run && !value.own) {
        value.own = std::make_shared<train::Interventions>(*value.model);
        value.own->set_compiler(script_compiler(L));
    }
    return value;
}

Values function_arguments(lua_State* L, int index, bool replay) {
    if (is_nothing(L, index)) return {{"function", nullptr}};
    check_function(L, index, "f");
    return {{"function", script_of(L, index, replay)}};
}

int intervene(lua_State* L, const ModelValue& of, const std::string& what, const Values& args) {
    HeldEdge edge = hold_edge(L, of.run);
    train::Change change = of.run ? of.run->intervene(what, args) : of.own->apply(what, args, 0);
    const auto& done = interventions_of(of).items().back();
    push<HandleValue>(L, {of, change.id, train::Interventions::text(what, done.args)});
    return 1;
}

void push_events(lua_State* L, const std::vector<std::string>& lines) {
    lua_createtable(L, int(lines.size()), 0);
    lua_Integer i = 0;
    std::map<int64_t, std::string> texts;
    for (auto& line : lines) {
        Values e = Values::parse(line, nullptr, /*allow_exceptions=*/false);
        if (!e.is_object()) continue;
        std::string event = e.value("event", ""), text = event;
        if (event == "intervention") texts[e.value("id", int64_t(0))] = text = train::Interventions::text(e.value("what", ""), e.value("args", Values::object()));
        else if (event == "undo") text = "undo " + texts[e.value("id", int64_t(0))];
        push_json(L, e);
        auto set = [&](const char* key, const std::string& value) {
            push_string(L, value);
            lua_setfield(L, -2, key);
        };
        set("text", text);
        for (const char* key : {"old", "new"})
            if (e.contains(key) && !e[key].is_null()) set((std::string(key) + "_text").c_str(), brief(nlohmann::json(e[key]), 50));
        lua_rawseti(L, -2, ++i);
    }
    if (luaL_newmetatable(L, kEventsType)) {
        push_function(L, kEventsText, "events:__tostring");
        lua_setfield(L, -2, "__tostring");
    }
    lua_setmetatable(L, -2);
}

Values live_changes(lua_State* L, int index, const Config& config) {
    check_table(L, index, "changes");
    Values given = to_json(L, index), known = to_json(config), out = Values::object();
    // data = { web = 0.7, code = 0.3 }: weights of the sources by name.
    if (given.contains("data") && given["data"].is_object() && !given["data"].contains("sources") && !given["data"].empty()) {
        Values sources = known["data"]["sources"];
        for (auto it = given["data"].begin(); it != given["data"].end(); ++it) {
            auto source = std::find_if(sources.begin(), sources.end(), [&](auto& s) { return s["name"] == it.key(); });
            std::vector<std::string> names;
            for (auto& s : sources) names.push_back(s["name"]);
            if (source == sources.end())
                MOE_THROW(usage, "run:set: data", it.key(), names.empty() ? "a run whose data.sources name its domains, with weights" : fmt::format("one of the sources {}", fmt::join(names, ", ")), did_you_mean(it.key(), names));
            MOE_CHECK(it.value().is_number(), usage, "run:set: data." + it.key(), brief(nlohmann::json(it.value())), "a weight", "");
            (*source)["weight"] = it.value();
        }
        given["data"] = {{"sources", sources}};
    }
    flatten(given, known, "", out);
    return out;
}

void open_interventions(lua_State* L) {
    register_type<HandleValue>(L, {.name = nullptr, .help = "intervention: what a change to a router or run gives back; h:undo() takes it back, and so does the end of a scope with local h <close> = ….",
                                   .methods = kMethods, .fields = kFields, .meta = kMeta});
    luaL_getmetatable(L, TypeName<HandleValue>::value);
    push_function(L, kClose, "intervention:__close");
    lua_setfield(L, -2, "__close");
    lua_pop(L, 1);
}
}  // namespace moe::lua
