// Attention whose probabilities are dropped: plain tensor operations that keep all scores of a micro-batch. What fused kernels draw
// cannot be drawn again on another layout, so this path is exact instead of quick.
#include "core/kernels/common/dtype.h"
#include "core/kernels/mla/attention_kernels.h"

#include <ATen/ATen.h>

#include <limits>

namespace moe::kernels {
namespace {
/// x [B, S, N, rope] rotated by position; cos, sin [S, rope/2] broadcast over N.
Tensor rotated(const Tensor& x, const RopeTable& table, int64_t S) {
    auto line = [&](const Tensor& t) { return t.narrow(0, 0, S).to(x.device(), x.scalar_type()).unsqueeze(1); };
    Tensor cos = line(table.cos), sin = line(table.sin);
    int64_t half = x.size(-1) / 2;
    if (table.interleaved) {
        auto sizes = x.sizes().vec();
        Tensor pairs = x.reshape({sizes[0], sizes[1], sizes[2], half, 2}), a = pairs.select(-1, 0), b = pairs.select(-1, 1);
        return at::stack({a * cos - b * sin, b * cos + a * sin}, -1).reshape(sizes);
    }
    Tensor a = x.narrow(-1, 0, half), b = x.narrow(-1, half, half);
    return at::cat({a * cos - b * sin, b * cos + a * sin}, -1);
}
}  // namespace

Tensor mla_attention_dropout(const Tensor& q, const Tensor& kv, const Tensor& k_rope, const RopeTable& table, const MlaShape& m, const Tensor& doc_start_BS, double p, const RandomRows& rows) {
    check_attention(q, kv, k_rope, table, m, doc_start_BS);
    auto wide = wide_dtype(q);
    Tensor q_BSHd = q.to(wide).reshape({m.B, m.S, m.H, m.nope + m.rope}), kv_BSGd = kv.to(wide).reshape({m.B, m.S, m.G, m.nope + m.v});
    Tensor k_BSGd = kv_BSGd.narrow(-1, 0, m.nope), v_BSGd = kv_BSGd.narrow(-1, m.nope, m.v);
    if (m.rope > 0) {
        q_BSHd = at::cat({q_BSHd.narrow(-1, 0, m.nope), rotated(q_BSHd.narrow(-1, m.nope, m.rope), table, m.S)}, -1);
        Tensor shared = rotated(k_rope.to(wide).reshape({m.B, m.S, 1, m.rope}), table, m.S).expand({m.B, m.S, m.G, m.rope});
        k_BSGd = at::cat({k_BSGd, shared}, -1);
    }
    auto by_head = [&](const Tensor& x) { return x.transpose(1, 2).repeat_interleave(m.H / m.G, 1); };      // [B, H, S, d]
    Tensor scores = at::matmul(q_BSHd.transpose(1, 2), by_head(k_BSGd).transpose(-1, -2)) * m.softmax_scale;
    auto ints = at::TensorOptions().dtype(at::kInt).device(q.device());
    Tensor key = at::arange(m.S, ints), start = doc_start_BS.defined() ? doc_start_BS : at::zeros({m.B, m.S}, ints);
    if (m.window > 0 && m.window < m.S) start = windowed(start, m.B, m.S, m.window, q.device());
    Tensor hidden = key.view({1, 1, 1, m.S}).gt(key.view({1, 1, m.S, 1})).logical_or(key.view({1, 1, 1, m.S}).lt(start.reshape({m.B, 1, m.S, 1})));
    Tensor kept = at::softmax(scores.masked_fill(hidden, -std::numeric_limits<double>::infinity()), -1);
    Tensor mask = dropout_mask(m.B * m.S * m.H, m.S, p, rows, wide, q.device()).view({m.B, m.S, m.H, m.S}).transpose(1, 2);
    Tensor out = at::matmul(kept * mask, by_head(v_BSGd));
    return out.transpose(1, 2).reshape({m.B * m.S, m.H * m.v}).to(q.scalar_type());
}
}  // namespace moe::kernels
