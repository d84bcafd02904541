// A run: model, data, optimizer and a log directory, driven step by step.
#pragma once
#include "core/base/stop.h"
#include "core/data/loader.h"
#include "core/metrics/run_log.h"
#include "core/model/model.h"
#include "core/store/folder_lock.h"
#include "core/train/checkpointing.h"
#include "core/train/step_edge.h"
#include "core/train/interventions.h"
#include "core/train/loss_scale.h"
#include "core/train/step_graph.h"
#include "core/train/step_program.h"

#include <nlohmann/json_fwd.hpp>

#include <atomic>
#include <exception>
#include <functional>
#include <memory>
#include <string>

namespace moe::train {

/// What one optimizer step gave. Rates are over all ranks.
struct StepMetrics {
    int64_t step = 0;                     ///< of the step just done, from 1
    double loss = 0, grad_norm = 0, lr = 0;
    double tokens_per_sec = 0, tflops = 0, mfu = 0;   ///< model FLOPs by the causal rule; mfu as a share of 1
    double memory_gib = 0;                ///< peak: allocated on the device, resident on the CPU
    double max_vio = 0;                   ///< largest over the layers, of this step's global counts
    double mtp_loss = 0;                  ///< λ · mean over the MTP modules, of the total that is trained; 0 without
    double balance_loss = 0;              ///< what the routers' losses add to the total, z-loss included
    double drop_rate = 0;                 ///< share of routed pairs that capacity dropped
    double step_secs = 0;
    int64_t tokens = 0;                   ///< positions seen since step 0: sequences × seq_length of every step
    bool skipped = false;                 ///< loss or gradient norm was not finite: nothing was updated
    /// "step: 10 loss: 4.87123 grad_norm: 1.2041 lr: 3.0e-04 tps: 7800 tflops: 0.10 mfu: 0.1% memory: 0.62GiB maxvio: 1.31"
    std::string line() const;
    /// The same keys in full precision, one JSON object.
    std::string json() const;
};

/// Mean loss in nats a token over validation data.
struct Evaluation {
    double loss = 0;                                       ///< mean over the domains of their means
    std::vector<std::pair<std::string, double>> by_domain;
    int64_t num_tokens = 0;
    /// By MTP module: share of positions where its most likely token is the main head's at the next position, which is how often
    /// greedy speculative decoding would accept it.
    std::vector<double> acceptance;
};

/// What a run is besides its configuration.
struct RunOptions {
    std::string name;                     ///< "" = experiment_name
    std::string script;                   ///< path of the script to copy, "" for none
    std::string command;                  ///< command line, for env.json
    bool log_folder = true;               ///< false: nothing on disk (tests, benchmarks)
    bool console = true;                  ///< log lines on standard output (rank 0)
    bool json = false;                    ///< as one JSON object a line
    double memory_bytes = 0;              ///< of this rank, for what is chosen by memory; 0: what the device can give
    std::string resume;                   ///< checkpoint to go on from (train/resume.h: a path, a name, "last"); "" for a new run
    ScriptCompiler compiler;              ///< makes functions of interventions; without it there can be none
};

/// Owns model, data, optimizer state and log folder; every rank of a job has one and calls the same methods.
class Run {
public:
    /// Validates, opens the data, makes the log folder, builds the model over the ranks of `world`. With `resume` it goes on bit for
    /// bit from a checkpoint, in the same folder with attempt + 1; in a new one where output_dir or experiment_name differ from the
    /// saved ones. Throws moe::Error: (state) where another run writes to that folder, (config) with all keys that may not change.
    Run(const Config& config, const RunOptions& options, const dist::Group& world = dist::world());
    ~Run();

    /// One optimizer step, and what is due after it: validation, a checkpoint. Throws moe::Error on all ranks: (state) after
    /// max_skipped_steps skipped in a row, (io) where a checkpoint, an event or the metrics could not be written, and whatever one rank fails with, at any place (train::together), as
    /// in all calls below. Before the weights change the step is then as if it had never begun, and the run can go on; after is_broken() it cannot.
    StepMetrics step();
    /// Steps until `num_steps` more are done; `on_step` may return false to stop. Ends early when is_stopping().
    void train(int64_t num_steps, const std::function<bool(const StepMetrics&)>& on_step = {});
    /// The log line of the last step of some, where training.log_interval has left it out (rank 0).
    void say_left_out(const StepMetrics& m);
    /// Validation loss by domain; the router's counts and biases do not move. With `trace`, decisions are recorded, of all ranks on every rank. max_batches 0 = config's.
    Evaluation evaluate(routing::Trace* trace = nullptr, int64_t max_batches = 0);

