#include "core/train/optimizer.h"

#include "core/base/error.h"
#include "core/kernels/adamw/adamw.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <cmath>
#include <numbers>

namespace moe::train {

double learning_rate(const TrainingConfig& c, int64_t step, int64_t num_steps) {
    double top = c.learning_rate, low = c.min_learning_rate;
    if (step < c.lr_warmup_steps) return top * double(step + 1) / double(c.lr_warmup_steps);
    if (c.lr_decay_style == "constant") return top;
    int64_t start = c.lr_warmup_steps;
    if (c.lr_decay_ratio) start = std::max(start, num_steps - int64_t(std::llround(*c.lr_decay_ratio * double(num_steps))));
    if (step < start) return top;
    double progress = std::clamp(double(step - start) / double(std::max<int64_t>(1, num_steps - 1 - start)), 0.0, 1.0);
    if (c.lr_decay_style == "linear") return top + (low - top) * progress;
    if (c.lr_decay_style == "cosine") return low + (top - low) * 0.5 * (1 + std::cos(std::numbers::pi * progress));
    MOE_THROW(config, "training.lr_decay_style", c.lr_decay_style, "cosine, linear or constant", "the others are not built yet (row B3)");
}

int num_moments(const std::string& optimizer) {
    if (optimizer == "adamw") return 2;
    if (optimizer == "sgd") return 0;
    MOE_THROW(config, "training.optimizer", optimizer, "adamw or sgd", "the others are not built yet (row B2)");
}

double grad_norm(ParamStore& store, const dist::Group& world) {
    double sum = 0;
    for (auto& b : store.buckets())
        if (b.norm_end > b.norm_begin) sum += kernels::sum_of_squares(b.grad_of(b.norm_begin, b.norm_end)).item<double>();
    return std::sqrt(world.all_reduce(sum));
}

namespace {
/// A piece of a bucket's own part: views of one range.
struct Piece { Tensor master, grad, value, m, v; };
Piece piece(const Bucket& b, const Range& r) {
    int64_t at = r.begin - b.own_begin, n = r.end - r.begin;
    Piece p{b.master.narrow(0, at, n), b.grad_of(r.begin, r.end), {}, {}, {}};
    if (b.value.scalar_type() != b.master.scalar_type()) p.value = b.value_of(r.begin, r.end);
    if (b.state.size() == 2) {
        p.m = b.state[0].narrow(0, at, n);
        p.v = b.state[1].narrow(0, at, n);
    }
    return p;
}
}  // namespace

void update(ParamStore& store, const TrainingConfig& c, double lr, double norm, int64_t step) {
    at::NoGradGuard no_grad;
    double scale = c.grad_clip > 0 && norm > c.grad_clip ? c.grad_clip / norm : 1;
    for (auto& b : store.buckets())
        for (auto& r : b.ranges) {
            if (r.frozen) continue;
            Piece p = piece(b, r);
            double decay = r.decay ? c.weight_decay : 0;
            if (c.optimizer == "sgd") kernels::sgd(p.master, p.grad, p.value, lr * r.lr_scale, decay, scale);
            else kernels::adamw(p.master, p.grad, p.m, p.v, p.value, {lr * r.lr_scale, c.adam_beta1, c.adam_beta2, c.adam_eps, decay, scale, step});
        }
    store.gather_values();
    store.zero_grads();
}

}  // namespace moe::train
