// Sliding windows and dropped probabilities, against attention written as plain loops, gradients too.
#include "core/kernels/mla/attention.h"
#include "tests/differences.h"
#include "tests/unit/kernels/reference.h"

#include <algorithm>

using namespace moe;
using namespace moe::kernels;
using namespace moe::kernels::test;

namespace {
struct Attention {
    MlaShape m;
    bool interleaved = true;
    std::vector<double> q, kv, k_rope;
    std::vector<int32_t> doc_start;                       ///< [B, S], empty for none
    std::vector<double> mask;                             ///< [B · S · H, S] multipliers of the probabilities, empty for none

    Tensor tensor(const std::vector<double>& x) const {
        Tensor t = at::empty({m.B * m.S, int64_t(x.size()) / (m.B * m.S)}, at::kDouble);
        std::copy(x.begin(), x.end(), t.mutable_data_ptr<double>());
        return t;
    }
    Tensor documents() const {
        if (doc_start.empty()) return {};
        Tensor t = at::empty({m.B, m.S}, at::kInt);
        std::copy(doc_start.begin(), doc_start.end(), t.mutable_data_ptr<int32_t>());
        return t;
    }
    RopeTable table() const { return m.rope ? rope_table(m.S, m.rope, 100, interleaved, {}, at::kDouble, at::kCPU) : RopeTable{}; }

    /// Pair i of x turned by position · 100^(−2i/rope).
    std::vector<double> turned(const double* x, int64_t position) const {
        std::vector<double> y(size_t(m.rope));
        for (int64_t i = 0; i < m.rope / 2; ++i) {
            int64_t a = interleaved ? 2 * i : i, b = interleaved ? 2 * i + 1 : i + m.rope / 2;
            double angle = double(position) * std::pow(100.0, -2.0 * double(i) / double(m.rope)), c = std::cos(angle), s = std::sin(angle);
            y[size_t(a)] = x[a] * c - x[b] * s;
            y[size_t(b)] = x[a] * s + x[b] * c;
        }
        return y;
    }
    double score(int64_t b, int64_t h, int64_t s, int64_t j) const {
        const double *query = &q[size_t(((b * m.S + s) * m.H + h) * (m.nope + m.rope))], *key = &kv[size_t(((b * m.S + j) * m.G + h * m.G / m.H) * (m.nope + m.v))];
        double sum = 0;
        for (int64_t d = 0; d < m.nope; ++d) sum += query[d] * key[d];
        if (m.rope == 0) return sum * m.softmax_scale;
        auto x = turned(query + m.nope, s), y = turned(&k_rope[size_t((b * m.S + j) * m.rope)], j);
        for (int64_t d = 0; d < m.rope; ++d) sum += x[size_t(d)] * y[size_t(d)];
        return sum * m.softmax_scale;
    }
    std::vector<double> plain() const {
        std::vector<double> out(size_t(m.B * m.S * m.H * m.v));
        for (int64_t b = 0; b < m.B; ++b)
            for (int64_t h = 0; h < m.H; ++h)
                for (int64_t s = 0; s < m.S; ++s) {
                    std::vector<double> p(size_t(m.S));
                    double sum = 0;
                    for (int64_t j = 0; j <= s; ++j) {
                        bool same_document = doc_start.empty() || j >= doc_start[size_t(b * m.S + s)], near = m.window == 0 || s - j < m.window;
                        if (same_document && near) sum += p[size_t(j)] = std::exp(score(b, h, s, j));
                    }
                    for (int64_t j = 0; j <= s; ++j)
                        for (int64_t d = 0; d < m.v; ++d)
                            out[size_t(((b * m.S + s) * m.H + h) * m.v + d)] += p[size_t(j)] / sum * (mask.empty() ? 1 : mask[size_t(((b * m.S + s) * m.H + h) * m.S + j)])
                                                                               * kv[size_t(((b * m.S + j) * m.G + h * m.G / m.H) * (m.nope + m.v) + m.nope + d)];
                }
        return out;
    }
};

Attention attention(MlaShape m, bool docs, bool interleaved = true) {
    m.softmax_scale = 0.6;
    Attention a{m, interleaved, values(randn("q", {m.B * m.S * m.H * (m.nope + m.rope)})), values(randn("kv", {m.B * m.S * m.G * (m.nope + m.v)})), values(randn("k_rope", {m.B * m.S * m.rope})), {}, {}};
    for (int64_t i = 0; docs && i < m.B * m.S; ++i) {
        int64_t s = i % m.S, cut = m.S / 3 + i / m.S;
        a.doc_start.push_back(int32_t(s < cut ? 0 : s < m.S - 2 ? cut : m.S - 2));
    }
    return a;
}

struct Result { Tensor out; std::vector<Tensor> grads; };
/// f(q, kv, k_rope) and its gradients of all that it was given.
template <class F> Result with_gradients(const Attention& a, const Tensor& dout, F f) {
    std::vector<Tensor> inputs = {leaf(a.tensor(a.q)), leaf(a.tensor(a.kv))};
    Tensor k_rope;
    if (a.m.rope) inputs.push_back(k_rope = leaf(a.tensor(a.k_rope)));
    Tensor out = f(inputs[0], inputs[1], k_rope);
    return {out, backward(out, inputs, dout)};
}

/// Values and gradients of `got` against those of the loops.
void check(Attention& a, const Result& got, const Tensor& dout) {
    require_close(got.out, a.plain(), 1e-13);
    auto up = values(dout);
    auto sum = [&] {
        auto out = a.plain();
        double s = 0;
        for (size_t i = 0; i < out.size(); ++i) s += out[i] * up[i];
        return s;
    };
    std::vector<double>* inputs[] = {&a.q, &a.kv, &a.k_rope};
    for (size_t i = 0; i < got.grads.size(); ++i) {
        auto want = moe::test::gradient(*inputs[i], sum);
        bool is_zero = std::all_of(want.begin(), want.end(), [](double g) { return g == 0; });      // who sees one key alone: then P (dP - sum of P dP) rounds to about 0
        if (is_zero) CHECK(got.grads[i].abs().max().item<double>() < 1e-14);
        else require_close(got.grads[i], want, 1e-8);
    }
}

RandomRows rows_of(const MlaShape& m) { return {{5, Purpose::attention_dropout, 2, 1}, 3 * m.H, m.H, m.H}; }
}  // namespace

