#include "core/kernels/mla/attention.h"

#include "core/tensor/check.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <cmath>
#include <numbers>
#include <vector>

namespace moe::kernels {
namespace {
/// YaRN's m: 0.1 · mscale · ln(factor) + 1.
double magnitude(double factor, double mscale) { return factor <= 1 ? 1 : 0.1 * mscale * std::log(factor) + 1; }

/// The pair of the rotary embedding that turns `rotations` times within the original context.
double pair_of(double rotations, int64_t rope, double theta, int64_t context) {
    return double(rope) * std::log(double(context) / (2 * std::numbers::pi * rotations)) / (2 * std::log(theta));
}

/// Angle a position of every pair. With YaRN slow pairs are stretched by `factor`, fast ones kept, a ramp between.
std::vector<double> frequencies(int64_t rope, double theta, const YarnSettings& yarn) {
    std::vector<double> out(rope / 2);
    double low = std::max(0.0, std::floor(pair_of(yarn.beta_fast, rope, theta, yarn.original_context)));
    double high = std::min(double(rope - 1), std::ceil(pair_of(yarn.beta_slow, rope, theta, yarn.original_context)));
    if (low == high) high += 0.001;
    for (int64_t i = 0; i < rope / 2; ++i) {
        double f = std::pow(theta, -2.0 * double(i) / double(rope));
        double stretched = yarn.factor == 1 ? 0 : std::clamp((double(i) - low) / (high - low), 0.0, 1.0);
        out[i] = f / yarn.factor * stretched + f * (1 - stretched);
    }
    return out;
}
}  // namespace

RopeTable rope_table(int64_t S, int64_t rope, double theta, bool interleaved, const YarnSettings& yarn, at::ScalarType dtype, at::Device device) {
    MOE_CHECK(rope >= 0 && rope % 2 == 0, shape, "rope_table: rope", std::to_string(rope), "an even width", "");
    MOE_CHECK(S >= 0, shape, "rope_table: S", std::to_string(S), "at least 0", "");
    MOE_CHECK(theta > 1, config, "rope_table: theta", fmt::format("{}", theta), "above 1", "");
    MOE_CHECK(yarn.factor >= 1, config, "rope_table: yarn factor", fmt::format("{}", yarn.factor), "at least 1", "");
    MOE_CHECK(yarn.original_context > 0, config, "rope_table: original_context", std::to_string(yarn.original_context), "at least 1", "");
    auto frequency = frequencies(rope, theta, yarn);
    double scale = magnitude(yarn.factor, yarn.mscale) / magnitude(yarn.factor, yarn.mscale_all_dim);
    Tensor cos = at::empty({S, rope / 2}, at::kDouble), sin = at::empty_like(cos);
    double *c = cos.mutable_data_ptr<double>(), *s = sin.mutable_data_ptr<double>();
    for (int64_t t = 0; t < S; ++t)
        for (int64_t i = 0; i < rope / 2; ++i, ++c, ++s) {
            *c = std::cos(double(t) * frequency[i]) * scale;
            *s = std::sin(double(t) * frequency[i]) * scale;
        }
    return {cos.to(device, dtype), sin.to(device, dtype), interleaved};
}

double yarn_softmax_correction(const YarnSettings& yarn) {
    double m = magnitude(yarn.factor, yarn.mscale_all_dim);
    return m * m;
}
}  // namespace moe::kernels
