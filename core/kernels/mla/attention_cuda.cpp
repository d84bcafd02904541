// MLA's attention on CUDA. Operands are rotated and laid out by kernels of our own, then one of three ways:
//   cudnn      bf16 or fp16, widths that cuDNN's kernels have (192/128 among them), no packed documents or sequences so short that a mask costs
//              less than waiting for their number: the fastest there is, and what CUDA graphs can record;
//   packed     the same for packed documents of longer sequences, sliding windows and grouped heads, by cuDNN's graph interface (cudnn_packed.h);
//   flash      other bf16 or fp16 up to width 256, and deterministic runs: wants one width, so v is padded to that of q;
//   composed   fp32, fp64 and wider bf16 or fp16: blocks of query rows, softmax in fp32 or fp64, probabilities computed again in backward.
// Letters: B sequences, S positions, T = B·S, H query heads, G key and value heads, D = nope + rope, W and U padded widths.
#ifdef MOE_WITH_CUDA
#include "core/kernels/common/cuda_check.h"
#include "core/kernels/common/dtype.h"
#include "core/kernels/mla/attention_kernels.h"
#include "core/kernels/mla/cudnn_packed.h"
#include "core/kernels/mla/mla_sm90.h"
#include "core/kernels/quantize/fused_copy.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <mutex>

