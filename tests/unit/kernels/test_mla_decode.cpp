// mla_decode against attention in float64 over expanded keys and values, which the absorbed form never makes. Letters as in mla_decode.h; N nope width, V value width.
#include "core/kernels/mla_decode/mla_decode.h"
#include "tests/gpu.h"
#include "tests/unit/kernels/reference.h"

#include <ATen/ATen.h>
#include <c10/util/Float8_e4m3fn.h>

#include <cstring>

using namespace moe;
using namespace moe::kernels;
using namespace moe::kernels::test;
using Format = LatentCache::Format;

namespace {
struct Sizes { int64_t Q = 1, H = 3, L = 24, R = 6; };

Tensor ints(const std::vector<int32_t>& values) { return at::tensor(values, at::kInt); }

/// Past tokens of each sequence and a cache that holds them in blocks in mixed order, the rest of it NaN.
struct Filled {
    LatentCache cache;
    std::vector<Tensor> latent, rope;      ///< per sequence [T, L], [T, R], float64, rounded to the cache's dtype
    Tensor lengths;
};

Tensor poisoned_rows(Format format, int64_t blocks, int64_t L, int64_t R, at::ScalarType dtype) {
    Tensor rows = make_cache_rows(format, blocks, L, R, dtype, at::kCPU);
    std::memset(rows.mutable_data_ptr(), 0xff, rows.nbytes());      // NaN in every format
    return rows;
}

Filled filled(const Sizes& s, const std::vector<int32_t>& lengths, Format format, at::ScalarType dtype, const std::string& name = "cache") {
    const int64_t B = lengths.size();
    int64_t M = 1, N = 2;
    for (auto n : lengths) M = std::max<int64_t>(M, (n + 63) / 64), N += (n + 63) / 64;
    if (N % 7 == 0) ++N;                                      // so that steps of 7 meet every block
    Filled f{{format, s.L, s.R, poisoned_rows(format, N, s.L, s.R, dtype), at::full({B, M}, -1, at::kInt)}, {}, {}, ints(lengths)};
    int64_t next = 0;
    for (int64_t b = 0; b < B; ++b) {
        for (int64_t j = 0; j < (lengths[b] + 63) / 64; ++j) f.cache.block_table[b][j] = int(N - 1 - (next++ * 7 + 3) % N);
        auto numbers = [&](const char* part, int64_t width) { return randn(fmt::format("{} {} {}", name, part, b), {lengths[b], width}).to(dtype).to(at::kDouble); };
        f.latent.push_back(numbers("latent", s.L));
        f.rope.push_back(numbers("rope", s.R));
    }
    return f;
}
bool blocks_differ(const Filled& f) {
    Tensor used = f.cache.block_table.masked_select(f.cache.block_table.ge(0));
    return std::get<0>(at::_unique2(used)).numel() == used.numel();
}

/// Writes the tokens through append_latent, out of order.
void append_all(const Filled& f, at::ScalarType dtype) {
    std::vector<Tensor> latent, rope, sequence, position;
    for (int64_t b = 0; b < int64_t(f.latent.size()); ++b) {
        const int64_t T = f.latent[b].size(0);
        Tensor order = at::arange(T - 1, -1, -1, at::kLong);
        latent.push_back(f.latent[b].index_select(0, order));
        rope.push_back(f.rope[b].index_select(0, order));
        sequence.push_back(at::full({T}, b, at::kInt));
        position.push_back(order.to(at::kInt));
    }
    append_latent(f.cache, at::cat(latent).to(dtype), at::cat(rope).to(dtype), at::cat(sequence), at::cat(position));
}

/// What an fp8 cache makes of [T, L]: scale amax / 448 for 128 values, the nearest of the 253 finite E4M3 values, ties to the even one, by search.
Tensor through_fp8(const Tensor& latent) {
    std::vector<double> table;
    for (int i = 0; i < 127; ++i) {
        const int exponent = i / 8, mantissa = i % 8;
        table.push_back(exponent ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(mantissa, -9));
    }
    Tensor out = latent.to(at::kDouble).clone();
    for (int64_t t = 0; t < latent.size(0); ++t)
        for (int64_t d0 = 0; d0 < latent.size(1); d0 += 128) {
            Tensor part = out[t].narrow(0, d0, 128);
            const float top = float(part.abs().max().item<double>()), scale = std::max(top / 448.0f, 1.17549435e-38f);
            for (int64_t d = 0; d < 128; ++d) {
                double* x = part.mutable_data_ptr<double>() + d;
                const float scaled = float(*x) / scale;
                size_t best = 0;
                for (size_t i = 1; i < table.size(); ++i) {
                    const double near = std::abs(table[i] - std::abs(scaled)), far = std::abs(table[best] - std::abs(scaled));
                    if (near < far || (near == far && i % 2 == 0)) best = i;
                }
                *x = std::copysign(table[best], scaled) * scale;
            }
        }
    return out;
}

struct Expanded { Tensor out, lse; };      ///< out [B, Q, H, V]

/// Keys W_k latent ++ rope and values W_v latent of every head, then softmax attention token by token.
Expanded expanded_attention(const Sizes& s, const std::vector<Tensor>& latent, const std::vector<Tensor>& rope, const Tensor& q_nope, const Tensor& q_rope, const Tensor& w_key,
                            const Tensor& w_value, double scale) {
    const int64_t B = latent.size(), V = w_value.size(1);
    Expanded x{at::zeros({B, s.Q, s.H, V}, at::kDouble), at::full({B, s.Q, s.H}, -std::numeric_limits<double>::infinity(), at::kDouble)};
    for (int64_t b = 0; b < B; ++b)
        for (int64_t i = 0; i < s.Q; ++i)
            for (int64_t h = 0; h < s.H; ++h) {
                const int64_t seen = latent[b].size(0) - s.Q + 1 + i;
                if (seen <= 0) continue;
                Tensor past = latent[b].narrow(0, 0, seen), key = at::cat({past.matmul(w_key[h].t()), rope[b].narrow(0, 0, seen)}, 1), value = past.matmul(w_value[h].t());
                Tensor score = key.matmul(at::cat({q_nope[b][i][h], q_rope[b][i][h]})) * scale;
                x.out[b][i][h] = at::softmax(score, 0).matmul(value);
                x.lse[b][i][h] = at::logsumexp(score, {0});
            }
    return x;
}

/// One batch of queries, rounded to `dtype`, and the reference's answer for what the cache holds.
struct Queries {
    Tensor nope, rope, w_key, w_value;
    Queries(const Sizes& s, int64_t B, const std::string& name = "q")
        : nope(randn(name + " nope", {B, s.Q, s.H, 10})), rope(randn(name + " rope", {B, s.Q, s.H, s.R})), w_key(randn("w_key", {s.H, 10, s.L}) * 0.3), w_value(randn("w_value", {s.H, 7, s.L})) {}
    Tensor absorbed() const { return at::einsum("bqhn,hnl->bqhl", {nope, w_key}); }
    Tensor expand(const Tensor& out) const { return at::einsum("bqhl,hvl->bqhv", {out.to(at::kDouble), w_value}); }
};
constexpr double kScale = 0.4;

/// lse with its infinities taken out where the reference has them too.
void require_lse(const Tensor& got, const Tensor& want, double tolerance) {
    Tensor g = got.to(at::kCPU, at::kDouble), none = want.isinf();
    REQUIRE(bit_equal(g.isinf(), none));
    require_close(g.masked_fill(none, 0), want.masked_fill(none, 0), tolerance);
}

void compare_with_expanded(const Sizes& s, const std::vector<int32_t>& lengths) {
    Filled f = filled(s, lengths, Format::plain, at::kDouble);
    REQUIRE(blocks_differ(f));
    append_all(f, at::kDouble);
    Queries q(s, lengths.size());
    auto got = mla_decode(q.absorbed(), q.rope, f.cache, f.lengths, kScale);
    auto want = expanded_attention(s, f.latent, f.rope, q.nope, q.rope, q.w_key, q.w_value, kScale);
    CAPTURE(lengths.size(), s.Q, s.H);
    require_close(q.expand(got.out), want.out, 1e-11);
    require_lse(got.lse, want.lse, 1e-12);
}
}  // namespace