    /// Saves the state and waits until it is on the disk: "" as checkpoints/step_N, a name as checkpoints/<name>, which is never
    /// pruned, a path where there is a "/". Returns the checkpoint's folder. Throws moe::Error (usage, io).
    std::string save(const std::string& name = "");
    /// Saves where checkpointing.save_on_exit wants it and this step is not saved yet, and says whether it did: for a run that is
    /// interrupted between steps.
    bool save_on_exit();
    /// Whether save_on_exit() has something to save.
    bool would_save_on_exit() const;
    /// True once a stop was asked for (request_stop(), or a file `stop` in the run's folder) and the state was saved.
    bool is_stopping() const { return is_stopping_; }
    /// Waits for the last save and gives the folder free for another run; no step is possible afterwards. Throws the save's moe::Error.
    void close();
    bool is_closed() const { return is_closed_; }
    /// What close() does on this rank, and the wait alone, without a collective: the caller brings the ranks together.
    void close_here();
    void wait_here() { checkpoints_->finish_here(); }
    /// How often the run was resumed.
    int64_t attempt() const { return attempt_; }

    /// Does an intervention (train/interventions.h), between steps: an event of the log that the state carries on. Throws moe::Error as
    /// Interventions::apply, (state) inside of a step.
    Change intervene(const std::string& what, const Values& args);
    Change set_parameter(const std::string& name, const Tensor& value);
    /// Takes one back; id 0: the latest. An event as well.
    Change undo(int64_t id = 0);
    const Interventions& interventions() const { return *interventions_; }
    /// Keys of the configuration that may change between steps.
    static const std::vector<std::string>& live_keys();
    /// Every event so far that belongs to this state, oldest first: lines of events.jsonl.
    const std::vector<std::string>& events() const { return events_; }
    /// The configuration that step 0 began with.
    const Config& first_config() const { return first_config_; }
    /// Does again what events (of another run with the same first configuration) say at the run's present step. Throws moe::Error (state)
    /// Throws (state) where replay() of the event would, before anything has been done.
    static void check_replayable(const Values& event, const ScriptCompiler& compiler);
    /// for one that was not stored.
    void replay(const Values& event);
    /// Goes back, or forward, to the state of a checkpoint of the same model, in place: weights, optimizer, data, interventions and keys
    /// that may change. Steps from here on belong to the next attempt. Throws moe::Error as find_checkpoint and load_state.
    void restore_from(const std::string& what);
    /// Where a step asks between its segments, and an evaluation between its batches, whether to give up: null for never. What was given up is
    /// undone and throws moe::Error (interrupted). On several ranks a step ends first, and was_interrupted() tells.
    void set_interrupt(const std::atomic<bool>* flag);
    /// Several ranks: during the last step one of them was interrupted. The same on all.
    bool was_interrupted() const { return was_interrupted_; }
    /// True where a failure has left the state half changed, or changed on some ranks only: until restore_from() whatever needs it throws moe::Error (state).
    bool is_broken() const { return is_broken_; }
    /// Held by whoever steps or touches the run while another thread may do so.
    StepEdge& edge() { return edge_; }
    /// Somebody else has added to the main gradients: the next step begins with none.
    void forget_grads() { has_foreign_grads_ = true; }
    /// Learning rate of the next step.
    double next_learning_rate() const;

