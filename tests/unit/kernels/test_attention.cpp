#include "core/kernels/mla/attention.h"
#include "tests/unit/kernels/reference.h"

#include <numbers>

using namespace moe;
using namespace moe::kernels;
using namespace moe::kernels::test;

namespace {
struct Case {
    MlaShape m;
    bool interleaved = true;
    Tensor q, kv, k_rope, doc_start;
    RopeTable table;
};
/// Documents of uneven lengths: the last starts late, so that some blocks see only their own.
Tensor documents(int64_t B, int64_t S) {
    Tensor t = at::empty({B, S}, at::kInt);
    for (int64_t b = 0; b < B; ++b)
        for (int64_t s = 0, start = 0; s < S; ++s) {
            if (s == S / 5 + b || s == S * 3 / 4) start = s;
            t.mutable_data_ptr<int32_t>()[b * S + s] = int32_t(start);
        }
    return t;
}
Case make_case(MlaShape m, bool interleaved, bool docs) {
    m.softmax_scale = 1 / std::sqrt(double(m.nope + m.rope));
    Case c{m, interleaved, randn("q", {m.B * m.S, m.H * (m.nope + m.rope)}), randn("kv", {m.B * m.S, m.G * (m.nope + m.v)}), {}, {}, {}};
    if (m.rope) {
        c.k_rope = randn("k_rope", {m.B * m.S, m.rope});
        c.table = rope_table(m.S + 3, m.rope, 100, interleaved, {}, at::kDouble, at::kCPU);
    }
    if (docs) c.doc_start = documents(m.B, m.S);
    return c;
}
Tensor run(const Case& c) { return mla_attention(c.q, c.kv, c.k_rope, c.table, c.m, c.doc_start); }

/// x [rope] turned by position s, by the definition: pair i by the angle s · 100^(−2i/rope).
std::vector<double> turned(const double* x, int64_t s, int64_t rope, bool interleaved) {
    std::vector<double> y(rope);
    for (int64_t i = 0; i < rope / 2; ++i) {
        int64_t a = interleaved ? 2 * i : i, b = interleaved ? 2 * i + 1 : i + rope / 2;
        double angle = double(s) * std::pow(100.0, -2.0 * double(i) / double(rope));
        y[a] = x[a] * std::cos(angle) - x[b] * std::sin(angle);
        y[b] = x[a] * std::sin(angle) + x[b] * std::cos(angle);
    }
    return y;
}
/// Attention token by token.
std::vector<double> plain_attention(const Case& c) {
    const MlaShape& m = c.m;
    auto q = values(c.q), kv = values(c.kv), kr = m.rope ? values(c.k_rope) : std::vector<double>();
    int64_t width = m.nope + m.rope, each = m.H / m.G;
    std::vector<double> out(m.B * m.S * m.H * m.v);
    for (int64_t b = 0; b < m.B; ++b)
        for (int64_t h = 0; h < m.H; ++h)
            for (int64_t s = 0; s < m.S; ++s) {
                const double* query = &q[((b * m.S + s) * m.H + h) * width];
                auto query_turned = turned(query + m.nope, s, m.rope, c.interleaved);
                int64_t first = c.doc_start.defined() ? c.doc_start.const_data_ptr<int32_t>()[b * m.S + s] : 0;
                std::vector<double> p(s + 1);
                double sum = 0;
                for (int64_t j = first; j <= s; ++j) {
                    const double* key = &kv[((b * m.S + j) * m.G + h / each) * (m.nope + m.v)];
                    double score = 0;
                    for (int64_t d = 0; d < m.nope; ++d) score += query[d] * key[d];
                    if (m.rope) {
                        auto key_turned = turned(&kr[(b * m.S + j) * m.rope], j, m.rope, c.interleaved);
                        for (int64_t d = 0; d < m.rope; ++d) score += query_turned[d] * key_turned[d];
                    }
                    sum += p[j] = std::exp(score * m.softmax_scale);
                }
                for (int64_t j = first; j <= s; ++j)
                    for (int64_t d = 0; d < m.v; ++d)
                        out[((b * m.S + s) * m.H + h) * m.v + d] += p[j] / sum * kv[((b * m.S + j) * m.G + h / each) * (m.nope + m.v) + m.nope + d];
            }
    return out;
}
struct Result { Tensor out; std::vector<Tensor> grads; };
/// Output and gradients of q, kv and k_rope in a dtype.
Result run_with_gradients(Case c, at::ScalarType dtype) {
    c.q = leaf(c.q, dtype);
    c.kv = leaf(c.kv, dtype);
    std::vector<Tensor> inputs = {c.q, c.kv};
    if (c.m.rope) inputs.push_back(c.k_rope = leaf(c.k_rope, dtype));
    Tensor out = run(c);
    return {out, backward(out, inputs, randn("dout", {c.m.B * c.m.S, c.m.H * c.m.v}))};
}
const MlaShape kSmall{2, 9, 4, 2, 3, 4, 5};             // B, S, H, G, nope, rope, v
const MlaShape kBlocks{2, 150, 4, 2, 6, 4, 10};         // four blocks of rows, the last not whole
const MlaShape kWideRope{1, 64, 2, 1, 3, 20, 5};        // whole vectors of the rotated part and a rest, of pairs and of halves
}  // namespace

