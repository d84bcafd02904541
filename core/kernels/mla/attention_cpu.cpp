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

/// Rows that a causal product takes at a time: more would multiply zeros beyond the diagonal, fewer would leave tiles short.
constexpr int64_t kStep = 2 * kTileRows;
/// Rows ahead that loops over strided rows ask for: one head's rows are too far apart for the processor to foresee.
constexpr int64_t kAhead = 12;

/// Asks for the cache lines of n elements; nothing is read, so p may be past the end.
template <bool to_write = false, class T> void ask_for(const T* p, int64_t n) {
    for (int64_t i = 0; i < n; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(p + i, to_write);
    __builtin_prefetch(p + n - 1, to_write);
}

/// Whether there is neither NaN nor an infinity.
template <class T> bool all_finite(const T* x, int64_t n) {
    T sum = 0;
    #pragma omp simd reduction(+:sum)
    for (int64_t i = 0; i < n; ++i) sum += x[i] * T(0);
    return sum == 0;
}

/// Query rows i0 … i0 + n and the key columns c0 … end that at least one of them sees; c0 is the first of a panel.
struct Rows {
    int64_t i0, n, c0, end;
    int64_t columns() const { return end - c0; }
};

/// The rotary table as whole rows of factors: y[i] = x[i] · own[i] + x[partner of i] · other[i].
template <class T> struct Rotation {
    using V = typename VectorOf<T>::type;
    int64_t width = 0;
    bool interleaved = true;
    std::vector<T> own, other;                 ///< [S, width]

    Rotation(const RopeTable& table, int64_t S, int64_t rope) : width(rope), interleaved(table.interleaved), own(size_t(S * rope)), other(size_t(S * rope)) {
        const T *cos = data<T>(table.cos), *sin = data<T>(table.sin);
        for (int64_t s = 0; s < S; ++s)
            for (int64_t i = 0; i < rope / 2; ++i) {
                int64_t a = s * rope + (interleaved ? 2 * i : i), b = a + (interleaved ? 1 : rope / 2), from = s * (rope / 2) + i;
                own[size_t(a)] = own[size_t(b)] = cos[from];
                other[size_t(a)] = -sin[from];
                other[size_t(b)] = sin[from];
            }
    }

    /// y = x rotated by position s, times scale; backwards where inverse. x and y may be the same.
    void apply(const T* x, T* y, int64_t s, bool inverse, T scale) const {
        const T *c = own.data() + s * width, *d = other.data() + s * width;
        T sign = inverse ? -scale : scale;
        int64_t half = width / 2, n = interleaved ? width : half, i = 0;
        for (; i + kLanes<T> <= n; i += kLanes<T>) {
            V a = at(x + i);
            if (interleaved) {
                at(y + i) = a * at(c + i) * scale + swap_pairs(a) * at(d + i) * sign;
            } else {
                V b = at(x + half + i);
                at(y + i) = a * at(c + i) * scale + b * at(d + i) * sign;
                at(y + half + i) = b * at(c + half + i) * scale + a * at(d + half + i) * sign;
            }
        }
        for (int64_t step = interleaved ? 2 : 1, far = interleaved ? 1 : half; i < n; i += step) {
            T a = x[i], b = x[i + far];
            y[i] = a * c[i] * scale + b * d[i] * sign;
            y[i + far] = b * c[i + far] * scale + a * d[i + far] * sign;
        }
    }

private:
    static const V& at(const T* p) { return *reinterpret_cast<const V*>(p); }
    static V& at(T* p) { return *reinterpret_cast<V*>(p); }
    static V swap_pairs(const V& x) {
        if constexpr (kLanes<T> == 2) return __builtin_shufflevector(x, x, 1, 0);
        else if constexpr (kLanes<T> == 4) return __builtin_shufflevector(x, x, 1, 0, 3, 2);
        else if constexpr (kLanes<T> == 8) return __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6);
        else return __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    }
};

