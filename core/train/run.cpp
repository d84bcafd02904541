#include "core/train/run.h"

#include "core/base/error.h"
#include "core/base/log.h"
#include "core/config/load.h"
#include "core/data/tokenizer.h"
#include "core/metrics/statistics.h"
#include "core/plan/count.h"
#include "core/routing/balance.h"
#include "core/train/agree.h"
#include "core/train/hardware.h"
#include "core/train/optimizer.h"
#include "core/train/recompute.h"
#include "core/train/run_folder.h"
#include "core/train/run_together.h"
#include "core/train/schedule.h"

#include <ATen/ATen.h>
#include <ATen/record_function.h>
#include <c10/util/Exception.h>
#include <nlohmann/json.hpp>

#include <chrono>
#include <cmath>
#include <optional>
#include <span>
#include <utility>

namespace moe::train {
namespace {
/// The configuration with what follows from elsewhere filled in.
Config resolved(Config c) {
    if (!c.model.vocab_size) c.model.vocab_size = data::open_tokenizer(c.data.tokenizer)->vocab_size();
    validate(c);
    require_built(c);
    return c;
}

/// The same on all ranks, or an error on all: what it reads may be missing on one.
Config resolved(const Config& c, const dist::Group& world) {
    Config out;
    agree(world, [&] { out = resolved(c); });
    return out;
}

/// A copy of t on the host; of a GPU's tensor it is there after the next wait for the device.
Tensor to_host(const Tensor& t) {
    return t.is_cpu() ? t.clone() : t.to(t.options().device(at::kCPU).pinned_memory(true), /*non_blocking=*/true);
}

double max_vio(const Tensor& counts_LE, const std::vector<int64_t>& layers) {
    double worst = 0;
    for (int64_t layer : layers) {
        Tensor c = counts_LE[layer].contiguous();
        worst = std::max(worst, metrics::load_statistics(std::span(c.const_data_ptr<int64_t>(), size_t(c.numel()))).max_vio);
    }
    return worst;
}
}  // namespace

std::string StepMetrics::line() const {
    return fmt::format("step: {} loss: {:.5f} grad_norm: {:.4f} lr: {:.1e} tps: {:.0f} tflops: {:.2f} mfu: {:.1f}% memory: {:.2f}GiB maxvio: {:.2f}{}", step, loss, grad_norm, lr,
                       tokens_per_sec, tflops, 100 * mfu, memory_gib, max_vio, skipped ? " skipped: not finite" : "");
}

std::string StepMetrics::json() const {
    nlohmann::ordered_json j = {{"step", step}, {"loss", loss}, {"grad_norm", grad_norm}, {"lr", lr}, {"tps", tokens_per_sec}, {"tflops", tflops}, {"mfu", mfu},
                                {"memory", memory_gib}, {"maxvio", max_vio}, {"mtp_loss", mtp_loss}, {"balance_loss", balance_loss}, {"drop_rate", drop_rate}, {"tokens", tokens}, {"step_secs", step_secs}, {"skipped", skipped}};
    return j.dump();
}

Run::Run(const Config& config, const RunOptions& options, const dist::Group& world)
    : config_(resolved(config, world)), options_(options) {
    dist::Group own = world.duplicate();               // groups of its own: another run may train in another thread
    try {
        mesh_ = dist::make_mesh(config_.distributed, own);
        on_all([&] { build(); });
    } catch (...) {                                    // all ranks are here, and the exception is caught: groups can be freed
        free_groups();
        own = {};
        throw;
    }
}

void Run::build() {
    bool alone = mesh_.world.size() == 1;
    if (!config_.training.dynamic_batch_tokens) config_.training.micro_batches(mesh_.dp.size());      // throws where it does not divide
    MOE_CHECK(alone || config_.device.value_or("cpu") == "cpu", device, "device", fmt::format("cuda on {} ranks", mesh_.world.size()), "one rank on a GPU, or device=cpu",
              "several GPUs need a communication library that is not built yet");
    at::Device device = choose_device(alone ? config_.device.value_or("") : "cpu");
    find_resumed();
    Precision precision = precision_of(config_.training);
    num_steps_ = train::num_steps(config_, plan::count(config_.model).total, mesh_.dp.size()).value_or(0);
    loader_ = data::open_loader(config_, /*validation=*/false);
    MOE_CHECK(num_steps_ > 0, config, "training.train_steps", "null", "a length of the run", "set training.train_steps, total_training_tokens or tokens_per_parameter_ratio");
    if (config_.deterministic) at::globalContext().setDeterministicAlgorithms(true, /*warn_only=*/false);
    model_ = std::make_unique<Model>(config_, mesh_, ModelOptions{precision, device, true, num_moments(config_.training)});
    loss_scale_ = LossScale(config_.training.use_fp16);
    int64_t layers = config_.model.num_layers + config_.training.mtp_depth(), E = config_.model.moe.num_experts;
    ledger_ = std::make_unique<routing::Ledger>(layers, E, int64_t(loader_->domains().size()), device);
    interventions_ = std::make_unique<Interventions>(*model_);
    interventions_->set_compiler(options_.compiler);
    interventions_->set_config_changer([this](const Values& changes) { return change_config(changes); });
    first_config_ = config_;
    open_global_load();
    executor_ = std::make_unique<Executor>(*model_);
    executor_->set_recompute(recompute_spans(*model_, config_.training.gradient_checkpointing, recomputed_segments(config_, mesh_.world, options_.memory_bytes > 0 ? options_.memory_bytes : obtainable_memory_bytes(device))));
    std::string obstacle;
    bool can_replay = StepGraph::takes(config_, model_->options(), mesh_.world.size(), &obstacle);
    MOE_CHECK(can_replay || config_.training.compile_graphs != "on", config, "training.compile_graphs", "on", "a step that can be recorded", "in the way: " + obstacle + "; auto replays where it can");
    if (can_replay && (config_.training.compile_graphs == "on" || (config_.training.compile_graphs == "auto" && StepGraph::pays(config_)))) graph_ = std::make_unique<StepGraph>(*executor_, *model_);
    flops_per_token_ = plan::flops_per_token(config_.model, config_.training.seq_length, plan::FlopsRule::causal, config_.training.mtp_depth());
    peak_flops_ = peak_flops(device, precision) * mesh_.world.size();
    if (resumed_) restore();
    else if (config_.training.init_from) load_weights(*model_, *config_.training.init_from);
    try {
        open_folder(device_name(device));
    } catch (...) {                                    // there will be no ~Run
        log::close_file(log_path_);
        throw;
    }
    resumed_.reset();
}

Run::~Run() {
    if (!folder_.empty()) log::close_file(log_path_);
}

/// Layers with a router of the whole model, MTP modules included.
std::vector<int64_t> Run::routed_layers() const {
    std::vector<int64_t> layers;
    for (int64_t layer = 0; layer < config_.model.num_layers + config_.training.mtp_depth(); ++layer)
        if (config_.model.is_moe_layer(layer)) layers.push_back(layer);
    return layers;
}

/// What a step's losses are divided by, over all ranks: valid targets, tokens that count, valid targets of each MTP module.
/// Throws moe::Error (data) where no token has a next one.
std::vector<double> Run::count_targets(const data::Batch& batch) const {
    int64_t depth = config_.training.mtp_depth();
    Tensor totals = at::zeros({2 + depth}, at::kLong);
    totals[0] = batch.num_valid();
    totals[1] = batch.domain.ge(0).sum();
    for (int64_t k = 1; k <= depth; ++k) totals[1 + k] = Model::num_mtp_targets(batch.targets, batch.doc_start, k);
    mesh_.dp.all_reduce(totals);
    MOE_CHECK(totals[0].item<int64_t>() > 0, data, "training data", "a step without a single target", "at least one token with a next token", "are all documents one token long?");
    totals = totals.to(at::kDouble);
    return {totals.const_data_ptr<double>(), totals.const_data_ptr<double>() + totals.numel()};
}

/// Deviation of the router's noise in the next step: falls linearly to 0.
double Run::noise_std() const {
    auto& c = config_.model.moe;
    double steps = double(c.router_noise_anneal_steps.value_or(num_steps_));
    return c.router_noise_std * std::max(0.0, 1 - double(step_) / std::max(steps, 1.0));
}

/// This rank's sequences of the next step.
data::Batch Run::next_batch() {
    auto& t = config_.training;
    int64_t sequences = sequences_of_step(t, tokens_, mesh_.dp.size(), *loader_), mine = sequences / mesh_.dp.size(), first = mesh_.dp.rank() * mine;
    step_tokens_ = sequences * t.seq_length;
    return interventions_->controls().data ? scripted_batch(sequences, first, mine) : loader_->next(sequences, first, mine);
}

/// This rank's micro-batches of the next step, their losses scaled so that the sum over micro-batches and ranks is the mean.
std::vector<MicroBatch> Run::load_batch(const data::Batch& batch) {
    auto& t = config_.training;
    int64_t mine = batch.ids.size(0), first = mesh_.dp.rank() * mine, per = t.micro_batch_size;
    std::vector<double> totals = count_targets(batch);
    std::vector<MicroBatch> out;
    for (int64_t row = 0; row < mine; row += per) {
        auto rows = [&](const Tensor& x) { return x.narrow(0, row, per); };
        out.push_back(model_->micro_batch(rows(batch.ids), rows(batch.targets), rows(batch.domain), rows(batch.doc_start), config_.data.packing && config_.data.document_mask));
        MicroBatch& b = out.back();
        b.first_token += (first + row) * t.seq_length;
        b.step = uint32_t(step_);
        b.training = true;
        b.gradient_scale = loss_scale_.value();
        b.loss_scale = b.gradient_scale / totals[0];
        b.token_share = 1 / totals[1];
        b.noise_std = noise_std();
        for (size_t k = 0; k < b.mtp.size(); ++k) b.mtp[k].loss_scale = b.gradient_scale * t.mtp_loss_weight / (double(b.mtp.size()) * std::max(1.0, totals[2 + k]));
        b.ledger = ledger_.get();
        b.global_load = global_load_.get();
    }
    return out;
}

/// Forward and backward of all micro-batches by this stage's program.
void Run::compute(std::vector<MicroBatch>& batches) {
    if (global_load_) global_load_->clear();
    try {
        if (mode_ == Mode::attached) executor_->run_attached(batches);
        else {
            Program program = schedule(config_.distributed.pipeline_schedule, {int(model_->segments().size()), int(batches.size()), mesh_.pp.rank(), mesh_.num_stages(), defer_});
            graph_ && !model_->has_interventions() ? graph_->run(program, batches) : executor_->execute(program, batches);
        }
    } catch (const c10::OutOfMemoryError& e) {
        release_cached_memory(model_->options().device);
        std::string text = e.what_without_backtrace();
        MOE_THROW(memory, fmt::format("step {}", current_step() + 1), text.substr(0, std::min(text.find(" Of the allocated"), text.find('\n'))), "a step that fits",
                  "lower training.micro_batch_size (more of them make up for it) or seq_length, or set training.gradient_checkpointing to selective or full; the step is undone, the run can go on");
    }
}

/// True where forward and backward have no collectives: a rank that fails there leaves nobody waiting.
bool Run::computes_alone() const { return mesh_.tp.size() * mesh_.pp.size() * mesh_.ep.size() * mesh_.cp.size() == 1 && config_.distributed.zero_stage < 3 && !global_load_; }

/// compute(), where an error that a hook kept is thrown on all.
void Run::compute_on_all(std::vector<MicroBatch>& batches) {
    bool alone = computes_alone();
    HookFailures::Kept kept(options_.compiler.failures, mesh_.world.size() > 1);
    if (!alone) compute(batches);
    agree(mesh_.world, [&] {
        if (alone) compute(batches);
        kept.rethrow();
    });
}

/// Moves this stage's selection biases by the step's global counts.
void Run::balance(const Tensor& counts_LE) {
    auto& c = config_.model.moe;
    if (!c.use_aux_loss_free || (c.bias_freeze_step && step_ >= *c.bias_freeze_step)) return;
    for (int64_t layer : model_->routed_layers()) {
        const routing::Intervention* change = model_->intervention(layer);
        if (change && change->bias_frozen) continue;
        if (auto next = scripted_biases_.find(layer); next != scripted_biases_.end()) model_->bias(layer).copy_(next->second);
        else routing::update_bias(model_->bias(layer), counts_LE[layer], c.bias_update_speed, c.bias_update_rule);
    }
}

/// The first tensor with a gradient that is not finite. Under ZeRO, pipeline and expert parallel it may be on another rank only, which
/// then names it in its own log. A collective.
Run::NonFinite Run::find_non_finite() {
    std::string name = model_->store().first_non_finite();
    int64_t ranks = mesh_.world.size(), rank = mesh_.world.rank(), first = mesh_.world.all_reduce(name.empty() ? ranks : rank, dist::ReduceOp::min);
    return {first == rank ? name : first < ranks ? fmt::format("a tensor of rank {}, see its log", first) : "", first == rank};
}

/// A step that was not updated from, once it is done: a warning and an event.
void Run::report_skip(const StepMetrics& m, const NonFinite& first) {
    auto shown = [](double x) { return std::isnan(x) ? std::abs(x) : x; };      // a nan's sign says nothing
    if (mesh_.world.rank() == 0 || first.is_here) log::warn(fmt::format("step {}: loss {} and gradient norm {}: skipped{}", m.step, shown(m.loss), shown(m.grad_norm), first.name.empty() ? "" : "; first in " + first.name));
    add_event("skip", {{"step", m.step - 1}, {"first", first.name}});
}

/// This rank's losses by name, float64 [4], on their way to the host.
Tensor Run::losses_of(const std::vector<MicroBatch>& batches) const {
    const char* names[] = {"loss", "mtp", "balance", "z"};
    std::vector<Tensor> by_name(4, at::zeros({}, at::TensorOptions().dtype(at::kDouble).device(model_->options().device)));
    for (auto& batch : batches)
        for (int i = 0; i < 4; ++i)
            if (auto it = batch.losses.find(names[i]); it != batch.losses.end()) by_name[size_t(i)] = by_name[size_t(i)] + it->second;
    return to_host(at::stack(by_name));
}

/// The losses of all ranks' micro-batches.
void Run::sum_losses(Tensor sums, StepMetrics& m) {
    mesh_.world.all_reduce(sums);
    auto sum = [&](int i) { return sums[i].item<double>(); };
    m.loss = sum(0);
    m.mtp_loss = sum(1);
    m.balance_loss = sum(2) + sum(3);
}

/// The step's counts, summed over the ranks, out of the ledger and on their way to the host.
void Run::take_counts() {
    RECORD_USER_SCOPE("counts");
    ledger_->reduce(mesh_.world);
    last_counts_by_domain_ = to_host(ledger_->counts_by_domain());
    last_dropped_ = to_host(ledger_->dropped());
    ledger_->clear();
}

/// Moves the weights, or skips the step where loss or norm is not finite, and gives the tensor that was so first.
Run::Applied Run::apply(StepMetrics& m) {
    RECORD_USER_SCOPE("optimizer");
    double scale = loss_scale_.value();
    m.skipped = !std::isfinite(m.loss + m.mtp_loss + m.balance_loss) || !std::isfinite(m.grad_norm);
    bool lowered = loss_scale_.update(std::isfinite(m.grad_norm));
    if (m.skipped) {
        NonFinite first = find_non_finite();
        model_->store().zero_grads();
        ++skipped_in_a_row_;
        ++skipped_;
        return {first, lowered};
    }
    skipped_in_a_row_ = 0;
    if (interventions_->controls().optimizer) {
        update_by_script(m.lr, m.grad_norm, scale);
    } else {
        reached_ = Reached::changing;
        update(model_->store(), config_.training, m.lr, m.grad_norm, updates_ + 1, scale);
    }
    ++updates_;
    return {{}, lowered};
}

StepMetrics Run::step() {
    check_between_steps("run:train");
    check_whole("run:train");
    struct InStep {
        bool& flag;
        ~InStep() { flag = false; }
    } in_step{is_in_step_};
    is_in_step_ = true;
    std::optional<StepBegin> begin;
    bool has_begun = false;                           // on all ranks or on none: going back is a call of all
    StepMetrics m;
    try {
        on_all([&] {
            agree(mesh_.world, [&] { begin = step_begin(); });
            has_begun = true;
            m = step_on_all();
        });
    } catch (...) {
        if (has_begun) go_back(*begin);
        throw;
    }
    return m;
}

StepMetrics Run::step_on_all() {
    if (std::exchange(has_foreign_grads_, false)) model_->store().zero_grads();
    auto start = std::chrono::steady_clock::now();
    was_interrupted_ = false;
    StepMetrics m;
    std::vector<MicroBatch> batches;
    {
        RECORD_USER_SCOPE("data");
        data::Batch batch;
        agree(mesh_.world, [&] {                      // before the step's first collective
            m.lr = next_learning_rate();
            batch = next_batch();
        });
        batches = load_batch(batch);
    }
    compute_on_all(batches);
    // On a GPU the norm is what the host waits for, once; what it needs besides is on its way by then. Between the norm and the update the device has nothing to do, so the host
    // does the rest while the update runs.
    model_->store().reduce_grads();
    Tensor losses = losses_of(batches);
    take_counts();
    m.grad_norm = grad_norm(model_->store(), mesh_.world) / loss_scale_.value();
    sum_losses(losses, m);
    last_counts_ = last_counts_by_domain_.sum(1);
    if (interventions_->controls().bias_rule) agree(mesh_.world, [&] { make_scripted_biases(); });
    else make_scripted_biases();
    Applied applied = apply(m);
    m.drop_rate = double(last_dropped_.sum().item<int64_t>()) / double(std::max<int64_t>(1, last_counts_.sum().item<int64_t>()));
    m.max_vio = max_vio(last_counts_, routed_layers());
    if (!m.skipped) balance(last_counts_);
    m.step = ++step_;
    m.tokens = tokens_ += step_tokens_;
    reached_ = Reached::end;
    // What is said of a step comes after it is one: before, it may still be undone and made again.
    if (applied.lowered_scale && mesh_.world.rank() == 0) log::warn(fmt::format("step {}: the loss scale is lowered to {}", m.step, loss_scale_.value()));
    if (m.skipped) report_skip(m, applied.first);
    m.memory_gib = peak_memory_bytes(model_->options().device) / double(1 << 30);
    m.step_secs = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    m.tokens_per_sec = double(step_tokens_) / m.step_secs;
    m.tflops = m.tokens_per_sec * flops_per_token_ * 1e-12;
    m.mfu = peak_flops_ > 0 ? m.tflops * 1e12 / peak_flops_ : 0;
    record(m);
    MOE_CHECK(skipped_in_a_row_ < config_.training.max_skipped_steps, state, "training", fmt::format("{} steps in a row whose loss or gradient is not finite", skipped_in_a_row_), "finite numbers",
              "lower training.learning_rate, raise lr_warmup_steps, or look at the data");
    validate_at_interval();
    at_edge();
    return m;
}

void Run::record(const StepMetrics& m) {
    if (mesh_.world.rank() != 0) return;
    if (metrics_) write_on_rank_0([&] {
        metrics_->scalars(m.step, attempt_, {{"loss", m.loss}, {"grad_norm", m.grad_norm}, {"lr", m.lr}, {"tps", m.tokens_per_sec}, {"tflops", m.tflops}, {"mfu", m.mfu},
                                      {"memory_gib", m.memory_gib}, {"max_vio", m.max_vio}, {"mtp_loss", m.mtp_loss}, {"balance_loss", m.balance_loss}, {"drop_rate", m.drop_rate}, {"tokens", double(m.tokens)}, {"step_secs", m.step_secs}, {"skipped", double(m.skipped)}});
        auto& s = config_.logging.statistics;
        if (m.step % s.interval == 0) {
            Tensor c = last_counts_.contiguous();
            metrics_->matrix(m.step, attempt_, "counts", c.size(0), c.size(1), std::span(c.const_data_ptr<int64_t>(), size_t(c.numel())));
        }
    });
    if (is_logged(m.step)) say(m.line(), m.json());
}

void Run::say_left_out(const StepMetrics& m) {
    if (mesh_.world.rank() == 0 && !is_closed_ && !is_logged(m.step)) say(m.line(), m.json());
}

/// The validation loss by domain, every training.eval_interval steps.
void Run::validate_at_interval() {
    if (!config_.validation.enabled || step_ % config_.training.eval_interval) return;
    Evaluation e = evaluate();
    if (mesh_.world.rank() != 0) return;
    std::vector<std::pair<std::string, double>> values = {{"validation_loss", e.loss}};
    std::string line = fmt::format("validation: step: {} mean: {:.5f}", current_step(), e.loss);
    if (config_.validation.by_domain)
        for (auto& [name, loss] : e.by_domain) {
            values.emplace_back("validation_loss/" + name, loss);
            line += fmt::format(" {}: {:.5f}", name, loss);
        }
    for (size_t k = 0; k < e.acceptance.size(); ++k) {
        values.emplace_back(fmt::format("mtp_acceptance/{}", k + 1), e.acceptance[k]);
        line += fmt::format(" mtp_acceptance_{}: {:.3f}", k + 1, e.acceptance[k]);
    }
    if (metrics_) write_on_rank_0([&] { metrics_->scalars(step_, attempt_, values); });
    nlohmann::ordered_json json = {{"step", current_step()}};
    for (auto& [key, value] : values) json[key] = value;
    say(line, json.dump());
}

/// A line for the run's log file, and for standard output where the console is on.
void Run::say(const std::string& line, const std::string& json) {
    if (!folder_.empty()) log::to_file(line);
    if (!options_.console || !config_.logging.console) return;
    log::print((options_.json ? json : line) + "\n");
    std::fflush(stdout);
}

void Run::train(int64_t num_steps, const std::function<bool(const StepMetrics&)>& on_step) {
    for (int64_t i = 0; i < num_steps && !is_stopping_; ++i) {
        StepMetrics m = step();
        if (on_step && !on_step(m)) return;
    }
}

Evaluation Run::evaluate(routing::Trace* trace, int64_t max_batches) {
    check_whole("run:evaluate");
    Evaluation e;
    on_all([&] { e = evaluate_on_all(trace, max_batches); });
    return e;
}

Evaluation Run::evaluate_on_all(routing::Trace* trace, int64_t max_batches) {
    auto& t = config_.training;
    auto loader = data::open_loader(config_, /*validation=*/true);
    int64_t ranks = mesh_.dp.size(), per = t.micro_batch_size, D = int64_t(loader->domains().size());
    int64_t depth = t.mtp_depth();
    Tensor sum = at::zeros({2, D}, at::kDouble), accepted = at::zeros({2, depth}, at::kDouble);      // loss and tokens by domain; agreements and places by module
    if (trace) trace->set_domains(loader->domains());
    HookFailures::Kept kept(options_.compiler.failures, mesh_.world.size() > 1);
    for (int64_t i = 0; i < (max_batches > 0 ? max_batches : config_.validation.max_batches); ++i) {
        data::Batch b;
        agree(mesh_.world, [&] {
            kept.rethrow();
            throw_if_interrupted();
            b = loader->next(per * ranks, per * mesh_.dp.rank(), per);
        });
        MicroBatch batch = model_->micro_batch(b.ids, b.targets, b.domain, b.doc_start, config_.data.packing && config_.data.document_mask);
        Tensor losses;
        std::vector<Tensor> predicted;
        batch.token_loss = &losses;
        batch.trace = trace;
        if (depth > 0) batch.predicted = &predicted;
        if (trace) agree(mesh_.world, [&] { trace->begin(batch.ids_T, batch.domain_T, batch.S); });
        executor_->run_forward(batch);
        if (trace) trace->gather(mesh_);
        if (!mesh_.is_last()) continue;
        Tensor counted = batch.targets_T.ge(0).to(at::kCPU, at::kDouble), domain = batch.domain_T.to(at::kCPU, at::kLong).clamp_min(0);
        sum[0].scatter_add_(0, domain, losses.to(at::kCPU, at::kDouble) * counted);
        sum[1].scatter_add_(0, domain, counted);
        for (int64_t k = 1; k < int64_t(predicted.size()); ++k) {      // module k at i and the main head at i + k name the same token
            int64_t n = batch.ids_T.numel() - k;
            Tensor valid = batch.mtp[size_t(k - 1)].targets_T.narrow(0, 0, n).ge(0), same = predicted[size_t(k)].narrow(0, 0, n).eq(predicted[0].narrow(0, k, n)).logical_and(valid);
            accepted[0][k - 1] += same.sum().to(at::kCPU, at::kDouble);
            accepted[1][k - 1] += valid.sum().to(at::kCPU, at::kDouble);
        }
    }
    agree(mesh_.world, [&] { kept.rethrow(); });
    mesh_.world.all_reduce(sum);
    if (depth > 0) mesh_.world.all_reduce(accepted);
    Evaluation e;
    int64_t seen = 0;
    for (int64_t d = 0; d < D; ++d) {
        double tokens = sum[1][d].item<double>(), loss = tokens > 0 ? sum[0][d].item<double>() / tokens : std::nan("");
        e.by_domain.emplace_back(loader->domains()[size_t(d)], loss);
        e.num_tokens += int64_t(tokens);
        if (tokens > 0) {
            e.loss += loss;
            ++seen;
        }
    }
    e.loss /= double(std::max<int64_t>(1, seen));
    for (int64_t k = 0; k < depth; ++k) e.acceptance.push_back(accepted[0][k].item<double>() / std::max(1.0, accepted[1][k].item<double>()));
    return e;
}

}  // namespace moe::train