TEST_CASE("mla_attention: forward equals plain loops, for pairs and halves, grouped heads and packed documents", "[kernels][mla]") {
    bool interleaved = GENERATE(true, false), docs = GENERATE(false, true);
    const MlaShape shapes[] = {kSmall, kBlocks, {1, 49, 2, 2, 4, 0, 7}, {1, 48, 2, 1, 0, 2, 3}, {1, 65, 1, 1, 2, 2, 3}, {3, 1, 1, 1, 2, 2, 2}, kWideRope};
    MlaShape m = shapes[GENERATE(0, 1, 2, 3, 4, 5, 6)];
    Case c = make_case(m, interleaved, docs);
    auto want = plain_attention(c);
    require_close(run(c), want, 1e-13);
    auto narrow = run_with_gradients(c, at::kFloat);
    require_close(narrow.out, want, 2e-6);
}

TEST_CASE("mla_attention: gradients equal finite differences", "[kernels][mla]") {
    bool interleaved = GENERATE(true, false), docs = GENERATE(false, true);
    const MlaShape shapes[] = {kSmall, {1, 7, 2, 1, 3, 0, 2}, {1, 7, 2, 1, 3, 20, 2}};
    MlaShape m = shapes[GENERATE(0, 1, 2)];
    Case c = make_case(m, interleaved, docs);
    auto grads = run_with_gradients(c, at::kDouble).grads;
    Tensor dout = randn("dout", {m.B * m.S, m.H * m.v});
    auto f = [&] { return sum_of_products(run(c), dout); };
    require_close(grads[0], differences(c.q, f), 1e-7);
    require_close(grads[1], differences(c.kv, f), 1e-7);
    if (m.rope) require_close(grads[2], differences(c.k_rope, f), 1e-7);
}

TEST_CASE("mla_attention: several blocks' gradients equal finite differences along a direction", "[kernels][mla]") {
    Case c = make_case(kBlocks, true, GENERATE(false, true));
    auto grads = run_with_gradients(c, at::kDouble).grads;
    Tensor dout = randn("dout", {c.m.B * c.m.S, c.m.H * c.m.v});
    std::vector<Tensor*> inputs = {&c.q, &c.kv, &c.k_rope};
    for (size_t i = 0; i < inputs.size(); ++i) {
        Tensor kept = *inputs[i], direction = randn("direction", kept.sizes());
        *inputs[i] = kept.add(direction, 1e-5);
        double above = sum_of_products(run(c), dout);
        *inputs[i] = kept.sub(direction, 1e-5);
        double below = sum_of_products(run(c), dout);
        *inputs[i] = kept;
        CHECK(sum_of_products(grads[i], direction) == Approx((above - below) / 2e-5).epsilon(1e-6));
    }
}