TEST_CASE("mla_attention: a sliding window equals plain loops, gradients to 1e-8, with and without documents", "[kernels][mla]") {
    bool docs = GENERATE(false, true);
    int64_t window = GENERATE(1, 3, 8);
    for (MlaShape m : {MlaShape{2, 6, 2, 1, 2, 2, 2}, MlaShape{1, 7, 2, 2, 3, 0, 2}}) {
        m.window = window;
        Attention a = attention(m, docs);
        Tensor dout = randn("dout", {m.B * m.S, m.H * m.v});
        check(a, with_gradients(a, dout, [&](auto& q, auto& kv, auto& k_rope) { return mla_attention(q, kv, k_rope, a.table(), a.m, a.documents()); }), dout);
    }
}

TEST_CASE("mla_attention: a window across several blocks of rows equals plain loops, one as long as the sequence changes nothing", "[kernels][mla]") {
    Attention a = attention({2, 150, 4, 2, 6, 4, 10}, GENERATE(false, true));
    auto run = [&](int64_t window) {
        a.m.window = window;
        return mla_attention(a.tensor(a.q), a.tensor(a.kv), a.tensor(a.k_rope), a.table(), a.m, a.documents());
    };
    Tensor whole = run(0);
    CHECK(bit_equal(run(150), whole));
    CHECK(bit_equal(run(1000), whole));
    for (int64_t window : {1, 7, 64, 65, 149}) {
        INFO("window " << window);
        Tensor got = run(window);
        require_close(got, a.plain(), 1e-13);
    }
    a.m.window = 40;
    Tensor dout = randn("dout", {300, 40});
    auto grads = [&](const MlaShape& shape, const Tensor& first) { return with_gradients(a, dout, [&](auto& q, auto& kv, auto& k_rope) { return mla_attention(q, kv, k_rope, a.table(), shape, first); }).grads; };
    MlaShape folded = a.m;
    folded.window = 0;
    auto one = grads(a.m, a.documents()), two = grads(folded, windowed(a.documents(), 2, 150, 40, at::kCPU));
    for (int i = 0; i < 3; ++i) CHECK(bit_equal(one[i], two[i]));
    require_error(ErrorKind::shape, "window: got -1", [&] { run(-1); });
}