namespace moe::kernels {
namespace {
enum class Way { cudnn, packed, flash, composed };

int64_t width(const MlaShape& m) { return m.nope + m.rope; }
int64_t round_up_to(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

bool has_window(const MlaShape& m) { return m.window > 0 && m.window < m.S; }

/// cuDNN's backward adds in the order of arrival, so a deterministic run takes flash, which then adds in order.
Way way_of(const MlaInputs& in) {
    const MlaShape& m = in.shape;
    const int64_t D = width(m);
    if (!at::isReducedFloatingType(in.q.scalar_type()) || D > 256 || m.v > 256) return Way::composed;
    const bool has_widths = (D == 192 && m.v == 128) || (D <= 128 && m.v <= 128);
    if (at::globalContext().deterministicAlgorithms() || !has_widths || D % 8 != 0 || m.v % 8 != 0 || m.S == 1) return Way::flash;
    const bool few_documents = !in.doc_start_BS.defined() || masks_documents(m.S);
    return few_documents && m.H == m.G && !has_window(m) ? Way::cudnn : Way::packed;
}

/// What forward saved says which way it took.
constexpr size_t kSavedByCudnn = 6, kSavedByPacked = 5, kSavedByFlash = 8;
Way way_of(const std::vector<Tensor>& saved) {
    return saved.size() == kSavedByCudnn ? Way::cudnn : saved.size() == kSavedByPacked ? Way::packed : saved.size() == kSavedByFlash ? Way::flash : Way::composed;
}

/// q, k [T, H or G, W] and v [T, G, U]; for cuDNN v may be a view of kv.
struct Operands { Tensor q, k, v; };

sm90::MlaLayout layout(const MlaInputs& in, int64_t W, int64_t U) {
    const MlaShape& m = in.shape;
    sm90::MlaLayout p{};
    p.dtype = sm90_dtype("mla_attention", in.kv), p.T = m.B * m.S, p.S = m.S, p.H = int(m.H), p.G = int(m.G);
    p.nope = int(m.nope), p.rope = int(m.rope), p.v = int(m.v), p.W = int(W), p.U = int(U), p.interleaved = in.table.interleaved;
    p.cos = in_pointer(in.table.cos), p.sin = in_pointer(in.table.sin);
    return p;
}

bool starts_at_16_bytes(const Tensor& t) { return reinterpret_cast<std::uintptr_t>(t.data_ptr()) % 16 == 0; }
/// The library's kernels read 16 bytes at once.
Tensor aligned(const Tensor& t) { return starts_at_16_bytes(t) ? t : t.clone(); }

/// Whether the library can read v where it lies in kv.
bool v_stays(const MlaInputs& in) { return in.shape.nope % 8 == 0 && in.shape.v % 8 == 0 && starts_at_16_bytes(in.kv); }
/// v as it lies in kv.
Tensor v_in_kv(const MlaInputs& in) {
    const MlaShape& m = in.shape;
    return in.kv.reshape({m.B * m.S, m.G, m.nope + m.v}).narrow(2, m.nope, m.v);
}

Operands assemble(const MlaInputs& in, int64_t W, int64_t U, bool view_of_v, cudaStream_t stream) {
    const MlaShape& m = in.shape;
    const int64_t T = m.B * m.S;
    Operands o{at::empty({T, m.H, W}, in.q.options()), at::empty({T, m.G, W}, in.q.options()), view_of_v ? v_in_kv(in) : at::empty({T, m.G, U}, in.q.options())};
    auto p = layout(in, W, U);
    p.q_in = out_pointer(in.q), p.kv_in = out_pointer(in.kv), p.k_rope = out_pointer(in.k_rope);
    p.q = out_pointer(o.q), p.k = out_pointer(o.k), p.v_out = view_of_v ? nullptr : out_pointer(o.v);
    MOE_CUDA_CHECK(sm90::mla_assemble(p, stream));
    return o;
}

/// Gradients of the operands into those of the inputs.
void take_apart(const MlaInputs& in, const Operands& grads, const MlaGradients& to, cudaStream_t stream) {
    Tensor gq = grads.q.contiguous(), gk = grads.k.contiguous(), gv = grads.v.contiguous();
    auto p = layout(in, gk.size(-1), gv.size(-1));
    p.q_in = out_pointer(to.q), p.kv_in = out_pointer(to.kv), p.k_rope = out_pointer(to.k_rope);
    p.q = out_pointer(gq), p.k = out_pointer(gk), p.v_out = out_pointer(gv);
    const bool fused = to.q_copy.q_RK.defined() && sm90::mla_walks_vectors(p);
    if (fused) p.q_copy = fused_copy(to.q_copy, {to.q}), p.kv_copy = fused_copy(to.kv_copy, {to.kv});
    MOE_CUDA_CHECK(sm90::mla_take_apart(p, stream));
    if (!fused) fill_copy_cuda(to.q, to.q_copy), fill_copy_cuda(to.kv, to.kv_copy);
}

/// x [T, …, from] with its last dim cut or padded with zeros.
Tensor repadded(const Tensor& x, int64_t rows, int64_t from, int64_t to, Tensor y, cudaStream_t stream) {
    MOE_CUDA_CHECK(sm90::repad(sm90_dtype("mla_attention", x), in_pointer(x), rows, int(from), int(to), out_pointer(y), stream));
    return y;
}

/// The library makes its output itself: `out` takes over that memory where out is alone on its own, else it is copied.
void hand_over(const Tensor& made, Tensor out) {
    Tensor flat = made.reshape(out.sizes());
    const bool alone = out.storage().use_count() == 1 && out.storage_offset() == 0 && int64_t(out.storage().nbytes()) == out.numel() * out.element_size();
    if (alone && flat.is_contiguous()) out.set_(flat);
    else out.copy_(flat);
}

// ---- cudnn: tensors as [B, heads, S, width] views

Tensor heads_first(const Tensor& x, const MlaShape& m) { return x.reshape({m.B, m.S, -1, x.size(-1)}).transpose(1, 2); }
Tensor tokens_first(const Tensor& x) { return x.transpose(1, 2).contiguous().flatten(0, 1); }

/// [T, G, v] → [B, G, S, v], also where x is a view with gaps.
Tensor v_heads_first(const Tensor& v, const MlaShape& m) { return v.unflatten(0, {m.B, m.S}).transpose(1, 2); }

/// 0 where a query sees a key of its document, else −∞, beside the causal mask: [B, H, S, S], the heads sharing memory; undefined without documents.
/// The layers of a model share doc_start, so the last answer is kept. A graph of kernels that is being recorded gets one of its own: whoever
/// records writes doc_start first, which changes its version.
Tensor document_mask(const MlaInputs& in) {
    const MlaShape& m = in.shape;
    const Tensor& doc = in.doc_start_BS;
    if (!doc.defined()) return {};
    struct Last { std::mutex mutex; Tensor doc, mask; int64_t version = 0; };
    static Last& last = *new Last;                       // never destroyed: the device may be gone by then
    const bool tracked = !doc.is_inference();
    auto spread = [&](const Tensor& mask) { return mask.expand({m.B, m.H, m.S, m.S}); };
    std::lock_guard lock(last.mutex);
    if (tracked && last.doc.defined() && last.doc.is_same(doc) && last.version == int64_t(doc._version()) && last.mask.scalar_type() == in.kv.scalar_type()) return spread(last.mask);
    Tensor hidden = at::arange(m.S, doc.options()).view({1, 1, 1, m.S}) < doc.view({m.B, 1, m.S, 1});
    Tensor mask = at::zeros({m.B, 1, m.S, m.S}, in.kv.options()).masked_fill_(hidden, -std::numeric_limits<double>::infinity());
    if (tracked) last.doc = doc, last.mask = mask, last.version = int64_t(doc._version());
    return spread(mask);
}

std::optional<Tensor> optional_mask(const MlaInputs& in) { return in.doc_start_BS.defined() ? std::optional<Tensor>(document_mask(in)) : std::nullopt; }

std::vector<Tensor> cudnn_forward(const MlaInputs& in, Tensor out, bool want_grad, cudaStream_t stream) {
    const MlaShape& m = in.shape;
    const bool in_kv = v_stays(in);
    Operands o = assemble(in, width(m), m.v, in_kv, stream);
    auto [made, lse, cum_q, cum_k, max_q, max_k, seed, offset, mask] = at::_scaled_dot_product_cudnn_attention(
        heads_first(o.q, m), heads_first(o.k, m), v_heads_first(o.v, m), optional_mask(in), want_grad, 0.0, true, false, m.softmax_scale);
    hand_over(made.transpose(1, 2), out);
    if (!want_grad) return {};
    return {o.q, o.k, in_kv ? Tensor() : o.v, lse, seed, offset};
}

void cudnn_backward(const MlaInputs& in, const Tensor& out, const std::vector<Tensor>& saved, const Tensor& dout, const MlaGradients& to, cudaStream_t stream) {
    const MlaShape& m = in.shape;
    Tensor v = saved[2].defined() ? saved[2] : v_in_kv(in);
    auto heads = [&](const Tensor& x) { return x.reshape({m.B, m.S, m.H, m.v}).transpose(1, 2); };
    auto [gq, gk, gv] = at::_scaled_dot_product_cudnn_attention_backward(
        heads(aligned(dout)), heads_first(saved[0], m), heads_first(saved[1], m), v_heads_first(v, m), heads(out), saved[3], saved[4], saved[5], document_mask(in), Tensor(), Tensor(), m.S, m.S,
        0.0, true, m.softmax_scale);
    take_apart(in, {tokens_first(gq), tokens_first(gk), tokens_first(gv)}, to, stream);
}

// ---- packed and flash: tensors as [T, heads, W], documents by their first tokens

/// Starts of documents and T, int32 on the device. Their number is a shape, so the host waits for it once; the layers of a
/// model share doc_start, so the last answer is kept, with doc_start itself, so that its memory is not another tensor's.
Tensor document_starts(const MlaInputs& in) {
    const MlaShape& m = in.shape;
    auto ints = in.q.options().dtype(at::kInt);
    if (!in.doc_start_BS.defined()) return at::arange(0, m.B * m.S + 1, m.S, ints);
    struct Last { std::mutex mutex; Tensor doc, starts; int64_t version = 0; };
    static Last& last = *new Last;                       // never destroyed: the device may be gone by then
    const Tensor& doc = in.doc_start_BS;
    const bool tracked = !doc.is_inference();            // inference tensors have no version
    std::lock_guard lock(last.mutex);
    if (tracked && last.doc.defined() && last.doc.is_same(doc) && last.version == int64_t(doc._version())) return last.starts;
    Tensor first = doc == at::arange(m.S, ints);
    Tensor starts = at::cat({at::nonzero(first.flatten()).flatten().to(at::kInt), at::full({1}, m.B * m.S, ints)});
    if (tracked) last.doc = doc, last.starts = starts, last.version = int64_t(doc._version());
    return starts;
}

// ---- packed: tensors as [T, heads, width]

/// A number of documents that plans are made for: there is one for each power of two. Of whole sequences there are B.
int64_t room_for(const MlaInputs& in, int64_t num_documents) {
    int64_t room = in.shape.B;
    while (room < num_documents) room *= 2;
    return room;
}

PackedShape packed_shape(const MlaInputs& in, int64_t room, bool in_kv) {
    const MlaShape& m = in.shape;
    return {in.kv.scalar_type(), m.B * m.S, m.S, room, m.H, m.G, width(m), m.v, m.G * (in_kv ? m.nope + m.v : m.v), in_kv ? m.nope + m.v : m.v, has_window(m) ? m.window : 0, m.softmax_scale};
}

/// Where documents lie, with room for more; the layers of a model share it, so the last answer is kept with what it was made of.
PackedDocuments shared_documents(const Tensor& starts, const PackedShape& s) {
    struct Last { std::mutex mutex; Tensor starts; PackedShape shape; PackedDocuments documents; };
    static Last& last = *new Last;                       // never destroyed: the device may be gone by then
    std::lock_guard lock(last.mutex);
    if (last.starts.defined() && last.starts.is_same(starts) && !(last.shape < s) && !(s < last.shape)) return last.documents;
    last.documents = packed_documents(at::cat({starts, at::full({s.N + 1 - starts.numel()}, s.T, starts.options())}), s);
    last.starts = starts, last.shape = s;
    return last.documents;
}

std::vector<Tensor> packed_forward(const MlaInputs& in, Tensor out, bool want_grad, cudaStream_t stream) {
    const MlaShape& m = in.shape;
    const bool in_kv = v_stays(in);
    Operands o = assemble(in, width(m), m.v, in_kv, stream);
    Tensor starts = document_starts(in), lse = at::empty({m.B * m.S, m.H}, in.q.options().dtype(at::kFloat));
    PackedShape shape = packed_shape(in, room_for(in, starts.numel() - 1), in_kv);
    cudnn_packed_forward(shape, shared_documents(starts, shape), o.q, o.k, o.v, out, lse);
    if (!want_grad) return {};
    return {o.q, o.k, in_kv ? Tensor() : o.v, lse, starts};
}

void packed_backward(const MlaInputs& in, const Tensor& out, const std::vector<Tensor>& saved, const Tensor& dout, const MlaGradients& to, cudaStream_t stream) {
    const MlaShape& m = in.shape;
    const Tensor &q = saved[0], &k = saved[1], v = saved[2].defined() ? saved[2] : v_in_kv(in), &starts = saved[4];
    PackedShape shape = packed_shape(in, room_for(in, starts.numel() - 1), !saved[2].defined());
    Operands grads{at::empty_like(q), at::empty_like(k), at::empty({m.B * m.S, m.G, m.v}, q.options())};
    cudnn_packed_backward(shape, shared_documents(starts, shape), q, k, v, out, saved[3], aligned(dout), grads.q, grads.k, grads.v);
    take_apart(in, grads, to, stream);
}

// ---- flash
int64_t flash_width(const MlaShape& m) { return round_up_to(std::max(width(m), m.v), 8); }
/// Bound of a document's length. At least 2: for 1 the library takes a way of its own that backward does not know.
int64_t longest(const MlaShape& m) { return std::max<int64_t>(m.S, 2); }
/// How far a token sees to the left and right, beside the causal mask; nothing: as far as there is.
std::optional<int64_t> window_left(const MlaShape& m) { return has_window(m) ? std::optional<int64_t>(m.window - 1) : std::nullopt; }
std::optional<int64_t> window_right(const MlaShape& m) { return has_window(m) ? std::optional<int64_t>(0) : std::nullopt; }

std::vector<Tensor> flash_forward(const MlaInputs& in, Tensor out, bool want_grad, cudaStream_t stream) {
    const MlaShape& m = in.shape;
    const int64_t W = flash_width(m);
    Operands o = assemble(in, W, W, false, stream);
    Tensor starts = document_starts(in);
    auto [made, lse, rng, unused, mask] = at::_flash_attention_forward(o.q, o.k, o.v, starts, starts, longest(m), longest(m), 0.0, true, false, m.softmax_scale, window_left(m), window_right(m));
    repadded(made.contiguous(), m.B * m.S * m.H, W, m.v, out, stream);
    if (!want_grad) return {};
    return {o.q, o.k, o.v, made, lse, rng, unused, starts};
}

void flash_backward(const MlaInputs& in, const std::vector<Tensor>& saved, const Tensor& dout, const MlaGradients& to, cudaStream_t stream) {
    const MlaShape& m = in.shape;
    const int64_t W = flash_width(m);
    Tensor padded = repadded(dout, m.B * m.S * m.H, m.v, W, at::empty({m.B * m.S, m.H, W}, dout.options()), stream);
    auto [gq, gk, gv] = at::_flash_attention_backward(padded, saved[0], saved[1], saved[2], saved[3], saved[4], saved[7], saved[7], longest(m), longest(m), 0.0, true, saved[5],
                                                      saved[6], m.softmax_scale, window_left(m), window_right(m));
    take_apart(in, {gq, gk, gv}, to, stream);
}

// ---- composed: fp32 or fp64, [B·H, S, width]

constexpr int64_t kScores = int64_t(1) << 25;      // elements of a block of scores

struct Composed {
    Tensor q, k, v;                                 // [B·H, S, D or v], k and v repeated for the query heads of a group
    int64_t rows;                                   // query rows of a block
};
Tensor by_head(const Tensor& x, const MlaShape& m) { return x.reshape({m.B, m.S, -1, x.size(-1)}).transpose(1, 2); }

Composed compose(const MlaInputs& in, cudaStream_t stream) {
    const MlaShape& m = in.shape;
    Operands o = assemble(in, width(m), m.v, false, stream);
    const auto dtype = wide_dtype(in.q);
    auto spread = [&](const Tensor& x) {
        Tensor y = by_head(x, m).to(dtype);
        return y.unsqueeze(2).expand({m.B, m.G, m.H / m.G, m.S, x.size(-1)}).reshape({m.B * m.H, m.S, x.size(-1)});
    };
    return {by_head(o.q, m).to(dtype).reshape({m.B * m.H, m.S, width(m)}), spread(o.k), spread(o.v), std::clamp<int64_t>(kScores / std::max<int64_t>(m.B * m.H * m.S, 1), 1, m.S)};
}

/// Probabilities of query rows lo … hi on keys 0 … hi: [B·H, hi − lo, hi].
Tensor probabilities(const MlaInputs& in, const Composed& c, int64_t lo, int64_t hi) {
    const MlaShape& m = in.shape;
    Tensor scores = at::bmm(c.q.narrow(1, lo, hi - lo), c.k.narrow(1, 0, hi).transpose(1, 2)).mul_(m.softmax_scale);
    auto ints = in.q.options().dtype(at::kInt);
    Tensor key = at::arange(hi, ints).view({1, 1, 1, hi}), query = at::arange(lo, hi, ints).view({1, 1, hi - lo, 1});
    Tensor hidden = key > query;
    Tensor first_BS = has_window(m) ? windowed(in.doc_start_BS, m.B, m.S, m.window, in.q.device()) : in.doc_start_BS;
    if (first_BS.defined()) hidden = hidden.logical_or(key < first_BS.narrow(1, lo, hi - lo).view({m.B, 1, hi - lo, 1}));
    scores.view({m.B, m.H, hi - lo, hi}).masked_fill_(hidden, -std::numeric_limits<double>::infinity());
    return at::softmax(scores, -1);
}

/// [B·H, S, n] → [T, H, n] in q's dtype.
Tensor by_token(const Tensor& x, const MlaInputs& in) {
    const MlaShape& m = in.shape;
    return x.reshape({m.B, m.H, m.S, x.size(-1)}).transpose(1, 2).reshape({m.B * m.S, m.H, x.size(-1)}).to(in.q.scalar_type());
}

void composed_forward(const MlaInputs& in, Tensor out, cudaStream_t stream) {
    const MlaShape& m = in.shape;
    Composed c = compose(in, stream);
    Tensor o = at::empty({m.B * m.H, m.S, m.v}, c.q.options());
    for (int64_t lo = 0; lo < m.S; lo += c.rows) {
        const int64_t hi = std::min(m.S, lo + c.rows);
        o.narrow(1, lo, hi - lo).copy_(at::bmm(probabilities(in, c, lo, hi), c.v.narrow(1, 0, hi)));
    }
    out.copy_(by_token(o, in).reshape(out.sizes()));
}

/// dS = P · (dO Vᵀ − rowsum(dO · O)) · scale; dQ = dS K, dK = dSᵀ Q, dV = Pᵀ dO.
void composed_backward(const MlaInputs& in, const Tensor& out, const Tensor& dout, const MlaGradients& to, cudaStream_t stream) {
    const MlaShape& m = in.shape;
    Composed c = compose(in, stream);
    auto heads = [&](const Tensor& x) { return by_head(x.reshape({m.B * m.S, m.H, m.v}), m).to(c.q.scalar_type()).reshape({m.B * m.H, m.S, m.v}); };
    Tensor o = heads(out), d = heads(dout), delta = (o * d).sum(-1, /*keepdim=*/true);
    Tensor gq = at::empty_like(c.q), gk = at::zeros_like(c.k), gv = at::zeros_like(c.v);
    for (int64_t lo = 0; lo < m.S; lo += c.rows) {
        const int64_t hi = std::min(m.S, lo + c.rows), n = hi - lo;
        Tensor p = probabilities(in, c, lo, hi), d_rows = d.narrow(1, lo, n);
        Tensor ds = at::bmm(d_rows, c.v.narrow(1, 0, hi).transpose(1, 2)).sub_(delta.narrow(1, lo, n)).mul_(p).mul_(m.softmax_scale);
        gv.narrow(1, 0, hi).add_(at::bmm(p.transpose(1, 2), d_rows));
        gk.narrow(1, 0, hi).add_(at::bmm(ds.transpose(1, 2), c.q.narrow(1, lo, n)));
        gq.narrow(1, lo, n).copy_(at::bmm(ds, c.k.narrow(1, 0, hi)));
    }
    auto gather = [&](const Tensor& x) {            // the sum over the query heads of a group
        Tensor y = x.reshape({m.B, m.G, m.H / m.G, m.S, x.size(-1)}).sum(2);
        return y.transpose(1, 2).reshape({m.B * m.S, m.G, x.size(-1)}).to(in.q.scalar_type());
    };
    take_apart(in, {by_token(gq, in), gather(gk), gather(gv)}, to, stream);
}
}  // namespace

std::vector<Tensor> mla_attention_forward_cuda(const MlaInputs& in, Tensor out, bool want_grad) {
    if (in.q.size(0) == 0) return {};
    OnDevice on(in.q);
    switch (way_of(in)) {
        case Way::cudnn: return cudnn_forward(in, out, want_grad, on.stream);
        case Way::packed: return packed_forward(in, out, want_grad, on.stream);
        case Way::flash: return flash_forward(in, out, want_grad, on.stream);
        case Way::composed: composed_forward(in, out, on.stream);
    }
    return {};
}

void mla_attention_backward_cuda(const MlaInputs& in, const Tensor& out, const std::vector<Tensor>& saved, const Tensor& dout, const MlaGradients& to) {
    if (in.kv.size(0) == 0) return;
    OnDevice on(in.kv);
    switch (way_of(saved)) {
        case Way::cudnn: return cudnn_backward(in, out, saved, dout, to, on.stream);
        case Way::packed: return packed_backward(in, out, saved, dout, to, on.stream);
        case Way::flash: return flash_backward(in, saved, dout, to, on.stream);
        case Way::composed: return composed_backward(in, out, dout, to, on.stream);
    }
}
}  // namespace moe::kernels
#endif