TEST_CASE("mla_decode: the absorbed form equals attention over expanded keys and values", "[kernels][mla_decode]") {
    compare_with_expanded({}, {130, 7, 64, 200});
    compare_with_expanded({.Q = 1, .H = 19, .L = 8, .R = 4}, {100, 3});
    compare_with_expanded({.Q = 1, .H = 2, .L = 5, .R = 0}, {70});
}

TEST_CASE("mla_decode: lengths 0, 1, 63, 64, 65 in one batch; an empty sequence gives zeros", "[kernels][mla_decode]") {
    compare_with_expanded({}, {0, 1, 63, 64, 65});
    Filled f = filled({}, {0}, Format::plain, at::kFloat);
    Queries q({}, 1);
    auto got = mla_decode(q.absorbed().to(at::kFloat), q.rope.to(at::kFloat), f.cache, f.lengths, kScale);
    CHECK(got.out.eq(0).all().item<bool>());
    CHECK(got.lse.eq(-std::numeric_limits<float>::infinity()).all().item<bool>());
}

TEST_CASE("mla_decode: several new tokens see themselves and what comes before them", "[kernels][mla_decode]") {
    for (int64_t Q : {2, 3, 4}) compare_with_expanded({.Q = Q}, {64, 65, 66, 1, 2, 130, 0});
}