TEST_CASE("windowed: the later of the document's start and the window's", "[kernels][mla]") {
    Attention a = attention({2, 9, 1, 1, 1, 0, 1}, true);
    for (int64_t window : {1, 4, 9, 20})
        for (bool docs : {false, true}) {
            Tensor got = windowed(docs ? a.documents() : Tensor(), 2, 9, window, at::kCPU);
            REQUIRE(got.sizes() == at::IntArrayRef({2, 9}));
            REQUIRE(got.scalar_type() == at::kInt);
            for (int64_t i = 0; i < 18; ++i) CHECK(got.const_data_ptr<int32_t>()[i] == std::max<int64_t>({0, i % 9 - window + 1, docs ? a.doc_start[size_t(i)] : 0}));
        }
}

TEST_CASE("mla_attention_dropout: where nothing is dropped it equals mla_attention, values and gradients", "[kernels][mla][dropout]") {
    bool docs = GENERATE(false, true), interleaved = GENERATE(true, false);
    for (MlaShape m : {MlaShape{2, 9, 4, 2, 3, 4, 5}, MlaShape{1, 70, 2, 2, 3, 0, 2}}) {
        Attention a = attention(m, docs, interleaved);
        Tensor dout = randn("dout", {m.B * m.S, m.H * m.v});
        auto want = with_gradients(a, dout, [&](auto& q, auto& kv, auto& k_rope) { return mla_attention(q, kv, k_rope, a.table(), a.m, a.documents()); });
        for (double p : {0.0, 1e-12}) {                                  // 2^32 · 1e-12 is below one: no draw is dropped
            auto got = with_gradients(a, dout, [&](auto& q, auto& kv, auto& k_rope) { return mla_attention_dropout(q, kv, k_rope, a.table(), a.m, a.documents(), p, rows_of(m)); });
            require_close(got.out, want.out, 1e-11);
            for (size_t i = 0; i < got.grads.size(); ++i) require_close(got.grads[i], want.grads[i], 1e-11);
        }
    }
}

TEST_CASE("mla_attention_dropout: the mask's probabilities are dropped, by plain loops, gradients to 1e-8", "[kernels][mla][dropout]") {
    bool docs = GENERATE(false, true);
    MlaShape m{2, 7, 2, 1, 2, 4, 2};
    Attention a = attention(m, docs);
    a.mask = values(dropout_mask(m.B * m.S * m.H, m.S, 0.3, rows_of(m), at::kDouble, at::kCPU));
    Tensor dout = randn("dout", {m.B * m.S, m.H * m.v});
    auto got = with_gradients(a, dout, [&](auto& q, auto& kv, auto& k_rope) { return mla_attention_dropout(q, kv, k_rope, a.table(), a.m, a.documents(), 0.3, rows_of(m)); });
    check(a, got, dout);
    // With a window folded into the documents' starts.
    a.m.window = 3;
    got = with_gradients(a, dout, [&](auto& q, auto& kv, auto& k_rope) { return mla_attention_dropout(q, kv, k_rope, a.table(), a.m, windowed(a.documents(), m.B, m.S, 3, at::kCPU), 0.3, rows_of(m)); });
    check(a, got, dout);
}

TEST_CASE("mla_attention_dropout: half of the heads on each of two ranks draw what all would draw on one", "[kernels][mla][dropout]") {
    MlaShape m{1, 11, 4, 4, 3, 4, 2}, half = m;
    half.H = half.G = 2;
    Attention a = attention(m, true);
    Tensor q = a.tensor(a.q), kv = a.tensor(a.kv), k_rope = a.tensor(a.k_rope), whole = mla_attention_dropout(q, kv, k_rope, a.table(), a.m, a.documents(), 0.4, rows_of(m));
    half.softmax_scale = a.m.softmax_scale;
    for (int64_t rank : {0, 1}) {
        auto rows = rows_of(m);
        rows.first += rank * 2;
        rows.group = 2;
        Tensor part = mla_attention_dropout(q.narrow(1, rank * 14, 14).contiguous(), kv.narrow(1, rank * 10, 10).contiguous(), k_rope, a.table(), half, a.documents(), 0.4, rows);
        require_close(part, whole.narrow(1, rank * 4, 4), 1e-13);
    }
}