TEST_CASE("mla_attention: narrow dtypes' gradients follow float64", "[kernels][mla]") {
    auto [dtype, tolerance] = GENERATE(table<at::ScalarType, double>({{at::kFloat, 1e-5}, {at::kBFloat16, 2e-2}, {at::kHalf, 3e-3}}));
    bool interleaved = GENERATE(true, false), wide = GENERATE(false, true);
    Case c = make_case(wide ? kWideRope : kBlocks, interleaved, true);
    for (Tensor* t : {&c.q, &c.kv, &c.k_rope}) *t = t->to(dtype).to(at::kDouble);
    auto want = run_with_gradients(c, at::kDouble), got = run_with_gradients(c, dtype);
    REQUIRE(got.out.scalar_type() == dtype);
    require_close(got.out, want.out, tolerance);
    for (int i = 0; i < 3; ++i) require_close(got.grads[i], want.grads[i], tolerance);
}

TEST_CASE("mla_attention: no result depends on the number of threads", "[kernels][mla]") {
    Case c = make_case({1, 130, 4, 4, 6, 4, 10}, true, false);
    Result one, two;
    with_threads(1, [&] { one = run_with_gradients(c, at::kFloat); });
    with_threads(2, [&] { two = run_with_gradients(c, at::kFloat); });
    CHECK(bit_equal(one.out, two.out));
    for (int i = 0; i < 3; ++i) CHECK(bit_equal(one.grads[i], two.grads[i]));
}

TEST_CASE("mla_attention: tokens of other documents and later tokens change nothing", "[kernels][mla]") {
    Case c = make_case({1, 100, 2, 2, 4, 4, 6}, true, true);
    Tensor before = run(c);
    c.kv.narrow(0, 0, 75).fill_(50);                     // the last document starts at 75
    c.kv.narrow(0, 90, 10).fill_(-50);
    Tensor after = run(c);
    CHECK(bit_equal(before.narrow(0, 75, 15), after.narrow(0, 75, 15)));
    CHECK(!bit_equal(before.narrow(0, 90, 10), after.narrow(0, 90, 10)));
}

TEST_CASE("mla_attention: a token that is not finite reaches the rows that see it and no others, forward and backward", "[kernels][mla]") {
    double bad = GENERATE(double(NAN), double(INFINITY));
    // Documents start at 0, 30 and 112 in the first sequence: a token of a document's middle, of its start, and the last of a block of rows.
    int64_t token = GENERATE(60, 30, 47);
    const MlaShape& m = kBlocks;
    Case c = make_case(m, true, true);
    auto clean = run_with_gradients(c, at::kDouble);
    Case only_v = c, all = c;
    only_v.kv = c.kv.clone();
    only_v.kv.view({m.B, m.S, m.G, m.nope + m.v}).narrow(-1, m.nope, m.v)[0][token].fill_(bad);
    for (Tensor* t : {&all.q, &all.kv, &all.k_rope}) {
        *t = t->clone();
        (*t)[token].fill_(bad);
    }
    auto sees = [&](int64_t row) { return row >= token && row < m.S && c.doc_start.const_data_ptr<int32_t>()[row] <= token; };
    auto in_document = [&](int64_t row) { return row < m.S && c.doc_start.const_data_ptr<int32_t>()[row] == c.doc_start.const_data_ptr<int32_t>()[token]; };
    auto same = [&](const Tensor& got, const Tensor& want, int64_t row) { return got[row].isfinite().all().item<bool>() && (got[row] - want[row]).abs().max().item<double>() < 1e-12; };
    for (const Case& k : {only_v, all}) {
        auto got = run_with_gradients(k, at::kDouble);
        for (int64_t row = 0; row < m.B * m.S; ++row) {
            INFO(row);
            if (sees(row)) REQUIRE(!got.out[row].isfinite().all().item<bool>());
            else REQUIRE(same(got.out, clean.out, row));
            if (!sees(row)) REQUIRE(same(got.grads[0], clean.grads[0], row));
            if (!in_document(row))
                for (int i : {1, 2}) REQUIRE(same(got.grads[i], clean.grads[i], row));
        }
    }
    Tensor dout = randn("dout", {m.B * m.S, m.H * m.v}), q = leaf(c.q), kv = leaf(c.kv), k_rope = leaf(c.k_rope);
    dout[token].fill_(bad);                              // reaches what this row sees
    auto got = backward(mla_attention(q, kv, k_rope, c.table, c.m, c.doc_start), {q, kv, k_rope}, dout);
    for (int64_t row = 0; row < m.B * m.S; ++row) {
        INFO(row);
        if (row != token) REQUIRE(same(got[0], clean.grads[0], row));
        if (row > token || !in_document(row))
            for (int i : {1, 2}) REQUIRE(same(got[size_t(i)], clean.grads[size_t(i)], row));
    }
}

