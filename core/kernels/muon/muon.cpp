#include "core/kernels/muon/muon.h"

#include "core/tensor/check.h"

#include <ATen/ops/baddbmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/linalg_vector_norm.h>

#include <algorithm>
#include <cmath>

namespace moe::kernels {
namespace {
constexpr double kA = 3.4445, kB = -4.7750, kC = 2.0315;
constexpr int kSteps = 5;
constexpr double kLeastNorm = 1e-7;
/// RMS of AdamW's updates, as the paper found it.
constexpr double kUpdateRms = 0.2;

/// Frobenius norms [N, 1, 1], rows first: a sum over one whole matrix would be cut by the number of threads.
Tensor norms(const Tensor& x_NRC) { return at::linalg_vector_norm(at::linalg_vector_norm(x_NRC, 2, {{2}}, /*keepdim=*/true), 2, {{1}}, /*keepdim=*/true); }

void check_matrices(const Tensor& master, Named t) {
    check_shape("muon", t, {master.size(0), master.size(1), master.size(2)});
    check_same_device("muon", {"master", master}, t);
    check_contiguous("muon", t);
}
}  // namespace

Tensor newton_schulz(const Tensor& g_NRC, at::ScalarType dtype) {
    check_dims("newton_schulz", {"g", g_NRC}, 3);
    check_wide_float("newton_schulz", {"g", g_NRC});
    MOE_CHECK(dtype == at::kDouble || dtype == at::kFloat || dtype == at::kBFloat16, dtype, "newton_schulz: products", dtype_text(dtype), "float64, float32 or bfloat16", "");
    bool tall = g_NRC.size(1) > g_NRC.size(2);
    Tensor x = g_NRC.div(norms(g_NRC).clamp_min(kLeastNorm)).to(dtype);
    if (tall) x = x.transpose(1, 2);
    for (int i = 0; i < kSteps; ++i) {
        Tensor square = at::bmm(x, x.transpose(1, 2));
        Tensor polynomial = at::baddbmm(square, square, square, kB, kC);
        x = at::baddbmm(x, polynomial, x, kA, 1);
    }
    return tall ? x.transpose(1, 2) : x;
}

void muon(const Master& weights_NRC, const Tensor& grad_NRC, Tensor buffer_NRC, const MuonOptions& options) {
    if (weights_NRC.is_split()) {                                        // before they are joined
        check_dtype("muon", {"value of a split master", weights_NRC.value}, {at::kBFloat16});
        MOE_CHECK(weights_NRC.value.sizes() == weights_NRC.data.sizes(), shape, "muon: value", shape_text(weights_NRC.value.sizes()), shape_text(weights_NRC.data.sizes()), "");
        check_same_device("muon", {"master", weights_NRC.data}, {"value", weights_NRC.value});
    }
    Tensor master_NRC = weights_NRC.read();
    check_dims("muon", {"master", master_NRC}, 3);
    check_wide_float("muon", {"master", master_NRC});
    check_contiguous("muon", {"master", master_NRC});
    for (Named t : {Named{"grad", grad_NRC}, Named{"buffer", buffer_NRC}}) {
        check_matrices(master_NRC, t);
        check_main_float("muon", t);
    }
    if (weights_NRC.value.defined()) check_matrices(master_NRC, {"value", weights_NRC.value});
    MOE_CHECK(bool(options.whole) == bool(options.part), internal, "muon", "one of whole and part", "both or neither", "");
    if (master_NRC.numel() == 0) return;

    auto wide = master_NRC.scalar_type();
    Tensor grad = grad_NRC.to(wide, /*non_blocking=*/false, /*copy=*/true).mul_(options.grad_scale);
    Tensor buffer = buffer_NRC.to(wide);                                 // the state itself where dtypes agree
    buffer.mul_(options.momentum).add_(grad);
    if (!buffer.is_same(buffer_NRC)) buffer_NRC.copy_(buffer);
    Tensor direction = grad.add_(buffer, options.momentum);
    Tensor update = newton_schulz(options.whole ? options.whole(direction) : direction, options.products);
    double size = kUpdateRms * std::sqrt(double(std::max(update.size(1), update.size(2))));
    if (options.part) update = options.part(update);
    master_NRC.mul_(1 - options.lr * options.weight_decay).sub_(update, options.lr * size);
    if (weights_NRC.value.defined()) weights_NRC.write(master_NRC);
}
}  // namespace moe::kernels
