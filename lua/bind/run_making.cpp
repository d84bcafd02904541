// How runs come to be: new ones, and from checkpoints; and which ones this process has.
#include "lua/bind/run.h"

#include "core/base/log.h"
#include "core/train/agree.h"
#include "core/train/resume.h"
#include "lua/bind/bind.h"
#include "lua/bind/config.h"
#include "lua/bind/control.h"
#include "lua/bind/intervene.h"
#include "lua/bind/ranks.h"
#include "lua/bind/script.h"

#include <filesystem>

namespace moe::lua {
namespace {
/// The runs of this process, so that a resume may take over the folder of one of them, and finds names in the latest first.
std::vector<std::weak_ptr<train::Run>>& live_runs() {
    static std::vector<std::weak_ptr<train::Run>> list;
    std::erase_if(list, [](auto& r) { return r.expired(); });
    return list;
}

}  // namespace

void save_left(train::Run& run, std::string_view why) {
    try {
        if (run.save_on_exit()) log::info(fmt::format("{} after step {}, which is saved; moelab train --resume {} goes on", why, run.current_step(), run.folder()));
    } catch (const std::exception&) {
        log::warn(fmt::format("{} after step {}, which could not be saved: {}", why, run.current_step(), Error(current_exception_parts()).what()));
    }
}

void save_runs(const char* why) {
    for (auto& weak : live_runs()) {
        auto r = weak.lock();
        if (!r || r->current_step() == 0 || r->folder().empty()) continue;
        if (const auto& world = r->model().mesh().world; world.size() != 1) {
            if (world.rank() == 0 && r->would_save_on_exit()) log::warn(fmt::format("{} after step {}, which is not saved: of several ranks only run:save() does that", why, r->current_step()));
            continue;
        }
        save_left(*r, why);
    }
}

train::RunOptions run_options(lua_State* L, const Options& o) {
    Control& session = control(L);
    train::RunOptions options;
    options.name = o.string("name", "");
    options.script = session.script;
    options.command = session.command;
    options.log_folder = o.boolean("log", true);
    options.console = o.boolean("console", true);
    options.json = session.json;
    options.compiler = script_compiler(L);
    return options;
}

int push_run(lua_State* L, const Config& config, const train::RunOptions& options) {
    auto made = std::make_shared<train::Run>(with_session_device(L, config), options);
    live_runs().push_back(made);
    push<RunValue>(L, {std::move(made)}).state->console = options.console;
    return 1;
}

namespace {
int make_run(lua_State* L) {
    check_table(L, 1, "options");
    Options o(L, 1, {"config", "name", "console", "log", "resume", "data"});
    if (!o.has("config")) MOE_THROW(usage, "moe.run: config", "nothing", "a configuration", "moe.run { config = \"tiny\" }; moe.config_names() lists the ready ones");
    o.push("config");
    ConfigValue c = check_config(L, -1, "config");
    train::RunOptions options = run_options(L, o);
    options.resume = o.string("resume", "");
    o.push("data");
    int source = lua_gettop(L);
    train::Values data = function_arguments(L, source, true);
    push_run(L, *c.config, options);
    if (!lua_isnil(L, source)) check<RunValue>(L, -1, "run").run->intervene("data", data);
    return 1;
}

}  // namespace

/// Of this session's latest run that has it, else of the newest in the default output_dir.
std::string find_saved(const std::string& what) {
    auto& runs = live_runs();
    std::vector<std::string> names;
    for (auto it = runs.rbegin(); what.find('/') == std::string::npos && it != runs.rend(); ++it) {
        auto r = it->lock();
        if (!r || r->folder().empty()) continue;
        std::string folder = train::checkpoint_folder(r->config(), r->folder());
        auto last = store::last_checkpoint(folder);
        if (what == "last" && last) return last->path;
        for (auto& saved : store::complete_checkpoints(folder)) {
            if (saved.name == what) return saved.path;
            names.push_back(saved.name);
        }
    }
    return train::find_checkpoint(what, Config().output_dir, "", names);
}

namespace {
/// A run stands for its folder, and so for its newest checkpoint.
std::string resumed_name(lua_State* L) {
    if (!test_box<RunValue>(L, 1)) return check_string(L, 1, "what");
    auto r = check<RunValue>(L, 1, "what").run;
    MOE_CHECK(!r->folder().empty(), state, "moe.resume", "a run without a folder", "one that saves", "it was made with log = false");
    return r->folder();
}

int resume(lua_State* L) {
    std::string what = resumed_name(L);
    Options o(L, 3, {"name", "output_dir", "console", "log"});
    train::RunOptions options = run_options(L, o);
    const auto& world = dist::world();
    std::string path;
    train::agree(world, [&] {
        for (auto& r : live_runs())
            if (auto live = r.lock()) live->wait_here();
    });
    train::on_rank_0(world, [&] {
        bool says_where = o.has("output_dir") || o.has("name");
        path = says_where ? train::find_checkpoint(what, o.string("output_dir", Config().output_dir), options.name) : find_saved(what);
        path = std::filesystem::absolute(path).string();
    });
    options.resume = train::shared_text(path, world);
    Config config;
    train::agree(world, [&] {
        store::Checkpoint checkpoint(options.resume);
        Config saved = train::saved_config(checkpoint);
        config = changed_config(L, 2, saved);
        train::check_changes(saved, config);           // before a run is closed for it
        std::string folder = options.log_folder ? train::folder_to_continue(checkpoint, config) : "";
        for (auto& r : live_runs()) {
            auto live = r.lock();
            std::error_code ignored;
            if (live && !folder.empty() && std::filesystem::equivalent(live->folder(), folder, ignored)) live->close_here();
        }
    });
    return push_run(L, config, options);
}

const Binding kFunctions[] = {
    {"run", on_all_ranks<make_run>,
     "moe.run {config =, name =, console = true, log = true, resume =}: model, data, optimizer and a folder <output_dir>/<name>/<unix time> (none with log = false). name defaults to experiment_name; console = false prints no log lines. "
     "data = a function as for run.data = …. resume = a path, the name of a save or \"last\": goes on from that checkpoint; keys that differ from the saved ones and may not are one error."},
    {"resume", on_all_ranks<resume>,
     "moe.resume(what, {changes}, {name =, output_dir =, console = true, log = true}): a run that goes on bit for bit from a checkpoint, in the same folder with attempt + 1. what: a run of this session or a path (with a \"/\") of a run's folder, both for the newest checkpoint of it; the path of a checkpoint; the name of a save; "
     "or \"last\", the newest complete one; names are looked for in the newest runs of output_dir (called name), or where neither is given in this session's latest runs, then in the newest of \"outputs\". changes: keys as for cfg:with, such as { training = { learning_rate = 1e-4 } }; another output_dir or experiment_name "
     "makes a folder of its own. A run of this session that has the folder is closed."},
    {"replay", on_all_ranks<replay_run>,
     "moe.replay(what, {name =, output_dir =, console = true, log = true, steps =}): a new run from step 0 with the first configuration of what (a run, or a checkpoint as for moe.resume), and every intervention of its events at its step; on one machine it ends bit-equal. name defaults to that of a run given, else to experiment_name. Steps: as many as what has done. Throws (state) at a hook with replay = false."},
};
}  // namespace

std::span<const Binding> run_functions() { return kFunctions; }
}  // namespace moe::lua
