#include "core/train/schedule.h"

#include "core/base/error.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace moe::train {
namespace {
constexpr double kStableRatio = 0.1;
/// DeepSeek-V3's 14.8 T tokens, and where its phases end.
constexpr double kV3Tokens = 14.8, kV3Stable = 10.0, kV3Cosine = 14.3, kV3Low = 14.633, kV3Lowest = 7.3 / 22;

double cosine(double top, double low, double progress) { return low + (top - low) * 0.5 * (1 + std::cos(std::numbers::pi * progress)); }

/// Shares are of steps: phase boundaries need not fall on one.
double deepseek_v3(const TrainingConfig& c, int64_t step, int64_t num_steps) {
    double top = c.learning_rate, low = c.min_learning_rate, unit = double(num_steps) / kV3Tokens, at = double(std::min(step, num_steps - 1));
    double begin = std::max(kV3Stable * unit, double(c.lr_warmup_steps)), end = kV3Cosine * unit;
    if (at < begin) return top;
    if (at < end) return cosine(top, low, (at - begin) / (end - begin));
    return at < kV3Low * unit ? low : low * kV3Lowest;
}

/// First step of the decay.
int64_t decay_start(const TrainingConfig& c, int64_t num_steps) {
    auto ratio = c.lr_decay_ratio;
    if (!ratio && c.lr_decay_style == "wsd") ratio = kStableRatio;
    if (!ratio) return c.lr_warmup_steps;
    return std::max(c.lr_warmup_steps, num_steps - int64_t(std::llround(*ratio * double(num_steps))));
}

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

/// Sequences that ranks compute at once; checks what must be a multiple of it.
int64_t sequences_at_once(const TrainingConfig& c, int64_t data_parallel) {
    int64_t unit = c.micro_batch_size * data_parallel;
    if (!c.dynamic_batch_tokens) c.micro_batches(data_parallel);
    if (c.batch_size_ramp)
        MOE_CHECK(c.batch_size_ramp->start % unit == 0, config, "training.batch_size_ramp.start", fmt::format("{}", c.batch_size_ramp->start),
                  fmt::format("a multiple of micro_batch_size × data-parallel ranks = {} × {}", c.micro_batch_size, data_parallel), "");
    return unit;
}

/// The ramp at a number of tokens.
int64_t ramped(const TrainingConfig& c, int64_t tokens_seen, int64_t unit) {
    const BatchSizeRamp& ramp = *c.batch_size_ramp;
    if (tokens_seen >= ramp.tokens) return c.global_batch_size;
    auto n = int64_t(ramp.start + __int128(c.global_batch_size - ramp.start) * tokens_seen / ramp.tokens);
    return n / unit * unit;
}

/// Tokens that a step of dynamic_batch_tokens counts as.
int64_t dynamic_step(const Config& config, int64_t unit) {
    const TrainingConfig& c = config.training;
    if (!config.data.packing) return *c.dynamic_batch_tokens;
    return round_up(round_up(*c.dynamic_batch_tokens, c.seq_length) / c.seq_length, unit) * c.seq_length;
}

int64_t steps_of_ramp(const TrainingConfig& c, double tokens, int64_t unit) {
    int64_t steps = 0, seen = 0;
    for (; seen < c.batch_size_ramp->tokens && double(seen) < tokens; ++steps) seen += ramped(c, seen, unit) * c.seq_length;
    double left = std::max(0.0, tokens - double(seen));
    return steps + int64_t(std::ceil(left / double(c.tokens_per_step())));
}
}  // namespace

double learning_rate(const TrainingConfig& c, int64_t step, int64_t num_steps) {
    double top = c.learning_rate, low = c.min_learning_rate;
    if (step < c.lr_warmup_steps) return top * double(step + 1) / double(c.lr_warmup_steps);
    if (c.lr_decay_style == "constant") return top;
    if (c.lr_decay_style == "deepseek_v3") return deepseek_v3(c, step, num_steps);
    int64_t start = decay_start(c, num_steps);
    if (step < start) return top;
    double progress = std::clamp(double(step - start) / double(std::max<int64_t>(1, num_steps - 1 - start)), 0.0, 1.0);
    if (c.lr_decay_style == "linear" || c.lr_decay_style == "wsd") return top + (low - top) * progress;
    if (c.lr_decay_style == "cosine") return cosine(top, low, progress);
    MOE_THROW(config, "training.lr_decay_style", c.lr_decay_style, "cosine, linear, constant, wsd or deepseek_v3", "");
}

int64_t sequences_of_step(const TrainingConfig& c, int64_t tokens_seen, int64_t data_parallel, data::Loader& loader) {
    int64_t unit = sequences_at_once(c, data_parallel);
    if (c.dynamic_batch_tokens) return loader.sequences_for_tokens(*c.dynamic_batch_tokens, unit);
    return c.batch_size_ramp ? ramped(c, tokens_seen, unit) : c.global_batch_size;
}

std::optional<int64_t> num_steps(const Config& config, int64_t parameters, int64_t data_parallel) {
    const TrainingConfig& c = config.training;
    int64_t unit = sequences_at_once(c, data_parallel);
    if (c.train_steps || (!c.batch_size_ramp && !c.dynamic_batch_tokens)) return c.total_steps(parameters);
    double tokens = c.total_training_tokens ? double(*c.total_training_tokens) : c.tokens_per_parameter_ratio.value_or(0) * double(parameters);
    if (tokens <= 0) return std::nullopt;
    if (c.batch_size_ramp) return steps_of_ramp(c, tokens, unit);
    return int64_t(std::ceil(tokens / double(dynamic_step(config, unit))));
}

int64_t num_tokens(const Config& config, int64_t steps, int64_t data_parallel) {
    const TrainingConfig& c = config.training;
    int64_t unit = sequences_at_once(c, data_parallel), seen = 0;
    if (c.dynamic_batch_tokens) return steps * dynamic_step(config, unit);
    for (; c.batch_size_ramp && steps > 0 && seen < c.batch_size_ramp->tokens; --steps) seen += ramped(c, seen, unit) * c.seq_length;
    return seen + steps * c.tokens_per_step();
}

}  // namespace moe::train
