#include "core/train/resume.h"

#include "core/base/error.h"
#include "core/base/json.h"
#include "core/base/suggest.h"
#include "core/config/load.h"
#include "core/store/checkpoint.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <filesystem>

namespace moe::train {
namespace fs = std::filesystem;
namespace {
using OrderedJson = nlohmann::ordered_json;

bool is_path(const std::string& what) { return what.find('/') != std::string::npos; }
bool is_run_folder(const fs::path& folder) { return fs::is_regular_file(folder / "config.json") && fs::is_directory(folder / "metrics"); }

/// Where the checkpoints of a run folder may be: its configuration may have been changed by a resume.
std::vector<std::string> checkpoint_folders(const fs::path& run) {
    std::vector<std::string> list = {(run / "checkpoints").string()};
    try {
        auto other = checkpoint_folder(config_from_json(read_json((run / "config.json").string()), run.string()), run.string());
        if (other != list[0]) list.push_back(other);
    } catch (const Error&) {                            // a run folder of another version: what lies inside of it can still be found
    }
    return list;
}

/// All complete checkpoints of a run, oldest first.
std::vector<store::SavedState> saved_by(const fs::path& run) {
    std::vector<store::SavedState> all;
    for (const auto& folder : checkpoint_folders(run)) {
        auto some = store::complete_checkpoints(folder);
        all.insert(all.end(), some.begin(), some.end());
    }
    std::stable_sort(all.begin(), all.end(), [](const auto& a, const auto& b) { return std::pair(a.attempt, a.step) < std::pair(b.attempt, b.step); });
    return all;
}

std::vector<fs::path> folders_in(const fs::path& parent) {
    std::vector<fs::path> list;
    std::error_code error;
    for (fs::directory_iterator it(parent, error), end; !error && it != end; it.increment(error)) {
        std::error_code ignored;
        if (it->is_directory(ignored)) list.push_back(it->path());
    }
    return list;
}

/// Run folders, newest first: their names are start times.
std::vector<fs::path> runs_of(const std::string& output_dir, const std::string& name) {
    std::vector<fs::path> parents = name.empty() ? folders_in(output_dir) : std::vector<fs::path>{fs::path(output_dir) / name}, runs;
    auto is_time = [](const std::string& text) { return !text.empty() && text.size() < 19 && std::all_of(text.begin(), text.end(), [](char c) { return c >= '0' && c <= '9'; }); };
    for (const auto& parent : parents)
        for (auto& run : folders_in(parent))
            if (is_time(run.filename().string())) runs.push_back(run);
    std::sort(runs.begin(), runs.end(), [](const auto& a, const auto& b) { return std::stoll(a.filename().string()) > std::stoll(b.filename().string()); });
    return runs;
}

/// "mid, step_10, … 3 more", each once.
std::string listed(const std::vector<std::string>& names) {
    constexpr size_t kMost = 12;
    std::vector<std::string> once;
    for (const auto& name : names)
        if (std::find(once.begin(), once.end(), name) == once.end()) once.push_back(name);
    std::string text;
    for (size_t i = 0; i < std::min(once.size(), kMost); ++i) text += (i ? ", " : "") + once[i];
    return once.size() > kMost ? text + fmt::format(", … {} more", once.size() - kMost) : text;
}

/// The checkpoint at a path, or the newest one in it. What is neither is left to the reader, which says why, unless there are others beside it.
std::string at_path(const std::string& what) {
    fs::path path = fs::path(what).lexically_normal();
    if (!path.has_filename()) path = path.parent_path();
    if (fs::exists(path / "index.json")) return path.string();
    if (std::vector<std::string> beside; !fs::exists(path)) {
        for (const auto& saved : store::complete_checkpoints(path.parent_path().string())) beside.push_back(saved.name);
        MOE_CHECK(beside.empty(), io, "checkpoint", fmt::format("{}: no such checkpoint", path.string()), "one that is there: " + listed(beside), did_you_mean(path.filename().string(), beside));
    }
    auto saved = is_run_folder(path) ? saved_by(path) : fs::is_directory(path) ? store::complete_checkpoints(path.string()) : std::vector<store::SavedState>();
    MOE_CHECK(!saved.empty() || !is_run_folder(path), io, "checkpoint", fmt::format("{}: a run without a complete checkpoint", path.string()), "a run that has saved", "run:save() saves; training.save_interval says how often a run does by itself");
    return saved.empty() ? path.string() : saved.back().path;
}

/// Adds {"key", "old", "new"} for each leaf that differs.
void add_changes(const OrderedJson& before, const OrderedJson& after, const std::string& path, OrderedJson& out) {
    if (before == after) return;
    if (!before.is_object() || !after.is_object()) {
        out.push_back({{"key", path}, {"old", before}, {"new", after}});
        return;
    }
    for (auto it = after.begin(); it != after.end(); ++it) {
        std::string key = path.empty() ? it.key() : path + "." + it.key();
        add_changes(before.contains(it.key()) ? before.at(it.key()) : OrderedJson(), it.value(), key, out);
    }
}

bool may_change(const std::string& key) {
    return std::any_of(changeable_keys().begin(), changeable_keys().end(), [&](const auto& known) { return key == known || key.starts_with(known + "."); });
}
}  // namespace

std::string checkpoint_folder(const Config& config, const std::string& run_folder) {
    fs::path run = fs::path(run_folder).lexically_normal();
    if (!config.checkpointing.dir) return (run / "checkpoints").string();
    return (fs::path(*config.checkpointing.dir) / run.parent_path().filename() / run.filename()).string();
}

std::string save_path(const std::string& name, const std::string& checkpoints, int64_t step) {
    if (is_path(name)) return name;
    MOE_CHECK(!checkpoints.empty(), state, "save", name.empty() ? "no name" : '"' + name + '"', "a path with a \"/\"", "this run has no folder that a name could be in");
    MOE_CHECK(name != "last" && !name.starts_with('.'), usage, "save", '"' + name + '"', "another name", "\"last\" is the newest checkpoint, names with a dot in front are hidden");
    MOE_CHECK(!store::is_periodic_name(name) || name == store::checkpoint_name(step), usage, "save", '"' + name + '"', fmt::format("\"{}\", or another kind of name", store::checkpoint_name(step)),
              "such names are the run's own and are pruned");
    return name.empty() || store::is_periodic_name(name) ? "" : (fs::path(checkpoints) / name).string();
}

std::string find_checkpoint(const std::string& what, const std::string& output_dir, const std::string& name, const std::vector<std::string>& elsewhere) {
    if (is_path(what)) return at_path(what);
    MOE_CHECK(!what.empty(), usage, "resume", "an empty name", "a path, the name of a save, or \"last\"", "");
    std::vector<std::string> known = elsewhere;
    for (const auto& run : runs_of(output_dir, name)) {
        auto saved = saved_by(run);
        if (what == "last" && !saved.empty()) return saved.back().path;
        for (auto it = saved.rbegin(); it != saved.rend(); ++it) {
            if (it->name == what) return it->path;
            known.push_back(it->name);
        }
    }
    std::string place = (fs::path(output_dir) / (name.empty() ? "*" : name)).string();
    MOE_THROW(io, "resume", what == "last" ? "no complete checkpoint" : fmt::format("no checkpoint called \"{}\"", what),
              fmt::format("one that a run {}in {} has saved{}", elsewhere.empty() ? "" : "of this session or ", place, known.empty() ? "" : ": " + listed(known)),
              known.empty() ? "no run there has a complete checkpoint; a name with a \"/\" is a path" : did_you_mean(what, known));
}

Config saved_config(const store::Checkpoint& checkpoint) {
    MOE_CHECK(checkpoint.meta().contains("config"), data, "checkpoint", fmt::format("{}: no configuration", checkpoint.path()), "a checkpoint that a run has saved", "");
    return config_from_json(checkpoint.meta().at("config"));
}

std::string folder_to_continue(const store::Checkpoint& checkpoint, const Config& now) {
    Config saved = saved_config(checkpoint);
    if (saved.output_dir != now.output_dir || saved.experiment_name != now.experiment_name) return "";
    fs::path path = fs::absolute(checkpoint.path()).lexically_normal();
    for (const fs::path& run : {path.parent_path().parent_path(), fs::path(checkpoint.meta().value("run_folder", ""))})
        if (!run.empty() && is_run_folder(run)) return run.string();
    return "";
}

const std::vector<std::string>& changeable_keys() {
    static const std::vector<std::string> keys = {
        // where and how long
        "experiment_name", "output_dir", "inherits", "device", "deterministic", "training.train_steps", "training.total_training_tokens", "training.tokens_per_parameter_ratio",
        // how fast it learns
        "training.learning_rate", "training.min_learning_rate", "training.lr_warmup_steps", "training.lr_decay_style", "training.lr_decay_ratio", "training.weight_decay", "training.grad_clip",
        "training.max_skipped_steps", "model.moe.bias_update_speed", "model.moe.bias_freeze_step",
        // how the work is divided and computed
        "training.use_bf16", "training.use_fp8", "training.micro_batch_size", "training.gradient_checkpointing", "training.recompute", "training.compile_graphs", "model.mla.use_flash_mla", "model.mla.flash_mla_backend", "distributed",
        "deepspeed", "slurm", "data.preprocessing.num_workers", "data.cache_dir",
        // where the data is and how it is mixed: the loader itself refuses a position of other data
        "data.path", "data.sources",
        // what is watched and kept
        "training.eval_interval", "training.save_interval", "training.log_interval", "training.init_from", "validation", "checkpointing", "logging", "profiling",
    };
    return keys;
}

OrderedJson changes(const Config& saved, const Config& now) {
    OrderedJson list = OrderedJson::array();
    add_changes(to_json(saved), to_json(now), "", list);
    return list;
}

void check_changes(const Config& saved, const Config& now) {
    std::vector<Problem> problems;
    for (const auto& change : changes(saved, now)) {
        std::string key = change.at("key");
        std::string hint = key == "training.use_fp16" ? "fp16 has a loss scale, which is part of the saved state; use_bf16 and use_fp8 may change" : "";
        if (!may_change(key)) problems.push_back({key, brief(change.at("new"), 40), brief(change.at("old"), 40) + ", as it was saved", hint});
    }
    throw_problems(ErrorKind::config, "resume: keys that a resumed run cannot change", problems);
}

}  // namespace moe::train
