#include "core/kernels/head/head_loss.h"

#include "core/kernels/common/autograd.h"
#include "core/kernels/common/dispatch.h"
#include "core/kernels/common/dtype.h"
#include "core/kernels/head/head_loss_kernels.h"
#include "core/kernels/linear/linear_kernels.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/scalar_tensor.h>

#include <algorithm>

namespace moe::kernels {
namespace {
/// What the passes over chunks share.
struct Chunks {
    Tensor x_TD, w_VD, targets_T;
    HeadLossOptions options;

    int64_t T() const { return x_TD.size(0); }
    int64_t V() const { return w_VD.size(0); }
    int64_t rows_at(int64_t lo) const { return std::min(options.chunk, T() - lo); }
    Tensor empty_rows(int64_t n) const { return at::empty({n, V()}, x_TD.options()); }
};

/// Logits of some rows, in at least fp32, and their gradient in x's dtype, unscaled by what comes from above: in the same memory where that is possible.
struct Logits {
    Tensor values_NV, grad_NV;
    Logits rows(int64_t n) const { return {values_NV.narrow(0, 0, n), grad_NV.narrow(0, 0, n)}; }
};
bool overwrites_rows(const Tensor& x, int64_t V) { return MOE_BY_DEVICE("head_loss", x, overwrites_rows, wide_dtype(x), V); }

Logits empty_logits(const Chunks& c, int64_t n) {
    auto dtype = wide_dtype(c.x_TD), narrow = c.x_TD.scalar_type();
    Tensor values_NV = at::empty({n, c.V()}, c.x_TD.options().dtype(dtype));
    if (dtype == narrow) return {values_NV, values_NV};
    return {values_NV, overwrites_rows(c.x_TD, c.V()) ? values_NV.view(narrow).narrow(1, 0, c.V()) : c.empty_rows(n)};
}

/// Logits of rows lo … lo + n, their losses, and their gradient where it is defined.
void chunk_pass(const Chunks& c, int64_t lo, int64_t n, Tensor loss_N, const Logits& logits) {
    product_nt(c.x_TD.narrow(0, lo, n), c.w_VD, logits.values_NV);
    MOE_BY_DEVICE("head_loss", logits.values_NV, cross_entropy, logits.values_NV, c.targets_T.narrow(0, lo, n), c.options.scale, loss_N, logits.grad_NV);
}

/// Loss by token, float64 [T], unscaled; `all` becomes the gradient of all logits where it is defined.
Tensor token_losses(const Chunks& c, const Tensor& all_TV) {
    Tensor loss_T = at::empty({c.T()}, c.x_TD.options().dtype(at::kDouble));
    for (int64_t lo = 0; lo < c.T(); lo += c.options.chunk) {
        int64_t n = c.rows_at(lo);
        Tensor grad_NV = all_TV.defined() ? all_TV.narrow(0, lo, n) : Tensor();
        bool in_place = grad_NV.defined() && grad_NV.scalar_type() == wide_dtype(c.x_TD);
        Tensor values_NV = in_place ? grad_NV : at::empty({n, c.V()}, c.x_TD.options().dtype(wide_dtype(c.x_TD)));
        chunk_pass(c, lo, n, loss_T.narrow(0, lo, n), {values_NV, grad_NV});
    }
    return loss_T;
}

/// The gradients of one chunk: dx of its rows, and the weight's main gradient added to. `x_scale`, where given, multiplies x in the latter.
void chunk_gradients(const Chunks& c, const WeightPtr& w, int64_t lo, int64_t n, const Tensor& dlogits_NV, const Tensor& x_scale, Tensor dx_TD) {
    product_nn(dlogits_NV, c.w_VD, dx_TD.narrow(0, lo, n));
    if (!w->grad.defined()) return;
    Tensor x_ND = c.x_TD.narrow(0, lo, n).detach();
    add_product_tn(dlogits_NV, x_scale.defined() ? x_ND.mul(x_scale).to(x_ND.scalar_type()) : x_ND, w->grad, w->take_stale());
}

/// Losses as token_losses, and the gradients with 1 from above.
Tensor losses_and_gradients(const Chunks& c, const WeightPtr& w, Tensor dx_TD) {
    Tensor loss_T = at::empty({c.T()}, c.x_TD.options().dtype(at::kDouble));
    Logits room = empty_logits(c, c.rows_at(0));
    for (int64_t lo = 0; lo < c.T(); lo += c.options.chunk) {
        int64_t n = c.rows_at(lo);
        Logits logits = room.rows(n);
        chunk_pass(c, lo, n, loss_T.narrow(0, lo, n), logits);
        chunk_gradients(c, w, lo, n, logits.grad_NV, {}, dx_TD);
    }
    return loss_T;
}

/// On the CPU added in token order, so that it does not depend on the number of threads.
Tensor total(const Tensor& loss_T, const Factor& scale) {
    if (!loss_T.is_cpu()) return scaled(loss_T.sum(), scale);
    double sum = 0;
    auto* loss = data<double>(loss_T);
    for (int64_t t = 0; t < loss_T.numel(); ++t) sum += loss[t];
    return at::scalar_tensor(sum * scale.value(), at::kDouble);
}

struct HeadLossFunction : Function<HeadLossFunction> {
    static Tensor forward(AutogradContext* ctx, const Tensor& x_TD, const WeightPtr& w, const Tensor& targets_T, const HeadLossOptions& options, Tensor* token_loss) {
        Chunks c{x_TD, w->value, targets_T, options};
        Tensor all_TV;
        if (options.gradients_in_forward) {
            Tensor dx_TD = at::empty_like(x_TD), loss_T = losses_and_gradients(c, w, dx_TD);
            ctx->save_for_backward({dx_TD});
            if (token_loss) *token_loss = loss_T.to(at::kFloat);
            return total(loss_T, options.scale);
        }
        if (c.T() * c.V() * x_TD.element_size() <= options.keep_bytes) all_TV = c.empty_rows(c.T());
        Tensor loss_T = token_losses(c, all_TV);
        ctx->save_for_backward({x_TD, targets_T, all_TV});
        hold_weight(ctx, w);
        keep(ctx, "options", options);
        if (token_loss) *token_loss = loss_T.to(at::kFloat);
        return total(loss_T, options.scale);
    }