TEST_CASE("mla_decode: fp32, bf16 and fp16 stay near float64 on the same numbers", "[kernels][mla_decode]") {
    Sizes s{.Q = 2, .H = 4, .L = 64, .R = 16};
    for (auto [dtype, tolerance] : {std::pair{at::kFloat, 3e-6}, std::pair{at::kBFloat16, 6e-3}, std::pair{at::kHalf, 8e-4}}) {
        Filled f = filled(s, {150, 31}, Format::plain, dtype);
        append_all(f, dtype);
        Queries q(s, 2);
        Tensor absorbed = q.absorbed().to(dtype), rope = q.rope.to(dtype);
        LatentCache exact = f.cache;
        exact.rows = f.cache.rows.to(at::kDouble);
        auto got = mla_decode(absorbed, rope, f.cache, f.lengths, kScale), want = mla_decode(absorbed.to(at::kDouble), rope.to(at::kDouble), exact, f.lengths, kScale);
        CHECK(got.out.scalar_type() == dtype);
        CHECK(got.lse.scalar_type() == at::kFloat);
        require_close(got.out, want.out, tolerance);
        require_close(got.lse, want.lse, 3e-6);
    }
}

TEST_CASE("mla_decode: an fp8 cache holds the nearest E4M3 values and its scales, and decodes to them", "[kernels][mla_decode]") {
    Sizes s{.Q = 1, .H = 2, .L = 256, .R = 4};
    Filled f = filled(s, {66, 5}, Format::fp8, at::kFloat);
    f.latent[0][3].zero_();                                  // a token of zeros
    f.latent[0][4].mul_(1e-20), f.latent[1][2].mul_(1e20);
    f.latent[1] = f.latent[1].to(at::kFloat).to(at::kDouble), f.latent[0] = f.latent[0].to(at::kFloat).to(at::kDouble);
    append_all(f, at::kFloat);
    CHECK(f.cache.rows.size(2) == 256 + 8 + 8);
    CHECK(cache_row_bytes(512, 64) == 656);
    std::vector<Tensor> latent, rope;
    for (int b = 0; b < 2; ++b) latent.push_back(through_fp8(f.latent[b])), rope.push_back(f.rope[b].to(at::kBFloat16).to(at::kDouble));
    // The bytes: value times scale is what the search found.
    for (int64_t t : {0, 3, 4, 65}) {
        const uint8_t* row = f.cache.rows.const_data_ptr<uint8_t>() + (f.cache.block_table[0][t / 64].item<int>() * 64 + t % 64) * cache_row_bytes(s.L, s.R);
        for (int64_t d = 0; d < s.L; ++d) {
            float scale;
            std::memcpy(&scale, row + s.L + d / 128 * 4, 4);
            REQUIRE(double(float(c10::Float8_e4m3fn(row[d], c10::Float8_e4m3fn::from_bits()))) * scale == latent[0][t][d].item<double>());
        }
    }
    latent[1][2].zero_(), f.latent[1][2].zero_();            // 1e20 against other tokens would leave nothing to compare
    append_all(f, at::kFloat);
    Queries q(s, 2);
    auto want = expanded_attention(s, latent, rope, q.nope, q.rope, q.w_key, q.w_value, kScale);
    auto got = mla_decode(q.absorbed(), q.rope, f.cache, f.lengths, kScale);
    require_close(q.expand(got.out), want.out, 1e-11);
    require_lse(got.lse, want.lse, 1e-12);
}

TEST_CASE("append_latent: strided rows, tokens left out, and one token at a time", "[kernels][mla_decode]") {
    Sizes s{.L = 6, .R = 2};
    LatentCache cache{Format::plain, s.L, s.R, at::zeros({3, 64, 8}, at::kFloat), ints({2, 1}).view({1, 2})};
    Tensor both = randn("both", {4, 9}).to(at::kFloat);
    append_latent(cache, both.narrow(1, 1, 6), both.narrow(1, 7, 2), ints({0, -1, 0, 0}), ints({63, 0, 64, -5}));
    CHECK(bit_equal(cache.rows[2][63], both[0].narrow(0, 1, 8)));
    CHECK(bit_equal(cache.rows[1][0], both[2].narrow(0, 1, 8)));
    CHECK(cache.rows.ne(0).sum().item<int64_t>() == 16);
    append_latent(cache, both.narrow(1, 1, 6).narrow(0, 0, 0), both.narrow(1, 7, 2).narrow(0, 0, 0), ints({}), ints({}));
}

