#include "core/kernels/mla/attention.h"

#include "core/kernels/common/autograd.h"
#include "core/kernels/common/dispatch.h"
#include "core/kernels/common/dtype.h"
#include "core/kernels/mla/attention_kernels.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/maximum.h>

namespace moe::kernels {
namespace {
constexpr const char* kOp = "mla_attention";

struct AttentionFunction : Function<AttentionFunction> {
    static Tensor forward(AutogradContext* ctx, const Tensor& q, const Tensor& kv, const std::optional<Tensor>& k_rope, const MlaInputs& rest, bool fp8) {
        MlaInputs in = rest;
        in.q = q;
        in.kv = kv;
        in.k_rope = k_rope.value_or(Tensor());
        Tensor out = at::empty({q.size(0), in.shape.H * in.shape.v}, q.options());
        auto saved = MOE_BY_DEVICE(kOp, q, mla_attention_forward, in, out, true);
        bool has_rotated = q.is_cuda() && !saved.empty();                  // the queries once more, as the library takes them: then these are not needed
        saved.insert(saved.begin(), {has_rotated ? Tensor() : q, kv, in.k_rope, out});
        ctx->save_for_backward(saved);
        keep(ctx, "rest", rest);
        ctx->saved_data["fp8"] = fp8;
        return out;
    }
    static Grads backward(AutogradContext* ctx, Grads grads) {
        auto saved = ctx->get_saved_variables();
        MlaInputs in = kept<MlaInputs>(ctx, "rest");
        in.q = saved[0];
        in.kv = saved[1];
        in.k_rope = saved[2];
        Tensor out = saved[3], dout = grads[0].contiguous();
        saved.erase(saved.begin(), saved.begin() + 4);
        const MlaShape& m = in.shape;
        MlaGradients d{at::empty({m.B * m.S, m.H * (m.nope + m.rope)}, in.kv.options()), at::empty_like(in.kv), in.k_rope.defined() ? at::empty_like(in.k_rope) : Tensor()};
        const bool fp8 = ctx->saved_data["fp8"].toBool();
        d.q_copy = copy_to_fill(d.q.size(0), d.q.size(1), d.q, fp8), d.kv_copy = copy_to_fill(d.kv.size(0), d.kv.size(1), d.kv, fp8);
        MOE_BY_DEVICE(kOp, in.kv, mla_attention_backward, in, out, saved, dout, d);
        attach_rows(d.q, d.q_copy);
        attach_rows(d.kv, d.kv_copy);
        return {d.q, d.kv, d.k_rope, Tensor(), Tensor()};
    }
};

void check_inputs(const Tensor& q, const Tensor& kv, const Tensor& k_rope, const RopeTable& table, const MlaShape& m) {
    MOE_CHECK(m.B >= 0 && m.S >= 0 && m.H > 0 && m.G > 0 && m.H % m.G == 0, shape, "mla_attention: heads", fmt::format("H {}, G {}", m.H, m.G), "H a multiple of G, both above 0", "");
    MOE_CHECK(m.nope >= 0 && m.rope >= 0 && m.rope % 2 == 0 && m.nope + m.rope > 0 && m.v > 0, shape, "mla_attention: widths",
              fmt::format("nope {}, rope {}, v {}", m.nope, m.rope, m.v), "nope + rope and v above 0, rope even", "");
    check_float(kOp, {"q", q});
    check_shape(kOp, {"q", q}, {m.B * m.S, m.H * (m.nope + m.rope)});
    check_shape(kOp, {"kv", kv}, {m.B * m.S, m.G * (m.nope + m.v)});
    check_same_dtype(kOp, {"q", q}, {"kv", kv});
    check_same_device(kOp, {"q", q}, {"kv", kv});
    if (m.rope == 0) {
        MOE_CHECK(!k_rope.defined(), shape, "mla_attention: k_rope", describe(k_rope), "undefined where rope is 0", "");
        return;
    }
    check_shape(kOp, {"k_rope", k_rope}, {m.B * m.S, m.rope});
    check_same_dtype(kOp, {"q", q}, {"k_rope", k_rope});
    check_same_device(kOp, {"q", q}, {"k_rope", k_rope});
    for (Named t : {Named{"table.cos", table.cos}, Named{"table.sin", table.sin}}) {
        check_shape(kOp, t, {-1, m.rope / 2});
        MOE_CHECK(t.tensor.size(0) >= m.S, shape, fmt::format("{}: {}", kOp, t.name), shape_text(t.tensor.sizes()), fmt::format("at least {} positions", m.S),
                  "make the table with rope_table for the longest sequence");
    }
}

void check_documents(const Tensor& doc_start_BS, const MlaShape& m, const Tensor& q) {
    check_shape(kOp, {"doc_start", doc_start_BS}, {m.B, m.S});
    check_dtype(kOp, {"doc_start", doc_start_BS}, {at::kInt});
    check_same_device(kOp, {"q", q}, {"doc_start", doc_start_BS});
    if (!doc_start_BS.is_cpu()) return;                 // reading it would make the host wait
    auto* start = data<int32_t>(doc_start_BS);
    for (int64_t i = 0; i < m.B * m.S; ++i)
        MOE_CHECK(start[i] >= 0 && start[i] <= i % m.S, shape, fmt::format("mla_attention: doc_start[{}][{}]", i / m.S, i % m.S), std::to_string(start[i]), fmt::format("in [0, {}]", i % m.S), "");
}

/// The table where the loops read it: q's device, fp64 for fp64, else fp32. No copy where it is there already.
RopeTable table_for(const RopeTable& table, const Tensor& q) {
    auto move = [&](const Tensor& t) { return t.to(q.device(), wide_dtype(q)).contiguous(); };
    return {move(table.cos), move(table.sin), table.interleaved};
}
}  // namespace

void check_attention(const Tensor& q, const Tensor& kv, const Tensor& k_rope, const RopeTable& table, const MlaShape& shape, const Tensor& doc_start_BS) {
    check_inputs(q, kv, k_rope, table, shape);
    MOE_CHECK(shape.window >= 0, shape, "mla_attention: window", std::to_string(shape.window), "0 or more", "");
    if (doc_start_BS.defined()) check_documents(doc_start_BS.contiguous(), shape, q);
}

bool masks_documents(int64_t S) {
    constexpr int64_t kMostMasked = 1024;               // measured at 48/32, 8 heads, S 512: forward and backward cost what flash costs
    return S <= kMostMasked && S % 8 == 0;
}

Tensor windowed(const Tensor& doc_start_BS, int64_t B, int64_t S, int64_t window, at::Device device) {
    Tensor first_S = at::arange(1 - window, S + 1 - window, at::TensorOptions().dtype(at::kInt).device(device)).clamp_min(0);
    return doc_start_BS.defined() ? at::maximum(doc_start_BS, first_S.unsqueeze(0)) : first_S.expand({B, S}).contiguous();
}

Tensor mla_attention(const Tensor& q, const Tensor& kv, const Tensor& k_rope, const RopeTable& table, const MlaShape& shape, const Tensor& doc_start_BS, bool fp8) {
    check_attention(q, kv, k_rope, table, shape, doc_start_BS);
    MlaInputs in{q.contiguous(), kv.contiguous(), k_rope.defined() ? k_rope.contiguous() : k_rope, {}, shape, {}};
    if (shape.rope > 0) in.table = table_for(table, q);
    if (doc_start_BS.defined()) in.doc_start_BS = doc_start_BS.contiguous();
    // The CPU's loops take each token's first position; CUDA's ways know windows.
    if (shape.window > 0 && shape.window < shape.S && q.is_cpu()) in.doc_start_BS = windowed(in.doc_start_BS, shape.B, shape.S, shape.window, q.device());
    bool wanted = wants_grad(in.q) || wants_grad(in.kv) || (in.k_rope.defined() && wants_grad(in.k_rope));
    if (!wanted) {
        Tensor out = at::empty({q.size(0), shape.H * shape.v}, q.options());
        MOE_BY_DEVICE(kOp, q, mla_attention_forward, in, out, false);
        return out;
    }
    MlaInputs rest{{}, {}, {}, in.table, shape, in.doc_start_BS};      // tensors with a graph go through save_for_backward only
    return AttentionFunction::apply(in.q, in.kv, in.k_rope.defined() ? std::optional<Tensor>(in.k_rope) : std::nullopt, rest, fp8);
}
}  // namespace moe::kernels
