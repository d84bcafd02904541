// mla_decode on CUDA against the CPU implementation in float64 on the same cache; fp8 caches bit for bit.
#include "core/kernels/mla_decode/mla_decode.h"
#include "tests/unit/kernels/cuda_compare.h"

#include <cstring>

using namespace moe;
using namespace moe::test;
using namespace moe::kernels;
using Format = LatentCache::Format;

namespace {
struct Sizes { int64_t Q = 1, H = 16, L = 512, R = 64; };

LatentCache on_device(const LatentCache& c) { return {c.format, c.latent, c.rope, c.rows.to(at::kCUDA), c.block_table.to(at::kCUDA)}; }

/// A cache on the CPU, its tokens in blocks in random order, what no token wrote NaN.
LatentCache random_cache(const Sizes& s, const std::vector<int64_t>& lengths, Format format, at::ScalarType dtype, double spread) {
    const int64_t B = lengths.size();
    int64_t M = 1, N = 1;
    for (auto n : lengths) M = std::max(M, (n + 63) / 64), N += (n + 63) / 64;
    LatentCache cache{format, s.L, s.R, make_cache_rows(format, N, s.L, s.R, dtype, at::kCPU), at::full({B, M}, N - 1, at::kInt)};
    std::memset(cache.rows.mutable_data_ptr(), 0xff, cache.rows.nbytes());
    Tensor order = at::randperm(N, at::make_generator<at::CPUGeneratorImpl>(5), at::TensorOptions().dtype(at::kLong)).to(at::kInt);
    Place cpu{at::kCPU, at::kFloat, at::kFloat};
    int64_t next = 0;
    for (int64_t b = 0; b < B; ++b) {
        const int64_t T = lengths[b], blocks = (T + 63) / 64;
        cache.block_table[b].narrow(0, 0, blocks).copy_(order.narrow(0, next, blocks));
        next += blocks;
        Tensor latent = cpu.random({T, s.L}, 10 + b) * at::exp(cpu.random({T, 1}, 110 + b, spread)), rope = cpu.random({T, s.R}, 210 + b);
        if (format == Format::plain) latent = latent.to(dtype), rope = rope.to(dtype);
        append_latent(cache, latent, rope, at::full({T}, b, at::kInt), at::arange(T, at::kInt));
    }
    return cache;
}
LatentCache in_double(const LatentCache& c) {
    LatentCache d = c;
    if (c.format == Format::plain) d.rows = c.rows.to(at::kDouble);
    return d;
}

void compare_decode(const std::string& what, const Sizes& s, const std::vector<int64_t>& lengths, Format format, at::ScalarType dtype, double tolerance, double spread = 0.5) {
    LatentCache cache = random_cache(s, lengths, format, dtype, spread);
    const int64_t B = lengths.size();
    Place cpu{at::kCPU, at::kDouble, dtype};
    Tensor latent = cpu.random({B, s.Q, s.H, s.L}, 1, 0.3), rope = cpu.random({B, s.Q, s.H, s.R}, 2), n = at::tensor(lengths, at::kInt);
    auto want = mla_decode(latent, rope, in_double(cache), n, 0.1);
    auto run = [&] { return mla_decode(latent.to(at::kCUDA, dtype), rope.to(at::kCUDA, dtype), on_device(cache), n.to(at::kCUDA), 0.1); };
    auto got = run(), again = run();
    check_close(what + " out", got.out, want.out, tolerance);
    INFO(what);
    Tensor none = want.lse.isinf(), lse = got.lse.to(at::kCPU, at::kDouble);
    REQUIRE(lse.isinf().equal(none));
    check_close(what + " lse", lse.masked_fill(none, 0), want.lse.masked_fill(none, 0), dtype == at::kDouble ? 1e-12 : 1e-5);
    // Row by row too: a short sequence's error must not hide behind a long one's norm.
    Tensor error = (got.out.to(at::kCPU, at::kDouble) - want.out).norm(2, {-1}), norm = want.out.norm(2, {-1});
    CHECK((error <= norm * (3 * tolerance) + 1e-12).all().item<bool>());
    CHECK(got.out.equal(again.out));
    CHECK(got.lse.equal(again.lse));
}
std::vector<int64_t> edges() { return {0, 1, 63, 64, 65, 127, 128, 129, 700}; }
std::vector<int64_t> ragged() {
    std::vector<int64_t> n;
    for (int i = 0; i < 40; ++i) n.push_back((i * 7919 + 13) % 900);
    n.push_back(5000);
    return n;
}
}  // namespace