    const Config& config() const { return config_; }
    Model& model() { return *model_; }
    int64_t current_step() const { return step_; }        ///< steps done; may be asked while another thread trains
    int64_t num_steps() const { return num_steps_; }      ///< length of the run by the configuration
    const std::string& folder() const { return folder_; } ///< "" without one
    LossScale& loss_scale() { return loss_scale_; }       ///< part of a run's state under fp16
    const std::vector<std::string>& domains() const { return loader_->domains(); }
    /// Counts of the last step, int64 [L, E] and [L, D, E], and what capacity dropped of them, [L, E]. MTP modules follow the layers.
    Tensor last_counts() const { return last_counts_; }
    Tensor last_counts_by_domain() const { return last_counts_by_domain_; }
    Tensor last_dropped() const { return last_dropped_; }
    /// Segments joined in one graph instead of scheduled; weight gradients deferred. For tests of their equality.
    void set_mode(Mode mode) { mode_ = mode; }
    void set_defer(bool defer) { defer_ = defer; }

private:
    std::vector<double> count_targets(const data::Batch& batch) const;
    double noise_std() const;
    data::Batch next_batch();
    std::vector<MicroBatch> load_batch(const data::Batch& batch);
    StepMetrics step_on_all();
    void build();
    Evaluation evaluate_on_all(routing::Trace* trace, int64_t max_batches);
    void compute(std::vector<MicroBatch>& batches);
    void compute_on_all(std::vector<MicroBatch>& batches);
    bool computes_alone() const;
    Tensor losses_of(const std::vector<MicroBatch>& batches) const;
    void sum_losses(Tensor sums, StepMetrics& m);
    void take_counts();
    /// The first tensor with a gradient that is not finite.
    struct NonFinite {
        std::string name;                                   ///< "" for none
        bool is_here = false;                               ///< of this rank
    };
    struct Applied {
        NonFinite first;                                    ///< of a step that was skipped
        bool lowered_scale = false;
    };
    Applied apply(StepMetrics& m);
    void balance(const Tensor& counts);
    NonFinite find_non_finite();
    void report_skip(const StepMetrics& m, const NonFinite& first);
    std::vector<int64_t> routed_layers() const;
    void record(const StepMetrics& m);
    void validate_at_interval();
    void say(const std::string& line, const std::string& json);
    bool is_logged(int64_t step) const { return step == 1 || step % config_.training.log_interval == 0; }
    // run_together.cpp
    enum class Reached { begin, changing, end };
    struct StepBegin;
    void on_all(const std::function<void()>& f);
    void check_whole(const std::string& op) const;
    StepBegin step_begin() const;
    void go_back(StepBegin begin);
    void free_groups();
    // run_interventions.cpp
    Values change_config(const Values& changes);
    void check_between_steps(const std::string& op) const;
    void log_change(const std::string& event, const Change& change, const Values& args);
    void open_global_load();
    int64_t num_steps_of_config() const;
    data::Batch scripted_batch(int64_t sequences, int64_t first, int64_t count) const;
    void update_by_script(double lr, double norm, double scale);
    void make_scripted_biases();
    void throw_if_interrupted() const;
    // run_saving.cpp
    void find_resumed();
    void keep_live_changes(const store::Checkpoint& checkpoint);
    void restore();
    void restore_state(const store::Checkpoint& checkpoint);
    void restore_on_all(const std::string& what);
    void open_folder(const std::string& device);
    nlohmann::json state() const;
    void check_open(const std::string& op) const;
    void begin_periodic_save();
    void at_edge();
    void add_event(const std::string& event, const nlohmann::ordered_json& facts);
    void write_on_rank_0(const std::function<void()>& f);
    void settle_writes();
    Config config_, first_config_;
    RunOptions options_;
    StopListener stop_listener_;
    std::string folder_, log_path_;
    std::vector<std::string> events_;                       ///< lines of events.jsonl that belong to this state
    dist::Mesh mesh_;
    std::unique_ptr<data::Loader> loader_;
    std::unique_ptr<Model> model_;
    std::unique_ptr<routing::Ledger> ledger_;
    std::unique_ptr<routing::GlobalLoad> global_load_;      ///< where that loss is on
    std::unique_ptr<Executor> executor_;
    std::unique_ptr<StepGraph> graph_;                      ///< where steps are replayed
    std::unique_ptr<store::FolderLock> lock_;               ///< rank 0's; outlives what writes to the folder
    std::unique_ptr<metrics::Writer> metrics_;
    std::exception_ptr write_error_;                        ///< rank 0's, until all ranks know
    std::unique_ptr<store::Checkpoint> resumed_;            ///< while the run is being built
    std::unique_ptr<Checkpointing> checkpoints_;
    int64_t attempt_ = 0, saved_step_ = -1;
    bool is_stopping_ = false, is_closed_ = false;
    Mode mode_ = Mode::scheduled;
    bool defer_ = false;
    LossScale loss_scale_;
    std::unique_ptr<Interventions> interventions_;
    Values live_changes_ = Values::object();                    ///< keys that were changed between steps, with the first configuration's values
    StepEdge edge_;
    const std::atomic<bool>* interrupt_ = nullptr;
    const std::atomic<bool>* edge_interrupt_ = nullptr;      ///< the same on several ranks, looked at after a step
    Reached reached_ = Reached::begin;                      ///< by what on_all() runs
    bool is_on_all_ = false, is_broken_ = false;
    bool is_in_step_ = false, has_foreign_grads_ = false, was_interrupted_ = false;
    std::map<int64_t, Tensor> scripted_biases_;             ///< by layer: what the step at hand ends with
    std::atomic<int64_t> step_ = 0;
    int64_t updates_ = 0, num_steps_ = 0, tokens_ = 0, step_tokens_ = 0, skipped_ = 0, skipped_in_a_row_ = 0;
    double flops_per_token_ = 0, peak_flops_ = 0;
    Tensor last_counts_, last_counts_by_domain_, last_dropped_;
};

}  // namespace moe::train
