#include "core/kernels/common/dtype.h"
#include "core/kernels/dropout/dropout_kernels.h"

#include <ATen/Parallel.h>

#include <cmath>
#include <numbers>

namespace moe::kernels {
namespace {
/// f(row, column, the block's four words) for every block of four columns.
template <class F> void each_block(const RandomRows& rows, int64_t R, int64_t C, F f) {
    at::parallel_for(0, R, 1 + 4096 / std::max<int64_t>(C, 1), [&](int64_t lo, int64_t hi) {
        for (int64_t r = lo; r < hi; ++r) {
            auto number = uint64_t(rows.first + r / rows.group * rows.stride + r % rows.group);
            for (int64_t c = 0; c < C; c += 4) f(r, c, draw(rows.key, number, uint32_t(c / 4)));
        }
    });
}
}  // namespace

void dropout_mask_cpu(const RandomRows& rows, uint32_t threshold, double keep, Tensor out_RC) {
    int64_t R = out_RC.size(0), C = out_RC.size(1);
    by_wide_dtype("dropout", out_RC, [&](auto zero) {
        using T = decltype(zero);
        T* out = mutable_data<T>(out_RC);
        each_block(rows, R, C, [&](int64_t r, int64_t c, const std::array<uint32_t, 4>& words) {
            for (int64_t i = 0; i < std::min<int64_t>(4, C - c); ++i) out[r * C + c + i] = words[size_t(i)] < threshold ? T(0) : T(keep);
        });
    });
}

void normal_rows_cpu(const RandomRows& rows, Tensor out_RC) {
    int64_t R = out_RC.size(0), C = out_RC.size(1);
    by_wide_dtype("normal_rows", out_RC, [&](auto zero) {
        using T = decltype(zero);
        T* out = mutable_data<T>(out_RC);
        each_block(rows, R, C, [&](int64_t r, int64_t c, const std::array<uint32_t, 4>& words) {
            for (int64_t i = 0; i < std::min<int64_t>(4, C - c); i += 2) {       // words in (0, 1]: the logarithm is finite
                double radius = std::sqrt(-2 * std::log((words[size_t(i)] + 1.0) * 0x1p-32)), angle = 2 * std::numbers::pi * (words[size_t(i) + 1] * 0x1p-32);
                out[r * C + c + i] = T(radius * std::cos(angle));
                if (c + i + 1 < C) out[r * C + c + i + 1] = T(radius * std::sin(angle));
            }
        });
    });
}
}  // namespace moe::kernels