TEST_CASE("cuda mla_decode: bf16 and fp8 caches of the 16B and 671B shapes, edges and ragged lengths", "[gpu][kernels]") {
    if (!has_gpu()) return;
    for (Format format : {Format::plain, Format::fp8}) {
        const std::string name = format == Format::fp8 ? "fp8" : "bf16";
        for (int64_t H : {16, 128}) {
            compare_decode(fmt::format("decode {} H{} edges", name, H), {.H = H}, edges(), format, at::kBFloat16, 4e-3);
            compare_decode(fmt::format("decode {} H{} one long", name, H), {.H = H}, {3000}, format, at::kBFloat16, 4e-3);
        }
        compare_decode(fmt::format("decode {} H16 ragged", name), {}, ragged(), format, at::kBFloat16, 4e-3);
        compare_decode(fmt::format("decode {} H16 scales of many sizes", name), {}, {300, 64}, format, at::kBFloat16, 4e-3, 2);
    }
}

TEST_CASE("cuda mla_decode: several new tokens, head counts that fill no tile", "[gpu][kernels]") {
    if (!has_gpu()) return;
    for (Format format : {Format::plain, Format::fp8}) {
        const std::string name = format == Format::fp8 ? "fp8" : "bf16";
        for (int64_t Q : {2, 3, 4}) compare_decode(fmt::format("decode {} Q{} H16", name, Q), {.Q = Q}, {0, 1, 2, 3, 65, 66, 129, 500}, format, at::kBFloat16, 4e-3);
        for (int64_t H : {1, 5, 20, 40, 72, 100}) compare_decode(fmt::format("decode {} H{}", name, H), {.H = H}, {200, 64, 1}, format, at::kBFloat16, 4e-3);
        compare_decode(fmt::format("decode {} Q2 H128", name), {.Q = 2, .H = 128}, {200, 65, 1}, format, at::kBFloat16, 4e-3);
    }
}

TEST_CASE("cuda mla_decode: any dtype and width by the general kernel", "[gpu][kernels]") {
    if (!has_gpu()) return;
    for (auto [dtype, tolerance] : {std::pair{at::kDouble, 1e-12}, std::pair{at::kFloat, 1e-5}, std::pair{at::kHalf, 1e-3}, std::pair{at::kBFloat16, 8e-3}})
        compare_decode(fmt::format("decode {}", short_name(dtype)), {.Q = 2, .H = 3, .L = 36, .R = 10}, edges(), Format::plain, dtype, tolerance);
    compare_decode("decode no rope", {.H = 3, .L = 20, .R = 0}, edges(), Format::plain, at::kFloat, 1e-5);
    compare_decode("decode fp8 256", {.Q = 2, .H = 3, .L = 256, .R = 32}, edges(), Format::fp8, at::kFloat, 1e-5);
    compare_decode("decode fp32 512", {.H = 4}, {130}, Format::plain, at::kFloat, 1e-5);
}

TEST_CASE("cuda append_latent: the same bytes as on the CPU", "[gpu][kernels]") {
    if (!has_gpu()) return;
    const int64_t T = 300;
    for (auto dtype : {at::kFloat, at::kBFloat16, at::kHalf, at::kDouble})
        for (Format format : {Format::plain, Format::fp8}) {
            LatentCache cache{format, 512, 64, make_cache_rows(format, 4, 512, 64, dtype, at::kCPU), at::tensor({3, 0, 2, 1}, at::kInt).view({2, 2})};
            Place cpu{at::kCPU, at::kFloat, dtype};
            Tensor both = (cpu.random({T, 600}, 1) * at::exp(cpu.random({T, 1}, 2, 3))).to(dtype);
            both[7].zero_();
            Tensor sequence = at::arange(T, at::kInt).remainder(2), position = at::arange(T, at::kInt).floor_divide(2);
            position[5] = -1;
            LatentCache device = on_device(cache);
            append_latent(cache, both.narrow(1, 8, 512), both.narrow(1, 530, 64), sequence, position.clamp_max(127));
            Tensor on_gpu = both.to(at::kCUDA);
            append_latent(device, on_gpu.narrow(1, 8, 512), on_gpu.narrow(1, 530, 64), sequence.to(at::kCUDA), position.clamp_max(127).to(at::kCUDA));
            // Positions past 127 all fall on 127, in any order on the device: that row of each sequence is not compared.
            Tensor a = cache.rows.clone(), b = device.rows.to(at::kCPU);
            for (int64_t block : {0, 1}) a[block][63].zero_(), b[block][63].zero_();
            INFO(short_name(dtype) << (format == Format::fp8 ? " fp8" : " plain"));
            CHECK(a.equal(b));
        }
}
