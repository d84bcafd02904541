// Attention on the CPU: blocks of query rows against the key columns that they can see, one (sequence, key head) a task.
// Widths: k = nope + rope, v; letters as in attention.h. Rotated and scaled queries, rotated keys and their transposes exist
// for one task at a time.
#include "core/kernels/mla/attention_kernels.h"

#include "core/kernels/common/dtype.h"
#include "core/kernels/common/parallel.h"
#include "core/kernels/common/vector.h"
#include "core/kernels/quantize/quantize_kernels.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <cmath>

namespace moe::kernels {
namespace {
/// Query rows of a block: whole tiles (vector.h); more would compute more columns that the causal mask throws away.
constexpr int64_t kBlock = 8 * kTileRows;
/// Key columns of a panel: one tile's width.
template <class T> constexpr int64_t kPanel = kTileVectors * kLanes<T>;
template <class T> int64_t round_up(int64_t n) { return (n + kPanel<T> - 1) / kPanel<T> * kPanel<T>; }

/// Query rows i0 … i0 + n and the key columns c0 … end that at least one of them sees; c0 is the first of a panel.
struct Rows {
    int64_t i0, n, c0, end;
    int64_t columns() const { return end - c0; }
};

template <class T> struct Rotation {
    const T *cos, *sin;
    int64_t half;
    bool interleaved;

    /// y = x rotated by position s, times scale; backwards where inverse. x and y may be the same.
    void apply(const T* x, T* y, int64_t s, bool inverse, T scale) const {
        const T *c = cos + s * half, *d = sin + s * half;
        T sign = inverse ? -scale : scale;
        int64_t step = interleaved ? 2 : 1, other = interleaved ? 1 : half;
        for (int64_t i = 0; i < half; ++i) {
            T a = x[i * step], b = x[i * step + other];
            y[i * step] = a * c[i] * scale - b * d[i] * sign;
            y[i * step + other] = b * c[i] * scale + a * d[i] * sign;
        }
    }
};

/// One sequence and one key head: where its rows lie in the op's tensors, and the loops over them.
template <class T> struct Job {
    const MlaShape& m;
    Rotation<T> rotation;
    const T *q, *kv, *k_rope;          // of the whole op
    const int32_t* doc_start;          // of this sequence, or nullptr
    int64_t b, g;

    int64_t k_width() const { return m.nope + m.rope; }
    int64_t token(int64_t s) const { return b * m.S + s; }
    const T* q_at(int64_t s, int64_t h) const { return q + (token(s) * m.H + h) * k_width(); }
    int64_t kv_at(int64_t s) const { return (token(s) * m.G + g) * (m.nope + m.v); }
    int64_t first_seen(int64_t s) const { return doc_start ? doc_start[s] : 0; }

    Rows rows(int64_t i0) const {
        int64_t n = std::min(kBlock, m.S - i0), first = i0;
        for (int64_t i = i0; i < i0 + n; ++i) first = std::min(first, first_seen(i));
        return {i0, n, first / kPanel<T> * kPanel<T>, i0 + n};
    }

    /// k [S, k] rotated, and v [S, v].
    void load_keys(T* k, T* v) const {
        for (int64_t s = 0; s < m.S; ++s) {
            const T* x = kv + kv_at(s);
            std::copy_n(x, m.nope, k + s * k_width());
            if (m.rope) rotation.apply(k_rope + token(s) * m.rope, k + s * k_width() + m.nope, s, false, T(1));
            std::copy_n(x + m.nope, m.v, v + s * m.v);
        }
    }
    /// Rows of queries [n, k], rotated and scaled.
    void load_queries(const Rows& r, int64_t h, T* to) const {
        T scale = T(m.softmax_scale);
        for (int64_t i = 0; i < r.n; ++i) {
            const T* x = q_at(r.i0 + i, h);
            T* y = to + i * k_width();
            for (int64_t d = 0; d < m.nope; ++d) y[d] = x[d] * scale;
            if (m.rope) rotation.apply(x + m.nope, y + m.nope, r.i0 + i, false, scale);
        }
    }
};

/// x [S, width] as panels of columns, each [width, kPanel] and contiguous: far rows of a plain transpose would share cache sets.
template <class T> void transpose_to_panels(const T* x, T* y, int64_t S, int64_t width) {
    for (int64_t j0 = 0; j0 < S; j0 += kPanel<T>) {
        T* panel = y + j0 * width;
        int64_t n = std::min(kPanel<T>, S - j0);
        for (int64_t j = 0; j < n; ++j)
            for (int64_t d = 0; d < width; ++d) panel[d * kPanel<T> + j] = x[(j0 + j) * width + d];
    }
}

/// out [n, columns] (rows ld apart) = a [n, width] times the panels of the columns seen. Panels are padded to whole tiles.
template <class T> void times_panels(const Rows& r, const T* a, int64_t width, const T* panels, T* out, int64_t ld) {
    for (int64_t j0 = r.c0; j0 < r.end; j0 += kPanel<T>)
        product(r.n, kPanel<T>, width, a, width, int64_t(1), panels + j0 * width, kPanel<T>, out + j0 - r.c0, ld, false);
}

/// Zeros outside [lo, hi) of a row.
template <class T> void keep_only(T* x, int64_t lo, int64_t hi, int64_t columns) {
    std::fill(x, x + lo, T(0));
    std::fill(x + hi, x + columns, T(0));
}

// The loops below go over whole vectors, up to a vector's width outside [lo, hi): those scores exist (a block is computed whole)
// and become 0 afterwards.

/// Scores of one row become e^(score − max), 0 outside [lo, hi); returns {max, sum}.
template <class T> std::pair<T, T> exponentials(T* x, int64_t lo, int64_t hi, int64_t columns) {
    int64_t first = lo / kLanes<T> * kLanes<T>, last = (hi + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
    T top = largest(x + lo, hi - lo), sum = 0;
    #pragma omp simd
    for (int64_t j = first; j < last; ++j) x[j] = vexp(x[j] - top);
    keep_only(x, lo, hi, std::max(columns, last));
    #pragma omp simd reduction(+:sum)
    for (int64_t j = first; j < last; ++j) sum += x[j];
    return {top, sum};
}

/// Scores become probabilities, dp becomes the scores' gradient; both 0 outside [lo, hi).
template <class T> void score_gradients(T* x, T* dp, T lse, T delta, int64_t lo, int64_t hi, int64_t columns) {
    int64_t first = lo / kLanes<T> * kLanes<T>, last = (hi + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
    #pragma omp simd
    for (int64_t j = first; j < last; ++j) {
        x[j] = vexp(x[j] - lse);
        dp[j] = x[j] * (dp[j] - delta);
    }
    keep_only(x, lo, hi, std::max(columns, last));
    keep_only(dp, lo, hi, std::max(columns, last));
}

/// Distance of score rows: whole panels and a line more, so that rows do not share cache sets.
template <class T> int64_t score_stride(const MlaShape& m) { return round_up<T>(m.S) + 16; }

template <class T> struct ForwardBuffers {
    std::vector<T> k, v, k_panels, queries, scores;
    explicit ForwardBuffers(const MlaShape& m)
        : k(m.S * (m.nope + m.rope)), v(m.S * m.v), k_panels(round_up<T>(m.S) * (m.nope + m.rope)), queries(kBlock * (m.nope + m.rope)), scores(kBlock * score_stride<T>(m)) {}
};

/// One head: out rows are H·v apart; lse [S].
template <class T> void head_forward(const Job<T>& job, int64_t h, ForwardBuffers<T>& buf, T* out, T* lse) {
    const MlaShape& m = job.m;
    int64_t ld = score_stride<T>(m), ldo = m.H * m.v;
    for (int64_t i0 = 0; i0 < m.S; i0 += kBlock) {
        Rows r = job.rows(i0);
        job.load_queries(r, h, buf.queries.data());
        times_panels(r, buf.queries.data(), job.k_width(), buf.k_panels.data(), buf.scores.data(), ld);
        T inverse[kBlock];
        for (int64_t i = 0; i < r.n; ++i) {
            auto [top, sum] = exponentials(buf.scores.data() + i * ld, job.first_seen(i0 + i) - r.c0, i0 + i + 1 - r.c0, r.columns());
            lse[i0 + i] = top + std::log(sum);
            inverse[i] = 1 / sum;
        }
        T* o = out + job.token(i0) * ldo + h * m.v;
        product(r.n, m.v, r.columns(), buf.scores.data(), ld, int64_t(1), buf.v.data() + r.c0 * m.v, m.v, o, ldo, false);
        for (int64_t i = 0; i < r.n; ++i)
            for (int64_t d = 0; d < m.v; ++d) o[i * ldo + d] *= inverse[i];
    }
}

template <class T> struct BackwardBuffers : ForwardBuffers<T> {
    std::vector<T> v_panels, dout, dqueries, dscores, dk, dv;
    explicit BackwardBuffers(const MlaShape& m)
        : ForwardBuffers<T>(m), v_panels(round_up<T>(m.S) * m.v), dout(kBlock * m.v), dqueries(kBlock * (m.nope + m.rope)), dscores(kBlock * score_stride<T>(m)),
          dk(m.S * (m.nope + m.rope)), dv(m.S * m.v) {}
};

/// Where one head's results lie.
template <class T> struct HeadGradients {
    const T *out, *dout, *lse;
    T* dq;
};

/// Gradient of the queries of a block, back through scale and rotation into dq.
template <class T> void store_queries(const Job<T>& job, const Rows& r, int64_t h, const T* from, T* dq) {
    const MlaShape& m = job.m;
    T scale = T(m.softmax_scale);
    for (int64_t i = 0; i < r.n; ++i) {
        const T* x = from + i * job.k_width();
        T* y = dq + (job.token(r.i0 + i) * m.H + h) * job.k_width();
        for (int64_t d = 0; d < m.nope; ++d) y[d] = x[d] * scale;
        if (m.rope) job.rotation.apply(x + m.nope, y + m.nope, r.i0 + i, true, scale);
    }
}

/// One head: writes dq, adds to buf.dk (rotated keys' gradient) and buf.dv.
template <class T> void head_backward(const Job<T>& job, int64_t h, BackwardBuffers<T>& buf, const HeadGradients<T>& grads) {
    const MlaShape& m = job.m;
    int64_t ld = score_stride<T>(m), ldo = m.H * m.v, K = job.k_width();
    T *scores = buf.scores.data(), *dscores = buf.dscores.data(), *dout = buf.dout.data();
    for (int64_t i0 = 0; i0 < m.S; i0 += kBlock) {
        Rows r = job.rows(i0);
        job.load_queries(r, h, buf.queries.data());
        for (int64_t i = 0; i < r.n; ++i) std::copy_n(grads.dout + job.token(i0 + i) * ldo + h * m.v, m.v, dout + i * m.v);
        times_panels(r, buf.queries.data(), K, buf.k_panels.data(), scores, ld);
        times_panels(r, dout, m.v, buf.v_panels.data(), dscores, ld);
        for (int64_t i = 0; i < r.n; ++i) {
            const T* out = grads.out + job.token(i0 + i) * ldo + h * m.v;
            T delta = 0;
            for (int64_t d = 0; d < m.v; ++d) delta += out[d] * dout[i * m.v + d];
            score_gradients(scores + i * ld, dscores + i * ld, grads.lse[i0 + i], delta, job.first_seen(i0 + i) - r.c0, i0 + i + 1 - r.c0, r.columns());
        }
        product(r.n, K, r.columns(), dscores, ld, int64_t(1), buf.k.data() + r.c0 * K, K, buf.dqueries.data(), K, false);
        store_queries(job, r, h, buf.dqueries.data(), grads.dq);
        product(r.columns(), K, r.n, dscores, int64_t(1), ld, buf.queries.data(), K, buf.dk.data() + r.c0 * K, K, true);
        product(r.columns(), m.v, r.n, scores, int64_t(1), ld, dout, m.v, buf.dv.data() + r.c0 * m.v, m.v, true);
    }
}

/// Keys' and values' gradients of a job: dkv directly, the rotated part into this key head's own rows [S, rope].
template <class T> void store_keys(const Job<T>& job, const BackwardBuffers<T>& buf, T* dkv, T* dk_rope) {
    const MlaShape& m = job.m;
    for (int64_t s = 0; s < m.S; ++s) {
        const T* dk = buf.dk.data() + s * job.k_width();
        T* to = dkv + job.kv_at(s);
        std::copy_n(dk, m.nope, to);
        std::copy_n(buf.dv.data() + s * m.v, m.v, to + m.nope);
        if (m.rope) job.rotation.apply(dk + m.nope, dk_rope + s * m.rope, s, true, T(1));
    }
}

template <class T> Job<T> job_at(const MlaInputs& in, int64_t index) {
    int64_t b = index / in.shape.G, g = index % in.shape.G;
    Rotation<T> rotation{data<T>(in.table.cos), data<T>(in.table.sin), in.shape.rope / 2, in.table.interleaved};
    const int32_t* docs = data<int32_t>(in.doc_start_BS);
    return {in.shape, rotation, data<T>(in.q), data<T>(in.kv), data<T>(in.k_rope), docs ? docs + b * in.shape.S : nullptr, b, g};
}

template <class T> void forward_jobs(const MlaInputs& in, Tensor& out, Tensor& lse_BHS) {
    const MlaShape& m = in.shape;
    T *o = mutable_data<T>(out), *lse = mutable_data<T>(lse_BHS);
    share_out(m.B * m.G, [&](auto take) {
        ForwardBuffers<T> buf(m);
        for (int64_t index; (index = take()) < m.B * m.G;) {
            auto job = job_at<T>(in, index);
            job.load_keys(buf.k.data(), buf.v.data());
            transpose_to_panels(buf.k.data(), buf.k_panels.data(), m.S, job.k_width());
            for (int64_t h = job.g * (m.H / m.G); h < (job.g + 1) * (m.H / m.G); ++h) head_forward(job, h, buf, o, lse + (job.b * m.H + h) * m.S);
        }
    });
}

template <class T> void backward_jobs(const MlaInputs& in, const Tensor& out, const Tensor& lse_BHS, const Tensor& dout, Tensor& dq, Tensor& dkv, Tensor& dk_rope_BGSR) {
    const MlaShape& m = in.shape;
    share_out(m.B * m.G, [&](auto take) {
        BackwardBuffers<T> buf(m);
        for (int64_t index; (index = take()) < m.B * m.G;) {
            auto job = job_at<T>(in, index);
            job.load_keys(buf.k.data(), buf.v.data());
            transpose_to_panels(buf.k.data(), buf.k_panels.data(), m.S, job.k_width());
            transpose_to_panels(buf.v.data(), buf.v_panels.data(), m.S, m.v);
            std::fill(buf.dk.begin(), buf.dk.end(), T(0));
            std::fill(buf.dv.begin(), buf.dv.end(), T(0));
            for (int64_t h = job.g * (m.H / m.G); h < (job.g + 1) * (m.H / m.G); ++h)
                head_backward<T>(job, h, buf, {data<T>(out), data<T>(dout), data<T>(lse_BHS) + (job.b * m.H + h) * m.S, mutable_data<T>(dq)});
            store_keys(job, buf, mutable_data<T>(dkv), dk_rope_BGSR.defined() ? mutable_data<T>(dk_rope_BGSR) + index * m.S * m.rope : nullptr);
        }
    });
}

/// The inputs in the dtype of the loops: bf16 and fp16 run in fp32.
MlaInputs widened(const MlaInputs& in) {
    MlaInputs out = in;
    auto dtype = wide_dtype(in.q);
    out.q = in.q.to(dtype);
    out.kv = in.kv.to(dtype);
    if (in.k_rope.defined()) out.k_rope = in.k_rope.to(dtype);
    return out;
}
}  // namespace

std::vector<Tensor> mla_attention_forward_cpu(const MlaInputs& in, Tensor out, bool want_grad) {
    MlaInputs wide = widened(in);
    auto options = wide.q.options();
    Tensor lse_BHS = at::empty({in.shape.B, in.shape.H, in.shape.S}, options);
    Tensor result = out.scalar_type() == wide.q.scalar_type() ? out : at::empty(out.sizes(), options);
    by_wide_dtype("mla_attention", wide.q, [&](auto zero) { forward_jobs<decltype(zero)>(wide, result, lse_BHS); });
    if (!result.is_same(out)) out.copy_(result);
    return {lse_BHS};
}

void mla_attention_backward_cpu(const MlaInputs& in, const Tensor& out, const std::vector<Tensor>& saved, const Tensor& dout, const MlaGradients& to) {
    Tensor dq = to.q, dkv = to.kv, dk_rope = to.k_rope;
    const MlaShape& m = in.shape;
    MlaInputs wide = widened(in);
    auto dtype = wide.q.scalar_type();
    bool same = dq.scalar_type() == dtype;
    Tensor wide_dq = same ? dq : at::empty_like(wide.q), wide_dkv = same ? dkv : at::empty_like(wide.kv), parts_BGSR;
    // Every key head has rows of its own for the shared part, added up in the order of heads.
    if (dk_rope.defined()) parts_BGSR = at::empty({m.B, m.G, m.S, m.rope}, wide.q.options());
    Tensor wide_out = out.to(dtype), wide_dout = dout.to(dtype);
    by_wide_dtype("mla_attention", wide.q, [&](auto zero) { backward_jobs<decltype(zero)>(wide, wide_out, saved[0], wide_dout, wide_dq, wide_dkv, parts_BGSR); });
    if (!same) {
        dq.copy_(wide_dq);
        dkv.copy_(wide_dkv);
    }
    fill_copy_cpu(dq, to.q_copy);
    fill_copy_cpu(dkv, to.kv_copy);
    if (!dk_rope.defined()) return;
    Tensor sum_BSR = parts_BGSR.select(1, 0).clone();
    for (int64_t g = 1; g < m.G; ++g) sum_BSR.add_(parts_BGSR.select(1, g));
    dk_rope.copy_(sum_BSR.view(dk_rope.sizes()));
}
}  // namespace moe::kernels