/// One sequence and one key head: where its rows lie in the op's tensors, and the loops over them.
template <class T> struct Job {
    const MlaShape& m;
    const Rotation<T>& rotation;
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
            ask_for(kv + kv_at(s + kAhead), m.nope + m.v);
            std::copy_n(x, m.nope, k + s * k_width());
            if (m.rope) rotation.apply(k_rope + token(s) * m.rope, k + s * k_width() + m.nope, s, false, T(1));
            std::copy_n(x + m.nope, m.v, v + s * m.v);
        }
    }
    /// Asks for the rows of queries of a block: called a block ahead.
    void ask_for_queries(int64_t i0, int64_t h) const {
        for (int64_t s = i0; s < std::min(i0 + kBlock, m.S); ++s) ask_for(q_at(s, h), k_width());
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

/// out [n, columns] (rows ld apart) = a [n, width] times the panels of the columns seen; rows that see nothing of a panel are left as they
/// are. Panels are padded to whole tiles.
template <class T> void times_panels(const Rows& r, const T* a, int64_t width, const T* panels, T* out, int64_t ld) {
    for (int64_t j0 = r.c0; j0 < r.end; j0 += kPanel<T>) {
        int64_t i = std::max<int64_t>(0, j0 - r.i0) / kTileRows * kTileRows;
        product(r.n - i, kPanel<T>, width, a + i * width, width, int64_t(1), panels + j0 * width, kPanel<T>, out + i * ld + j0 - r.c0, ld, false);
    }
}

/// out [n, N] = a [n, columns] b [columns, N], a being 0 where a column is later than the row.
template <class T> void causal_product(const Rows& r, int64_t N, const T* a, int64_t ld, const T* b, T* out, int64_t ldo) {
    for (int64_t i = 0; i < r.n; i += kStep) {
        int64_t n = std::min(kStep, r.n - i);
        product(n, N, r.i0 + i + n - r.c0, a + i * ld, ld, int64_t(1), b, N, out + i * ldo, ldo, false);
    }
}
/// out [columns, N] += aᵀ b [n, N] with the same a.
template <class T> void add_causal_product_t(const Rows& r, int64_t N, const T* a, int64_t ld, const T* b, T* out) {
    int64_t before = r.i0 - r.c0;
    product(before, N, r.n, a, int64_t(1), ld, b, N, out, N, true);
    for (int64_t i = 0; i < r.n; i += kStep)
        product(std::min(kStep, r.n - i), N, r.n - i, a + i * ld + before + i, int64_t(1), ld, b + i * N, N, out + (before + i) * N, N, true);
}

// Both multiply zeros where a row of the block sees less than others, and 0 · NaN is NaN: a token that is not finite would reach rows that do not see it. Where b is not
// finite the two below take its place, row by row over [lo, hi), the columns seen.
template <class T> void product_of_seen(const Job<T>& job, const Rows& r, int64_t N, const T* a, int64_t ld, const T* b, T* out, int64_t ldo) {
    for (int64_t i = 0; i < r.n; ++i) {
        int64_t lo = job.first_seen(r.i0 + i) - r.c0, hi = r.i0 + i + 1 - r.c0;
        product(1, N, hi - lo, a + i * ld + lo, ld, int64_t(1), b + lo * N, N, out + i * ldo, ldo, false);
    }
}
template <class T> void add_product_of_seen_t(const Job<T>& job, const Rows& r, int64_t N, const T* a, int64_t ld, const T* b, T* out) {
    for (int64_t i = 0; i < r.n; ++i) {
        int64_t lo = job.first_seen(r.i0 + i) - r.c0, hi = r.i0 + i + 1 - r.c0;
        product(hi - lo, N, int64_t(1), a + i * ld + lo, int64_t(1), ld, b + i * N, N, out + lo * N, N, true);
    }
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
    constexpr T kNothing = T(-1e30);                  // what it adds to the sum, which is at least 1, is lost in rounding
    int64_t first = lo / kLanes<T> * kLanes<T>, last = (hi + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
    T top = largest(x + lo, hi - lo), sum = 0;
    std::fill(x + first, x + lo, kNothing);
    std::fill(x + hi, x + last, kNothing);
    #pragma omp simd reduction(+:sum)
    for (int64_t j = first; j < last; ++j) {
        T e = vexp(x[j] - top);
        sum += e;
        x[j] = e;
    }
    keep_only(x, lo, hi, std::max(columns, last));
    return {top, sum};
}

template <class T> void add_to(const T* x, T* sum, int64_t n) {
    #pragma omp simd
    for (int64_t d = 0; d < n; ++d) sum[d] += x[d];
}

template <class T> T dot(const T* x, const T* y, int64_t n) {
    T sum = 0;
    #pragma omp simd reduction(+:sum)
    for (int64_t d = 0; d < n; ++d) sum += x[d] * y[d];
    return sum;
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

/// One head: out rows are H·v apart; lse [S]. finite: buf.v is.
template <class T> void head_forward(const Job<T>& job, int64_t h, ForwardBuffers<T>& buf, bool finite, T* out, T* lse) {
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
            if (i0 + kBlock + i < m.S) ask_for(job.q_at(i0 + kBlock + i, h), job.k_width());
        }
        T* o = out + job.token(i0) * ldo + h * m.v;
        if (finite) causal_product(r, m.v, buf.scores.data(), ld, buf.v.data() + r.c0 * m.v, o, ldo);
        else product_of_seen(job, r, m.v, buf.scores.data(), ld, buf.v.data() + r.c0 * m.v, o, ldo);
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

/// One head: writes dq, adds to buf.dk (rotated keys' gradient) and buf.dv. finite: buf.k is.
template <class T> void head_backward(const Job<T>& job, int64_t h, BackwardBuffers<T>& buf, bool finite, const HeadGradients<T>& grads) {
    const MlaShape& m = job.m;
    int64_t ld = score_stride<T>(m), ldo = m.H * m.v, K = job.k_width();
    auto ask_for_row = [&](int64_t s) {               // what the block that has position s will read and write
        if (s >= m.S) return;
        ask_for(job.q_at(s, h), K);
        ask_for(grads.out + job.token(s) * ldo + h * m.v, m.v);
        ask_for(grads.dout + job.token(s) * ldo + h * m.v, m.v);
        ask_for<true>(grads.dq + (job.token(s) * m.H + h) * K, K);
    };
    T *scores = buf.scores.data(), *dscores = buf.dscores.data(), *dout = buf.dout.data();
    for (int64_t i0 = 0; i0 < m.S; i0 += kBlock) {
        Rows r = job.rows(i0);
        job.load_queries(r, h, buf.queries.data());
        for (int64_t i = 0; i < r.n; ++i) std::copy_n(grads.dout + job.token(i0 + i) * ldo + h * m.v, m.v, dout + i * m.v);
        times_panels(r, buf.queries.data(), K, buf.k_panels.data(), scores, ld);
        times_panels(r, dout, m.v, buf.v_panels.data(), dscores, ld);
        for (int64_t i = 0; i < r.n; ++i) {
            const T* out = grads.out + job.token(i0 + i) * ldo + h * m.v;
            ask_for_row(i0 + kBlock + i);
            score_gradients(scores + i * ld, dscores + i * ld, grads.lse[i0 + i], dot(out, dout + i * m.v, m.v), job.first_seen(i0 + i) - r.c0, i0 + i + 1 - r.c0, r.columns());
        }
        auto add_t = [&](int64_t N, const T* a, const T* b, T* sum) {
            if (all_finite(b, r.n * N)) add_causal_product_t(r, N, a, ld, b, sum);
            else add_product_of_seen_t(job, r, N, a, ld, b, sum);
        };
        if (finite) causal_product(r, K, dscores, ld, buf.k.data() + r.c0 * K, buf.dqueries.data(), K);
        else product_of_seen(job, r, K, dscores, ld, buf.k.data() + r.c0 * K, buf.dqueries.data(), K);
        store_queries(job, r, h, buf.dqueries.data(), grads.dq);
        add_t(K, dscores, buf.queries.data(), buf.dk.data() + r.c0 * K);
        add_t(m.v, scores, dout, buf.dv.data() + r.c0 * m.v);
    }
}

/// Keys' and values' gradients of a job: dkv directly, the rotated part into this key head's own rows [S, rope].
template <class T> void store_keys(const Job<T>& job, const BackwardBuffers<T>& buf, T* dkv, T* dk_rope) {
    const MlaShape& m = job.m;
    for (int64_t s = 0; s < m.S; ++s) {
        const T* dk = buf.dk.data() + s * job.k_width();
        T* to = dkv + job.kv_at(s);
        if (s + kAhead < m.S) ask_for<true>(dkv + job.kv_at(s + kAhead), m.nope + m.v);
        std::copy_n(dk, m.nope, to);
        std::copy_n(buf.dv.data() + s * m.v, m.v, to + m.nope);
        if (m.rope) job.rotation.apply(dk + m.nope, dk_rope + s * m.rope, s, true, T(1));
    }
}

template <class T> Job<T> job_at(const MlaInputs& in, const Rotation<T>& rotation, int64_t index) {
    int64_t b = index / in.shape.G, g = index % in.shape.G;
    const int32_t* docs = data<int32_t>(in.doc_start_BS);
    return {in.shape, rotation, data<T>(in.q), data<T>(in.kv), data<T>(in.k_rope), docs ? docs + b * in.shape.S : nullptr, b, g};
}

template <class T> void forward_jobs(const MlaInputs& in, Tensor& out, Tensor& lse_BHS) {
    const MlaShape& m = in.shape;
    T *o = mutable_data<T>(out), *lse = mutable_data<T>(lse_BHS);
    const Rotation<T> rotation(in.table, m.S, m.rope);
    share_out(m.B * m.G, [&](auto take) {
        ForwardBuffers<T> buf(m);
        for (int64_t index; (index = take()) < m.B * m.G;) {
            auto job = job_at<T>(in, rotation, index);
            job.ask_for_queries(0, job.g * (m.H / m.G));
            job.load_keys(buf.k.data(), buf.v.data());
            transpose_to_panels(buf.k.data(), buf.k_panels.data(), m.S, job.k_width());
            bool finite = all_finite(buf.v.data(), m.S * m.v);
            for (int64_t h = job.g * (m.H / m.G); h < (job.g + 1) * (m.H / m.G); ++h) head_forward(job, h, buf, finite, o, lse + (job.b * m.H + h) * m.S);
        }
    });
}

template <class T> void backward_jobs(const MlaInputs& in, const Tensor& out, const Tensor& lse_BHS, const Tensor& dout, Tensor& dq, Tensor& dkv, Tensor& dk_rope_BGSR) {
    const MlaShape& m = in.shape;
    const Rotation<T> rotation(in.table, m.S, m.rope);
    share_out(m.B * m.G, [&](auto take) {
        BackwardBuffers<T> buf(m);
        for (int64_t index; (index = take()) < m.B * m.G;) {
            auto job = job_at<T>(in, rotation, index);
            job.load_keys(buf.k.data(), buf.v.data());
            transpose_to_panels(buf.k.data(), buf.k_panels.data(), m.S, job.k_width());
            transpose_to_panels(buf.v.data(), buf.v_panels.data(), m.S, m.v);
            std::fill(buf.dk.begin(), buf.dk.end(), T(0));
            std::fill(buf.dv.begin(), buf.dv.end(), T(0));
            bool finite = all_finite(buf.k.data(), m.S * job.k_width());
            for (int64_t h = job.g * (m.H / m.G); h < (job.g + 1) * (m.H / m.G); ++h)
                head_backward<T>(job, h, buf, finite, {data<T>(out), data<T>(dout), data<T>(lse_BHS) + (job.b * m.H + h) * m.S, mutable_data<T>(dq)});
            store_keys(job, buf, mutable_data<T>(dkv), dk_rope_BGSR.defined() ? mutable_data<T>(dk_rope_BGSR) + index * m.S * m.rope : nullptr);
        }
    });
}

/// dk_rope [B·S, rope] = the sum of parts [B, G, S, rope] over key heads, in their order.
template <class T> void sum_key_heads(const T* parts, const MlaShape& m, T* dk_rope) {
    int64_t one = m.S * m.rope;
    at::parallel_for(0, m.B, 1, [=](int64_t lo, int64_t hi) {
        for (int64_t b = lo; b < hi; ++b) {
            T* to = dk_rope + b * one;
            std::copy_n(parts + b * m.G * one, one, to);
            for (int64_t g = 1; g < m.G; ++g) add_to(parts + (b * m.G + g) * one, to, one);
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
    Tensor wide_dk_rope = same ? dk_rope : at::empty_like(dk_rope, wide.q.options());
    by_wide_dtype("mla_attention", wide.q, [&](auto zero) { sum_key_heads(data<decltype(zero)>(parts_BGSR), m, mutable_data<decltype(zero)>(wide_dk_rope)); });
    if (!same) dk_rope.copy_(wide_dk_rope);
}
}  // namespace moe::kernels
