#include "core/kernels/embed/embed.h"

#include "core/kernels/common/autograd.h"
#include "core/kernels/common/dispatch.h"
#include "core/kernels/embed/embed_kernels.h"

#include <ATen/ops/empty.h>

namespace moe::kernels {
namespace {
Tensor embedded_rows(const Tensor& ids_T, const Tensor& w_VD) {
    Tensor y_TD = at::empty({ids_T.numel(), w_VD.size(1)}, w_VD.options());
    MOE_BY_DEVICE("embed", w_VD, embed_forward, ids_T, w_VD, y_TD);
    return y_TD;
}

struct EmbedFunction : Function<EmbedFunction> {
    static Tensor forward(AutogradContext* ctx, const Tensor& /*anchor*/, const Tensor& ids_T, const WeightPtr& w) {
        ctx->save_for_backward({ids_T});
        hold_weight(ctx, w);
        return embedded_rows(ids_T, w->value);
    }
    static Grads backward(AutogradContext* ctx, Grads grads) {
        WeightPtr w = held_weight(ctx);
        Tensor ids_T = ctx->get_saved_variables()[0], dy_TD = grads[0].detach().contiguous();
        add_weight_grad(w, [w, ids_T, dy_TD] {
            const bool from_zero = w->is_grad_stale;
            w->grad_squares.parts = MOE_BY_DEVICE("embed", dy_TD, embed_add_grad, dy_TD, ids_T, w->grad_to_add(), from_zero);
            w->grad_squares.version = w->grad._version();
        });
        return {Tensor(), Tensor(), Tensor()};
    }
};
}  // namespace

Tensor embed(const Tensor& anchor, const Tensor& ids_T, const WeightPtr& w_VD) {
    check_dims("embed", {"ids", ids_T}, 1);
    check_dtype("embed", {"ids", ids_T}, {at::kLong});
    MOE_CHECK(w_VD, state, "embed", "no weight", "a Weight", "");
    check_dims("embed", {"w", w_VD->value}, 2);
    check_float("embed", {"w", w_VD->value});
    check_same_device("embed", {"ids", ids_T}, {"w", w_VD->value});
    check_contiguous("embed", {"w", w_VD->value});
    if (w_VD->grad.defined()) {
        check_main_float("embed", {"w.grad", w_VD->grad});
        check_shape("embed", {"w.grad", w_VD->grad}, {w_VD->value.size(0), w_VD->value.size(1)});
    }
    Tensor ids = ids_T.contiguous();
    return anchor.defined() && wants_grad(anchor) ? EmbedFunction::apply(anchor, ids, w_VD) : embedded_rows(ids, w_VD->value);
}
}  // namespace moe::kernels
