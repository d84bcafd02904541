// What a run does with checkpoints and its folder: going on from one, saving, ending early.
#include "core/base/error.h"
#include "core/base/log.h"
#include "core/config/load.h"
#include "core/train/agree.h"
#include "core/train/resume.h"
#include "core/train/run.h"
#include "core/train/run_folder.h"

#include <ATen/ATen.h>
#include <nlohmann/json.hpp>

#include <chrono>
#include <ctime>
#include <filesystem>
#include <regex>
#include <utility>

namespace fs = std::filesystem;

namespace moe::train {
namespace {
using Json = nlohmann::json;
/// f with a checkpoint's meta: what is missing or of another type there is one error.
template <class F>
void with_meta(const store::Checkpoint& checkpoint, F&& f) {
    try {
        f(checkpoint.meta());
    } catch (const Json::exception& e) {
        MOE_THROW(data, "checkpoint", fmt::format("{}: {}", checkpoint.path(), e.what()), "a checkpoint that a run has saved", "its index was changed");
    }
}
}  // namespace

/// Opens the checkpoint that options.resume names and takes its run's folder.
void Run::find_resumed() {
    if (options_.resume.empty()) return;
    const auto& world = mesh_.world;
    std::string path;
    on_rank_0(world, [&] { path = find_checkpoint(options_.resume, config_.output_dir, options_.name.empty() ? config_.experiment_name : options_.name); });
    path = shared_text(path, world);
    agree(world, [&] {
        resumed_ = std::make_unique<store::Checkpoint>(path);
        keep_live_changes(*resumed_);
        check_changes(saved_config(*resumed_), config_);
    });
    if (!options_.log_folder) return;
    on_rank_0(world, [&] {
        folder_ = folder_to_continue(*resumed_, config_);
        if (!folder_.empty()) lock_ = std::make_unique<store::FolderLock>(folder_);
    });
    folder_ = shared_text(folder_, world);
}

/// Keys that were changed while the saved run lived stay as they were saved, where the configuration still has the value that the run began with.
void Run::keep_live_changes(const store::Checkpoint& checkpoint) {
    with_meta(checkpoint, [&](const Json& meta) {
        Json saved = Json(to_json(saved_config(checkpoint))), now = Json(to_json(config_)), take = Json::object();
        Json live = meta.value("live_changes", Json::object());
        for (const auto& [key, first] : live.items()) {
            auto at = Json::json_pointer("/" + std::regex_replace(key, std::regex("\\."), "/"));
            if (now.at(at) == first) take[at] = saved.at(at);
        }
        if (!take.empty()) config_ = with_overrides(config_, take);
    });
}

/// The state of the checkpoint: everything that the next step depends on.
void Run::restore() {
    restore_state(*resumed_);
    saved_step_ = step_;
}

void Run::restore_state(const store::Checkpoint& checkpoint) {
    load_state(*model_, checkpoint);
    agree(mesh_.world, [&] {
        with_meta(checkpoint, [&](const Json& meta) {
            step_ = meta.at("step").get<int64_t>();
            updates_ = meta.at("updates");
            tokens_ = meta.at("tokens");
            skipped_ = meta.at("skipped");
            skipped_in_a_row_ = meta.at("skipped_in_a_row");
            loss_scale_.restore(meta.at("loss_scale"));
            loader_->restore(meta.at("data"));
            events_.clear();
            for (const auto& event : meta.at("events")) events_.push_back(event.dump());
            if (meta.contains("first_config")) first_config_ = config_from_json(meta.at("first_config"));
            live_changes_ = meta.value("live_changes", Json::object());
            Json none = {{"next_id", 1}, {"items", Json::array()}};
            for (const std::string& lost : interventions_->restore(meta.value("interventions", none)))
                if (mesh_.world.rank() == 0) log::warn(fmt::format("an intervention was made with replay = false and is off now: {}", lost));
        });
    });
}

/// Log, metrics and checkpoints: in a new folder, or in that of the run that is resumed.
void Run::open_folder(const std::string& device) {
    const auto& world = mesh_.world;
    bool goes_on = !folder_.empty();
    if (resumed_) attempt_ = resumed_->attempt() + 1;
    Environment environment{options_.command, options_.script, device, world.size()};
    if (options_.log_folder && !goes_on) folder_ = make_run_folder(config_, options_.name.empty() ? config_.experiment_name : options_.name, environment, world);
    if (!folder_.empty()) {
        on_rank_0(world, [&] {
            if (!lock_) lock_ = std::make_unique<store::FolderLock>(folder_);
            metrics_ = std::make_unique<metrics::Writer>(folder_ + "/metrics");
            // An older state than the newest is resumed: what came after it belongs to earlier attempts.
            attempt_ = std::max(attempt_, metrics_->last_attempt() + 1);
            for (const auto& saved : store::complete_checkpoints(checkpoint_folder(config_, folder_))) attempt_ = std::max(attempt_, saved.attempt + 1);
            if (goes_on) reopen_run_folder(config_, folder_, environment, attempt_);
        });
        attempt_ = world.all_reduce(attempt_, dist::ReduceOp::max);
        log_path_ = fmt::format("{}/log.rank{}.txt", folder_, world.rank());
        agree(world, [&] { log::set_file(log_path_); });
    }
    std::string id = shared_text(fmt::format("{} {} {}", folder_, attempt_, std::chrono::system_clock::now().time_since_epoch().count()), world);
    checkpoints_ = std::make_unique<Checkpointing>(config_, folder_.empty() ? "" : checkpoint_folder(config_, folder_), attempt_, id, world);
    if (resumed_) add_event("resume", {{"from", resumed_->path()}, {"changes", changes(saved_config(*resumed_), config_)}});
    settle_writes();
}

nlohmann::json Run::state() const {
    Json events = Json::array();
    for (const auto& line : events_) events.push_back(Json::parse(line));
    return {{"step", current_step()}, {"updates", updates_}, {"tokens", tokens_}, {"skipped", skipped_}, {"skipped_in_a_row", skipped_in_a_row_}, {"loss_scale", loss_scale_.state()}, {"data", loader_->state()}, {"events", events},
            {"config", to_json(config_)}, {"first_config", to_json(first_config_)}, {"live_changes", Json(live_changes_)}, {"interventions", interventions_->state()}, {"attempt", attempt_}, {"run_folder", folder_.empty() ? "" : fs::absolute(folder_).string()}, {"world_size", mesh_.world.size()},
            {"optimizer", {{"name", config_.training.optimizer}, {"num_moments", model_->options().num_moments}}}};
}

std::string Run::save(const std::string& name) {
    check_open("run:save");
    check_whole("run:save");
    std::string path;
    on_all([&] {
        std::string folder = folder_.empty() ? "" : checkpoint_folder(config_, folder_);
        path = save_path(name, folder, step_);
        checkpoints_->begin(*model_, step_, state(), path);
        checkpoints_->finish();
        if (path.empty()) saved_step_ = step_;
        path = fs::absolute(path.empty() ? folder + "/" + store::checkpoint_name(step_) : path).lexically_normal().string();
        add_event("save", {{"path", path}});
        settle_writes();
    });
    return path;
}

void Run::restore_from(const std::string& what) {
    check_between_steps("run:restore");
    on_all([&] { restore_on_all(what); });
    is_broken_ = false;
}

void Run::restore_on_all(const std::string& what) {
    const auto& world = mesh_.world;
    checkpoints_->finish();
    std::string path;
    on_rank_0(world, [&] {
        std::string folder = folder_.empty() ? "" : checkpoint_folder(config_, folder_);
        for (auto& saved : folder.empty() || what.find('/') != std::string::npos ? std::vector<store::SavedState>() : store::complete_checkpoints(folder)) {
            if (saved.name == what) path = saved.path;
        }
        if (what == "last" && !folder.empty())
            if (auto last = store::last_checkpoint(folder)) path = last->path;
        if (path.empty()) path = find_checkpoint(what, config_.output_dir, options_.name.empty() ? config_.experiment_name : options_.name);
    });
    path = shared_text(path, world);
    int64_t from = step_;
    std::unique_ptr<store::Checkpoint> checkpoint;
    Config saved;
    agree(world, [&] {
        checkpoint = std::make_unique<store::Checkpoint>(path);
        saved = saved_config(*checkpoint);
        std::vector<Problem> problems;
        for (const auto& change : changes(config_, saved)) {
            std::string key = change.at("key");
            auto is = [&](const std::string& known) { return key == known || key.starts_with(known + "."); };
            bool live = std::any_of(live_keys().begin(), live_keys().end(), is) || key == "model.moe.use_aux_loss_free" || std::any_of(changeable_keys().begin(), changeable_keys().end(), is);
            bool is_precision = key == "training.use_bf16" || key == "training.use_fp8";      // the live model's products stay what they are: moe.resume makes others
            if (!live || is_precision) problems.push_back({key, change.at("new").dump(), change.at("old").dump(), ""});
        }
        throw_problems(ErrorKind::config, "run:restore: a checkpoint of another model or data", problems);
    });
    reached_ = Reached::changing;
    Config next = config_;                              // only what may change between steps comes back
    next.model.moe = saved.model.moe;
    next.training = saved.training;
    next.validation = saved.validation;
    next.data.sources = saved.data.sources;
    if (!(next.data == config_.data)) loader_ = data::open_loader(next, /*validation=*/false);
    config_ = next;
    model_->adopt(config_);
    open_global_load();
    if (graph_) graph_->reset();
    restore_state(*checkpoint);
    num_steps_ = num_steps_of_config();
    is_stopping_ = false;
    ++attempt_;
    std::string id = shared_text(fmt::format("{} {} {}", folder_, attempt_, std::chrono::system_clock::now().time_since_epoch().count()), world);
    checkpoints_ = std::make_unique<Checkpointing>(config_, folder_.empty() ? "" : checkpoint_folder(config_, folder_), attempt_, id, world);
    add_event("restore", {{"from", path}, {"from_step", from}});
    saved_step_ = -1;
    reached_ = Reached::end;
    settle_writes();
}

void Run::begin_periodic_save() {
    checkpoints_->begin(*model_, step_, state(), "");
    saved_step_ = step_;
}

bool Run::would_save_on_exit() const {
    return !is_closed_ && !is_broken_ && !folder_.empty() && config_.checkpointing.enabled && config_.checkpointing.save_on_exit && saved_step_ != step_;
}

bool Run::save_on_exit() {
    if (!would_save_on_exit()) return false;
    on_all([&] {
        begin_periodic_save();
        checkpoints_->finish();
    });
    return true;
}

/// What happens between steps: a checkpoint where one is due, and the end where somebody wants it.
void Run::at_edge() {
    const auto& world = mesh_.world;
    std::error_code ignored;
    bool stop_file = world.rank() == 0 && !folder_.empty() && fs::exists(folder_ + "/stop", ignored);
    // What any rank met or wants, all ranks act on.
    Tensor any = at::zeros({4}, at::kLong);
    bool interrupted = world.size() > 1 && edge_interrupt_ && *edge_interrupt_;
    bool mine[] = {bool(write_error_), checkpoints_->has_failed(), stop_file || stop_requested(), interrupted};
    for (int i = 0; i < 4; ++i) any[i] = int64_t(mine[i]);
    world.all_reduce(any, dist::ReduceOp::max);
    bool write_failed = any[0].item<int64_t>(), save_failed = any[1].item<int64_t>(), stops_now = any[2].item<int64_t>() && !is_stopping_, ends = stops_now || step_ == num_steps_;
    was_interrupted_ = any[3].item<int64_t>();
    if (save_failed) checkpoints_->finish();                                // throws
    if (!folder_.empty() && config_.checkpointing.enabled) {
        if (step_ % config_.training.save_interval == 0) begin_periodic_save();
        if (ends) save_on_exit();
        if (ends || !config_.checkpointing.async) checkpoints_->finish();
    }
    if (stops_now) {
        is_stopping_ = true;
        add_event("stop", {{"saved", saved_step_ == step_}});
        if (world.rank() == 0) log::info(fmt::format("stopped after step {}{}", current_step(), saved_step_ == step_ ? "; it is saved" : ""));
        if (stop_file) fs::remove(folder_ + "/stop", ignored);
    }
    if (write_failed || stops_now) settle_writes();                         // throws
}

/// A line of events.jsonl; the state carries it on.
void Run::add_event(const std::string& event, const nlohmann::ordered_json& facts) {
    nlohmann::ordered_json line = {{"step", current_step()}, {"attempt", attempt_}, {"time", std::time(nullptr)}, {"event", event}};
    line.update(facts);
    events_.push_back(line.dump(-1, ' ', false, Json::error_handler_t::replace));
    if (!folder_.empty()) write_on_rank_0([&] { append_event(folder_, events_.back()); });
}

/// Rank 0 writes to the run's folder. An error waits until all ranks can be told: at the step's edge, or in settle_writes().
void Run::write_on_rank_0(const std::function<void()>& f) {
    if (mesh_.world.rank() != 0) return;
    try {
        f();
    } catch (...) {
        if (!write_error_) write_error_ = std::current_exception();
    }
}

/// Throws on all ranks what went wrong in write_on_rank_0(). A collective.
void Run::settle_writes() {
    agree(mesh_.world, [&] {
        if (write_error_) std::rethrow_exception(std::exchange(write_error_, nullptr));
    });
}

void Run::check_open(const std::string& op) const {
    MOE_CHECK(!is_closed_, state, op, "a closed run: run:close() was called, or a moe.resume went on in its folder", "an open one",
              folder_.empty() ? "moe.run makes another" : "moe.resume(run) makes one of its newest checkpoint");
}

void Run::close() {
    agree(mesh_.world, [&] { close_here(); });
}

void Run::close_here() {
    if (is_closed_) return;
    is_closed_ = true;
    if (!folder_.empty()) log::close_file(log_path_);
    metrics_.reset();
    std::exception_ptr error;
    try {
        checkpoints_->finish_here();
    } catch (const Error&) {
        error = std::current_exception();
    }
    if (!error) error = std::exchange(write_error_, nullptr);
    lock_.reset();
    if (error) std::rethrow_exception(error);
}

}  // namespace moe::train