TEST_CASE("mla_decode: the result does not depend on the number of threads, nor on the strides of q", "[kernels][mla_decode]") {
    Sizes s{.Q = 2, .H = 11, .L = 40, .R = 8};
    Filled f = filled(s, {100, 70, 33}, Format::plain, at::kFloat);
    append_all(f, at::kFloat);
    Queries q(s, 3);
    Tensor latent = q.absorbed().to(at::kFloat), rope = q.rope.to(at::kFloat);
    auto one = mla_decode(latent, rope, f.cache, f.lengths, kScale);
    with_threads(1, [&] {
        // As a product batched over heads leaves it: [H, B, Q, L].
        auto two = mla_decode(latent.permute({2, 0, 1, 3}).contiguous().permute({1, 2, 0, 3}), rope, f.cache, f.lengths, kScale);
        CHECK(bit_equal(one.out, two.out));
        CHECK(bit_equal(one.lse, two.lse));
    });
}

TEST_CASE("mla_decode: no sequences, no new tokens", "[kernels][mla_decode]") {
    LatentCache cache{Format::plain, 8, 4, make_cache_rows(Format::plain, 0, 8, 4, at::kFloat, at::kCPU), at::empty({0, 0}, at::kInt)};
    auto none = mla_decode(at::empty({0, 1, 2, 8}), at::empty({0, 1, 2, 4}), cache, ints({}), 1);
    CHECK(shape_text(none.out.sizes()) == "[0, 1, 2, 8]");
    cache.block_table = at::empty({2, 0}, at::kInt);
    CHECK(mla_decode(at::ones({2, 1, 2, 8}), at::ones({2, 1, 2, 4}), cache, ints({0, 0}), 1).out.eq(0).all().item<bool>());
    CHECK(shape_text(mla_decode(at::ones({2, 0, 2, 8}), at::ones({2, 0, 2, 4}), cache, ints({0, 0}), 1).lse.sizes()) == "[2, 0, 2]");
}

TEST_CASE("mla_decode: wrong arguments name what they got", "[kernels][mla_decode]") {
    Sizes s{.L = 8, .R = 4};
    Filled f = filled(s, {70, 3}, Format::plain, at::kFloat);
    append_all(f, at::kFloat);
    Tensor q = at::ones({2, 1, 3, 8}), rope = at::ones({2, 1, 3, 4});
    auto decode = [&](const Tensor& a, const Tensor& b, const LatentCache& cache, const Tensor& lengths, double scale) { return [=] { mla_decode(a, b, cache, lengths, scale); }; };
    require_error(ErrorKind::shape, "4 dims", decode(q[0], rope, f.cache, f.lengths, 1));
    require_error(ErrorKind::shape, "[2, 1, 3, 7]", decode(q.narrow(3, 0, 7), rope, f.cache, f.lengths, 1));
    require_error(ErrorKind::shape, "q_rope", decode(q, rope.narrow(2, 0, 2), f.cache, f.lengths, 1));
    require_error(ErrorKind::dtype, "q_rope", decode(q, rope.to(at::kDouble), f.cache, f.lengths, 1));
    require_error(ErrorKind::dtype, "cache.rows", decode(q.to(at::kDouble), rope.to(at::kDouble), f.cache, f.lengths, 1));
    require_error(ErrorKind::dtype, "int64", decode(q, rope, f.cache, f.lengths.to(at::kLong), 1));
    require_error(ErrorKind::shape, "lengths", decode(q, rope, f.cache, ints({70, 3, 1}), 1));
    require_error(ErrorKind::shape, "lengths[0]", decode(q, rope, f.cache, ints({129, 3}), 1));
    require_error(ErrorKind::shape, "lengths[1]", decode(q, rope, f.cache, ints({70, -1}), 1));
    require_error(ErrorKind::shape, "block_table[1][1]", decode(q, rope, f.cache, ints({70, 65}), 1));
    require_error(ErrorKind::usage, "scale", decode(q, rope, f.cache, f.lengths, 0));
    require_error(ErrorKind::usage, "scale", decode(q, rope, f.cache, f.lengths, std::nan("")));
    LatentCache other = f.cache;
    other.rows = f.cache.rows.narrow(1, 0, 32);
    require_error(ErrorKind::shape, "64", decode(q, rope, other, f.lengths, 1));
    other.rows = Tensor();
    require_error(ErrorKind::shape, "undefined", decode(q, rope, other, f.lengths, 1));
    require_error(ErrorKind::shape, "multiple of 128", [] { make_cache_rows(Format::fp8, 1, 100, 4, at::kFloat, at::kCPU); });
    require_error(ErrorKind::shape, "position 128", [&] { append_latent(f.cache, at::ones({1, 8}), at::ones({1, 4}), ints({0}), ints({128})); });
    require_error(ErrorKind::shape, "sequence 2", [&] { append_latent(f.cache, at::ones({1, 8}), at::ones({1, 4}), ints({2}), ints({0})); });
    require_error(ErrorKind::dtype, "cache.rows", [&] { append_latent(f.cache, at::ones({1, 8}, at::kDouble), at::ones({1, 4}, at::kDouble), ints({0}), ints({0})); });
}