    /// w's gradient is never deferred: the logits' gradient is the largest tensor there is. What comes from above multiplies
    /// the narrow operands (dx, x) in at least fp32, not the logits' gradient.
    static Grads backward(AutogradContext* ctx, Grads grads) {
        auto saved = ctx->get_saved_variables();
        if (saved.size() == 1) return {saved[0], Tensor(), Tensor(), Tensor(), Tensor()};        // made in forward
        WeightPtr w = held_weight(ctx);
        Chunks c{saved[0], w->value, saved[1], kept<HeadLossOptions>(ctx, "options")};
        Tensor all_TV = saved[2], dx_TD = at::empty_like(c.x_TD), upstream = grads[0].reshape({1}).to(wide_dtype(c.x_TD));
        bool is_one = upstream.is_cpu() && upstream.item<double>() == 1;
        Tensor unused_T = all_TV.defined() ? Tensor() : at::empty({c.T()}, c.x_TD.options().dtype(at::kDouble));
        for (int64_t lo = 0; lo < c.T(); lo += c.options.chunk) {
            int64_t n = c.rows_at(lo);
            Logits logits = all_TV.defined() ? Logits{{}, all_TV.narrow(0, lo, n)} : empty_logits(c, n);
            if (!all_TV.defined()) chunk_pass(c, lo, n, unused_T.narrow(0, lo, n), logits);
            chunk_gradients(c, w, lo, n, logits.grad_NV, is_one ? Tensor() : upstream, dx_TD);
        }
        if (!is_one) dx_TD.mul_(upstream);
        return {dx_TD, Tensor(), Tensor(), Tensor(), Tensor()};
    }
};

/// Rows of equal chunks on a GPU: tall products are quicker, and there must be room for them.
int64_t gpu_chunk(const Tensor& x_TD, int64_t V) {
    constexpr int64_t kBytes = int64_t(1600) << 20;                     // of fp32 logits and their gradient in two bytes, which may need its own memory
    int64_t row = std::max<int64_t>(V, 1) * (overwrites_rows(x_TD, V) ? 4 : 6), T = std::max<int64_t>(x_TD.size(0), 1);
    int64_t most = std::clamp<int64_t>(kBytes / row / 128 * 128, 128, 8192), chunks = (T + most - 1) / most;
    return ((T + chunks - 1) / chunks + 127) / 128 * 128;
}
constexpr int64_t kCpuChunk = 1024;

void check_targets(const Tensor& targets_T, int64_t V) {
    if (!targets_T.is_cpu()) return;                    // reading them would make the host wait
    auto* target = data<int64_t>(targets_T);
    for (int64_t t = 0; t < targets_T.numel(); ++t)
        MOE_CHECK(target[t] == kIgnore || (target[t] >= 0 && target[t] < V), data, fmt::format("head_loss: targets[{}]", t), std::to_string(target[t]),
                  fmt::format("an id in [0, {}), or {} for no target", V, kIgnore), "");
}
}  // namespace

Tensor head_loss(const Tensor& x_TD, const WeightPtr& w_VD, const Tensor& targets_T, const HeadLossOptions& given, Tensor* token_loss) {
    HeadLossOptions options = given;
    check_dims("head_loss", {"x", x_TD}, 2);
    check_float("head_loss", {"x", x_TD});
    MOE_CHECK(w_VD, state, "head_loss", "no weight", "a Weight", "");
    check_dims("head_loss", {"w", w_VD->value}, 2);
    check_inner("head_loss", {"x", x_TD}, 1, {"w", w_VD->value}, 1);
    check_same_dtype("head_loss", {"x", x_TD}, {"w", w_VD->value});
    check_same_device("head_loss", {"x", x_TD}, {"w", w_VD->value});
    check_contiguous("head_loss", {"w", w_VD->value});
    check_shape("head_loss", {"targets", targets_T}, {x_TD.size(0)});
    check_dtype("head_loss", {"targets", targets_T}, {at::kLong});
    check_same_device("head_loss", {"x", x_TD}, {"targets", targets_T});
    MOE_CHECK(options.chunk >= 0, usage, "head_loss: chunk", std::to_string(options.chunk), "at least 1, or 0", "");
    if (w_VD->grad.defined()) {
        check_main_float("head_loss", {"w.grad", w_VD->grad});
        check_shape("head_loss", {"w.grad", w_VD->grad}, {w_VD->value.size(0), w_VD->value.size(1)});
    }
    if (options.chunk == 0) options.chunk = x_TD.is_cuda() ? gpu_chunk(x_TD, w_VD->value.size(0)) : kCpuChunk;
    Tensor x = x_TD.contiguous(), targets = targets_T.contiguous();
    check_targets(targets, w_VD->value.size(0));
    if (wants_grad(x)) return HeadLossFunction::apply(x, w_VD, targets, options, token_loss);
    Tensor loss_T = token_losses({x, w_VD->value, targets, options}, Tensor());
    if (token_loss) *token_loss = loss_T.to(at::kFloat);
    return total(loss_T, options.scale);
}
}  // namespace moe::kernels