TEST_CASE("mla_attention: large scores stay finite", "[kernels][mla]") {
    Case c = make_case(kSmall, true, false);
    c.q.mul_(1000);
    auto r = run_with_gradients(c, at::kFloat);
    CHECK(r.out.isfinite().all().item<bool>());
    for (auto& g : r.grads) CHECK(g.isfinite().all().item<bool>());
}

TEST_CASE("mla_attention: wrong operands are named with their values", "[kernels][mla]") {
    Case c = make_case(kSmall, true, true);
    auto expect = [](ErrorKind kind, const std::string& part, Case bad) { require_error(kind, part, [&] { run(bad); }); };
    Case bad = c;
    bad.q = randn("q", {18, 27});
    expect(ErrorKind::shape, "q: got [18, 27], want [18, 28]", bad);
    bad = c; bad.m.G = 3;
    expect(ErrorKind::shape, "H 4, G 3", bad);
    bad = c; bad.k_rope = Tensor();
    expect(ErrorKind::shape, "k_rope", bad);
    bad = c; bad.kv = c.kv.to(at::kFloat);
    expect(ErrorKind::dtype, "float64 and float32", bad);
    bad = c; bad.table = rope_table(5, 4, 100, true, {}, at::kDouble, at::kCPU);
    expect(ErrorKind::shape, "at least 9 positions", bad);
    bad = c; bad.doc_start = c.doc_start.clone();
    bad.doc_start.mutable_data_ptr<int32_t>()[3] = 4;
    expect(ErrorKind::shape, "doc_start[0][3]: got 4, want in [0, 3]", bad);
}

TEST_CASE("rope_table: plain angles without YaRN; with it fast pairs are kept and slow ones stretched", "[kernels][mla]") {
    constexpr int64_t S = 50, rope = 64;
    auto plain = rope_table(S, rope, 10000, true, {}, at::kDouble, at::kCPU);
    YarnSettings yarn;
    yarn.factor = 40;
    yarn.mscale = yarn.mscale_all_dim = 1;
    auto stretched = rope_table(S, rope, 10000, true, yarn, at::kDouble, at::kCPU);
    // The formula again, pair by pair. Both magnitudes are 1 + 0.1 ln 40 here, so tables keep the length 1.
    auto turn = [&](double rotations) { return rope * std::log(4096 / (2 * std::numbers::pi * rotations)) / (2 * std::log(10000.0)); };
    double low = std::floor(turn(32)), high = std::ceil(turn(1));
    std::vector<double> want_plain, want;
    for (int64_t s = 0; s < S; ++s)
        for (int64_t i = 0; i < rope / 2; ++i) {
            double f = 1 / std::pow(10000.0, 2.0 * double(i) / rope), keep = 1 - std::min(1.0, std::max(0.0, (double(i) - low) / (high - low)));
            want_plain.push_back(std::sin(double(s) * f));
            want.push_back(std::sin(double(s) * (f / 40 * (1 - keep) + f * keep)));
        }
    CHECK(low == 10);
    CHECK(high == 23);
    require_close(plain.sin, want_plain, 1e-14);
    require_close(stretched.sin, want, 1e-14);
    yarn.mscale = 0.5;
    auto scaled = rope_table(S, rope, 10000, true, yarn, at::kDouble, at::kCPU);
    double ratio = (0.05 * std::log(40.0) + 1) / (0.1 * std::log(40.0) + 1);
    CHECK(scaled.cos.select(0, 0).select(0, 0).item<double>() == Approx(ratio));
    CHECK(yarn_softmax_correction(yarn) == Approx(std::pow(0.1 * std::log(40.0) + 1, 2)));
    CHECK(yarn_softmax_correction({}) == 1);
    require_error(ErrorKind::shape, "got 3, want an even width", [] { rope_table(4, 3, 100, true, {}, at::kDouble, at::kCPU); });
}
