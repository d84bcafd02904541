#include "core/kernels/linear/linear.h"

#include "core/kernels/common/autograd.h"
#include "core/kernels/common/dispatch.h"
#include "core/kernels/grouped/grouped.h"
#include "core/kernels/linear/linear_kernels.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

namespace moe::kernels {
void product_nt(const Tensor& x_TI, const Tensor& w_OI, Tensor y_TO) { MOE_BY_DEVICE("linear", x_TI, product_nt, x_TI, w_OI, y_TO); }
void product_nn(const Tensor& dy_TO, const Tensor& w_OI, Tensor dx_TI) { MOE_BY_DEVICE("linear", dy_TO, product_nn, dy_TO, w_OI, dx_TI); }
void add_product_tn(const Tensor& dy_TO, const Tensor& x_TI, Tensor dw_OI, bool overwrite) { MOE_BY_DEVICE("linear", dy_TO, add_product_tn, dy_TO, x_TI, dw_OI, overwrite); }

namespace {
void check_weight(std::string_view op, const Tensor& x, const WeightPtr& w, int64_t dims) {
    check_dims(op, {"x", x}, 2);
    MOE_CHECK(w, state, std::string(op), "no weight", "a Weight", "");
    check_dims(op, {"w", w->value}, dims);
    check_float(op, {"x", x});
    check_float(op, {"w", w->value});
    check_inner(op, {"x", x}, 1, {"w", w->value}, dims - 1);
    check_same_device(op, {"x", x}, {"w", w->value});
    check_contiguous(op, {"w", w->value});
    if (!w->grad.defined()) return;
    check_main_float(op, {"w.grad", w->grad});
    MOE_CHECK(w->grad.sizes() == w->value.sizes(), shape, fmt::format("{}: w.grad of {}", op, w->name), shape_text(w->grad.sizes()), shape_text(w->value.sizes()), "");
    check_contiguous(op, {"w.grad", w->grad});
}

Tensor linear_forward(const Tensor& x_TI, const Tensor& w_OI, at::ScalarType dtype) {
    Tensor y_TO = at::empty({x_TI.size(0), w_OI.size(0)}, x_TI.options().dtype(dtype));
    product_nt(x_TI, w_OI, y_TO);
    return y_TO;
}

// ---- E4M3
/// Whether a product of x with w is in E4M3.
bool takes_fp8(const Tensor& x, const WeightPtr& w) { return w->is_fp8 && x.scalar_type() == at::kBFloat16 && w->value.scalar_type() == at::kBFloat16; }

/// The weight's E4M3 copies, made again where its values have changed.
QuantizedWeight fp8_weight(const WeightPtr& w) {
    Fp8Copy& c = w->fp8;
    const Tensor& value = w->value;
    if (!c.are_of(value)) {
        const int64_t E = value.dim() == 3 ? value.size(0) : 1, O = value.size(-2), I = value.size(-1);
        if (!c.q.defined()) {
            auto made = empty_quantized_weight(E, O, I, value);
            c.q = made.q_EOI, c.transposed = made.q_EIO, c.scale = made.scale_EOI;
        }
        quantize_weight(value, {c.q, c.transposed, c.scale});
        c.made_of(value);
    }
    return {c.q, c.transposed, c.scale};
}

QuantizedRows fp8_rows(const Tensor& x_RI, const RowGroups& groups) {
    if (auto copy = take_rows(x_RI)) return *std::move(copy);
    auto out = empty_quantized_rows(x_RI.size(0), x_RI.size(1), x_RI);
    // Rows after the last group hold anything; the device knows how many count.
    const Tensor& offsets = groups.offsets_E1;
    quantize_rows(x_RI, out, offsets.defined() && offsets.is_cuda() ? offsets.narrow(0, groups.size(), 1) : Tensor());
    return out;
}

Tensor fp8_forward(const Tensor& x_RI, const RowGroups& groups, const WeightPtr& w) {
    Tensor y_RO = at::empty({x_RI.size(0), w->value.size(-2)}, x_RI.options());
    MOE_BY_DEVICE("linear", x_RI, fp8_product_nt, fp8_rows(x_RI, groups), groups, fp8_weight(w), y_RO);
    return y_RO;
}
void fp8_backward(const Tensor& dy_RO, const RowGroups& groups, const WeightPtr& w, Tensor dx_RI) {
    MOE_BY_DEVICE("linear", dy_RO, fp8_product_nn, fp8_rows(dy_RO, groups), groups, fp8_weight(w), dx_RI);
}

/// Both doors: the result has the dtype of w.value, which for linear is that of x.
struct LinearFunction : Function<LinearFunction> {
    static Tensor forward(AutogradContext* ctx, const Tensor& x_TI, const WeightPtr& w) {
        ctx->save_for_backward({x_TI});
        hold_weight(ctx, w);
        return takes_fp8(x_TI, w) ? fp8_forward(x_TI, {}, w) : linear_forward(x_TI, w->value, w->value.scalar_type());
    }
    static Grads backward(AutogradContext* ctx, Grads grads) {
        WeightPtr w = held_weight(ctx);
        Tensor dy_TO = grads[0].contiguous(), x_TI = ctx->get_saved_variables()[0].detach(), dx_TI;
        if (ctx->needs_input_grad(0)) {
            dx_TI = at::empty_like(x_TI);
            takes_fp8(x_TI, w) ? fp8_backward(dy_TO, {}, w, dx_TI) : product_nn(dy_TO, w->value, dx_TI);
        }
        add_weight_grad(w, [w, dy_TO = dy_TO.detach(), x_TI] { add_product_tn(dy_TO, x_TI, w->grad, w->take_stale()); });
        return {dx_TI, Tensor()};
    }
};

/// The door for several weights.
struct LinearsFunction : Function<LinearsFunction> {
    static Grads forward(AutogradContext* ctx, const Tensor& x_TI, const std::vector<WeightPtr>& weights) {
        ctx->save_for_backward({x_TI});
        ctx->set_materialize_grads(false);
        keep(ctx, "weights", weights);
        return products(x_TI, weights);
    }
    static Grads products(const Tensor& x_TI, const std::vector<WeightPtr>& weights) {
        Grads out;
        for (auto& w : weights) out.push_back(takes_fp8(x_TI, w) ? fp8_forward(x_TI, {}, w) : linear_forward(x_TI, w->value, x_TI.scalar_type()));
        return out;
    }
    static Grads backward(AutogradContext* ctx, Grads grads) {
        auto& weights = kept<std::vector<WeightPtr>>(ctx, "weights");
        Tensor x_TI = ctx->get_saved_variables()[0].detach(), dx_TI;
        for (size_t k = 0; k < weights.size(); ++k) {
            if (!grads[k].defined()) continue;
            WeightPtr w = weights[k];
            Tensor dy_TO = grads[k].contiguous();
            if (ctx->needs_input_grad(0)) add_dx(x_TI, dy_TO, w, dx_TI);
            add_weight_grad(w, [w, dy_TO = dy_TO.detach(), x_TI] { add_product_tn(dy_TO, x_TI, w->grad, w->take_stale()); });
        }
        return {dx_TI, Tensor()};
    }
    static void add_dx(const Tensor& x_TI, const Tensor& dy_TO, const WeightPtr& w, Tensor& dx_TI) {
        bool first = !dx_TI.defined(), fp8 = takes_fp8(x_TI, w);
        Tensor part_TI = first || fp8 ? at::empty_like(x_TI) : dx_TI;
        if (fp8) fp8_backward(dy_TO, {}, w, part_TI);
        else if (first) product_nn(dy_TO, w->value, part_TI);
        else MOE_BY_DEVICE("linears", dy_TO, add_product_nn, dy_TO, w->value, part_TI);
        if (first) dx_TI = part_TI;
        else if (fp8) dx_TI.add_(part_TI);
    }
};

/// The door in fp64.
struct LinearFp64Function : Function<LinearFp64Function> {
    static Tensor forward(AutogradContext* ctx, const Tensor& x_TI, const WeightPtr& w) {
        ctx->save_for_backward({x_TI});
        hold_weight(ctx, w);
        return linear_forward(x_TI.to(at::kDouble), w->value.to(at::kDouble), at::kDouble);
    }
    static Grads backward(AutogradContext* ctx, Grads grads) {
        WeightPtr w = held_weight(ctx);
        Tensor dy_TO = grads[0].contiguous(), x_TI = ctx->get_saved_variables()[0].detach(), w_OI = w->value.to(at::kDouble), dx_TI;
        if (ctx->needs_input_grad(0)) {
            dx_TI = at::empty(x_TI.sizes(), dy_TO.options());
            product_nn(dy_TO, w_OI, dx_TI);
            dx_TI = dx_TI.to(x_TI.scalar_type());
        }
        add_weight_grad(w, [w, dy_TO = dy_TO.detach(), x_TI] {
            Tensor dw_OI = at::zeros(w->grad.sizes(), dy_TO.options());
            add_product_tn(dy_TO, x_TI.to(at::kDouble), dw_OI);
            w->grad_to_add().add_(dw_OI);
        });
        return {dx_TI, Tensor()};
    }
};

Tensor grouped_forward(const Tensor& x_RI, const RowGroups& groups, const Tensor& w_EOI) {
    Tensor y_RO = at::empty({x_RI.size(0), w_EOI.size(1)}, x_RI.options());
    MOE_BY_DEVICE("grouped_linear", x_RI, grouped_product_nt, x_RI, groups, w_EOI, y_RO);
    return y_RO;
}

struct GroupedLinearFunction : Function<GroupedLinearFunction> {
    static Tensor forward(AutogradContext* ctx, const Tensor& x_RI, const RowGroups& groups, const WeightPtr& w) {
        ctx->save_for_backward({x_RI});
        keep(ctx, "groups", groups);
        hold_weight(ctx, w);
        return takes_fp8(x_RI, w) ? fp8_forward(x_RI, groups, w) : grouped_forward(x_RI, groups, w->value);
    }
    static Grads backward(AutogradContext* ctx, Grads grads) {
        WeightPtr w = held_weight(ctx);
        RowGroups groups = kept<RowGroups>(ctx, "groups");
        Tensor dy_RO = grads[0].contiguous(), x_RI = ctx->get_saved_variables()[0].detach(), dx_RI;
        if (ctx->needs_input_grad(0)) {
            dx_RI = at::empty_like(x_RI);
            if (takes_fp8(x_RI, w)) fp8_backward(dy_RO, groups, w, dx_RI);
            else MOE_BY_DEVICE("grouped_linear", dy_RO, grouped_product_nn, dy_RO, groups, w->value, dx_RI);
        }
        add_weight_grad(w, [w, groups, dy_RO = dy_RO.detach(), x_RI] {
            w->grad_squares.parts = MOE_BY_DEVICE("grouped_linear", dy_RO, add_grouped_product_tn, dy_RO, x_RI, groups, w->grad, w->take_stale());
            w->grad_squares.version = w->grad._version();
        });
        return {dx_RI, Tensor(), Tensor()};
    }
};

void check_groups(const RowGroups& groups, const Tensor& x_RI, int64_t experts) {
    const Tensor& offsets_E1 = groups.offsets_E1;
    check_shape("grouped_linear", {"offsets", offsets_E1}, {experts + 1});
    check_contiguous("grouped_linear", {"offsets", offsets_E1});
    MOE_CHECK(groups.align > 0, usage, "grouped_linear: align", std::to_string(groups.align), "at least 1", "");
    if (!offsets_E1.is_cpu()) {
        check_same_device("grouped_linear", {"x", x_RI}, {"offsets", offsets_E1});
        return check_dtype("grouped_linear", {"offsets", offsets_E1}, {at::kInt});
    }
    check_dtype("grouped_linear", {"offsets", offsets_E1}, {at::kLong});
    const int64_t *offset = offsets_E1.const_data_ptr<int64_t>(), rows = x_RI.size(0);
    MOE_CHECK(offset[0] == 0 && offset[experts] == rows, shape, "grouped_linear: offsets", fmt::format("{} … {}", offset[0], offset[experts]), fmt::format("0 … {}", rows), "");
    for (int64_t e = 0; e < experts; ++e) {
        MOE_CHECK(offset[e] <= offset[e + 1], shape, fmt::format("grouped_linear: offsets[{}]", e + 1), std::to_string(offset[e + 1]), fmt::format("at least {}", offset[e]), "");
        MOE_CHECK(offset[e] % groups.align == 0, shape, fmt::format("grouped_linear: offsets[{}]", e), std::to_string(offset[e]), fmt::format("a multiple of {}", groups.align), "");
    }
}
}  // namespace

void refresh_fp8(const WeightPtr& w) {
    if (w->fp8.q.defined() && w->value.defined()) fp8_weight(w);
}

Tensor linear(const Tensor& x_TI, const WeightPtr& w_OI) {
    check_weight("linear", x_TI, w_OI, 2);
    check_same_dtype("linear", {"x", x_TI}, {"w", w_OI->value});
    Tensor x = x_TI.contiguous();
    if (wants_grad(x)) return LinearFunction::apply(x, w_OI);
    return takes_fp8(x, w_OI) ? fp8_forward(x, {}, w_OI) : linear_forward(x, w_OI->value, x.scalar_type());
}

std::vector<Tensor> linears(const Tensor& x_TI, const std::vector<WeightPtr>& weights) {
    for (auto& w : weights) {
        check_weight("linears", x_TI, w, 2);
        check_same_dtype("linears", {"x", x_TI}, {"w", w->value});
    }
    Tensor x = x_TI.contiguous();
    return wants_grad(x) ? LinearsFunction::apply(x, weights) : LinearsFunction::products(x, weights);
}

Tensor linear_wide(const Tensor& x_TI, const WeightPtr& w_OI) {
    check_weight("linear_wide", x_TI, w_OI, 2);
    check_wide_float("linear_wide", {"w", w_OI->value});
    Tensor x = x_TI.contiguous();
    return wants_grad(x) ? LinearFunction::apply(x, w_OI) : linear_forward(x, w_OI->value, w_OI->value.scalar_type());
}

Tensor linear_fp64(const Tensor& x_TI, const WeightPtr& w_OI) {
    check_weight("linear_fp64", x_TI, w_OI, 2);
    Tensor x = x_TI.contiguous();
    return wants_grad(x) ? LinearFp64Function::apply(x, w_OI) : linear_forward(x.to(at::kDouble), w_OI->value.to(at::kDouble), at::kDouble);
}

Tensor grouped_linear(const Tensor& x_RI, const RowGroups& groups, const WeightPtr& w_EOI) {
    check_weight("grouped_linear", x_RI, w_EOI, 3);
    check_same_dtype("grouped_linear", {"x", x_RI}, {"w", w_EOI->value});
    check_groups(groups, x_RI, w_EOI->value.size(0));
    Tensor x = x_RI.contiguous();
    if (wants_grad(x)) return GroupedLinearFunction::apply(x, groups, w_EOI);
    return takes_fp8(x, w_EOI) ? fp8_forward(x, groups, w_EOI) : grouped_forward(x, groups, w_EOI->value);
}

int64_t grouped_alignment(at::Device device, at::ScalarType dtype) { return device.is_cuda() && dtype == at::kBFloat16 ? kGroupAlign : 1; }
}  // namespace moe::kernels
