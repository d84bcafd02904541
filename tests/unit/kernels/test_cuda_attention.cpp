#include "core/kernels/mla/attention.h"
#include "tests/unit/kernels/cuda_compare.h"

using namespace moe;
using namespace moe::test;
using kernels::MlaShape;

namespace {
/// Starts of documents that cover each sequence, at other places in each.
Tensor documents(const MlaShape& m) {
    Tensor doc = at::zeros({m.B, m.S}, at::kInt);
    for (int64_t b = 0; b < m.B; ++b) {
        int start = 0;
        for (int64_t s = 0; s < m.S; ++s) {
            if (s > 0 && (s * 7 + b) % 23 == 0) start = int(s);
            doc[b][s] = start;
        }
    }
    return doc;
}
Op attention_op(MlaShape m, bool interleaved, bool packed) {
    m.softmax_scale = 1 / std::sqrt(double(m.nope + m.rope));
    return [=](const Place& p) -> std::vector<Result> {
        const int64_t T = m.B * m.S;
        Tensor q = p.leaf({T, m.H * (m.nope + m.rope)}, 1), kv = p.leaf({T, m.G * (m.nope + m.v)}, 2), k_rope = m.rope ? p.leaf({T, m.rope}, 3) : Tensor();
        kernels::RopeTable table;
        if (m.rope) table = kernels::rope_table(m.S + 3, m.rope, 1e4, interleaved, {}, at::kDouble, at::kCPU);
        Tensor out = kernels::mla_attention(q, kv, k_rope, table, m, packed ? on(p, documents(m)) : Tensor());
        out.backward(p.random(out.sizes(), 4));
        return {{"out", out}, {"dq", q.grad()}, {"dkv", kv.grad()}, {"dk_rope", m.rope ? k_rope.grad() : Tensor()}};
    };
}
std::vector<at::ScalarType> exact() { return {at::kDouble, at::kFloat}; }
std::vector<at::ScalarType> half() { return {at::kBFloat16, at::kHalf}; }
}  // namespace

TEST_CASE("cuda mla_attention: fp32 and fp64, any widths, groups and documents", "[gpu][kernels]") {
    if (!has_gpu()) return;
    for (bool packed : {false, true})
        for (bool interleaved : {false, true}) {
            compare("attention B2 S37", attention_op({.B = 2, .S = 37, .H = 4, .G = 2, .nope = 6, .rope = 4, .v = 5}, interleaved, packed), 0, exact());
            compare("attention wide loads", attention_op({.B = 1, .S = 50, .H = 2, .G = 2, .nope = 16, .rope = 16, .v = 8}, interleaved, packed), 0, exact());
        }
    compare("attention no rope", attention_op({.B = 2, .S = 9, .H = 2, .G = 1, .nope = 5, .rope = 0, .v = 3}, true, true), 0, exact());
    compare("attention one token", attention_op({.B = 3, .S = 1, .H = 2, .G = 1, .nope = 4, .rope = 2, .v = 3}, true, false), 0, exact());
}

TEST_CASE("cuda mla_attention: fp32 in more than one block of rows", "[gpu][kernels]") {
    if (!has_gpu()) return;
    compare("attention S4500", attention_op({.B = 1, .S = 4500, .H = 2, .G = 1, .nope = 4, .rope = 4, .v = 4}, true, true), 0, {at::kFloat});
}

TEST_CASE("cuda mla_attention: bf16 and fp16 without documents", "[gpu][kernels]") {
    if (!has_gpu()) return;
    for (bool interleaved : {false, true}) {
        compare("attention 192/128", attention_op({.B = 2, .S = 130, .H = 4, .G = 4, .nope = 128, .rope = 64, .v = 128}, interleaved, false), 1.5e-2, half());
        compare("attention 48/32", attention_op({.B = 3, .S = 77, .H = 2, .G = 2, .nope = 32, .rope = 16, .v = 32}, interleaved, false), 1.5e-2, half());
    }
    compare("attention 192/128 S512", attention_op({.B = 1, .S = 512, .H = 2, .G = 2, .nope = 128, .rope = 64, .v = 128}, true, false), 1.5e-2, half());
    compare("attention nope 12", attention_op({.B = 1, .S = 65, .H = 2, .G = 2, .nope = 12, .rope = 4, .v = 16}, true, false), 1.5e-2, half());
    compare("attention odd widths", attention_op({.B = 1, .S = 40, .H = 4, .G = 2, .nope = 9, .rope = 6, .v = 11}, true, false), 1.5e-2, half());
    compare("attention v wider", attention_op({.B = 1, .S = 40, .H = 4, .G = 2, .nope = 8, .rope = 8, .v = 40}, true, false), 1.5e-2, half());
    compare("attention 300/260", attention_op({.B = 1, .S = 40, .H = 2, .G = 2, .nope = 292, .rope = 8, .v = 260}, true, false), 1.5e-2, half());
    compare("attention one token", attention_op({.B = 3, .S = 1, .H = 4, .G = 2, .nope = 32, .rope = 16, .v = 32}, true, false), 1.5e-2, half());
}

TEST_CASE("cuda mla_attention: bf16 and fp16 with packed documents", "[gpu][kernels]") {
    if (!has_gpu()) return;
    compare("documents 192/128", attention_op({.B = 2, .S = 300, .H = 4, .G = 4, .nope = 128, .rope = 64, .v = 128}, true, true), 1.5e-2, half());
    compare("documents 48/32", attention_op({.B = 3, .S = 77, .H = 4, .G = 2, .nope = 32, .rope = 16, .v = 32}, false, true), 1.5e-2, half());
    compare("documents 192/128 S1100", attention_op({.B = 2, .S = 1100, .H = 2, .G = 2, .nope = 128, .rope = 64, .v = 128}, true, true), 1.5e-2, half());
    compare("documents 16/16 S1025, v packed anew", attention_op({.B = 1, .S = 1025, .H = 2, .G = 1, .nope = 12, .rope = 4, .v = 16}, false, true), 1.5e-2, half());
    compare("documents one token", attention_op({.B = 3, .S = 1, .H = 4, .G = 2, .nope = 32, .rope = 16, .v = 32}, true, true), 1.5e-2, half());
}

TEST_CASE("cuda mla_attention: bf16 and fp16 with a sliding window, with and without documents, in order too", "[gpu][kernels]") {
    if (!has_gpu()) return;
    struct Deterministic {
        explicit Deterministic(bool on) { at::globalContext().setDeterministicAlgorithms(on, false); }
        ~Deterministic() { at::globalContext().setDeterministicAlgorithms(false, false); }
    };
    for (bool in_order : {false, true}) {
        Deterministic mode(in_order);
        for (bool packed : {false, true}) {
            compare("window 5 192/128", attention_op({.B = 2, .S = 300, .H = 4, .G = 4, .nope = 128, .rope = 64, .v = 128, .window = 5}, true, packed), 1.5e-2, half());
            compare("window 200 192/128", attention_op({.B = 1, .S = 1100, .H = 2, .G = 2, .nope = 128, .rope = 64, .v = 128, .window = 200}, true, packed), 1.5e-2, half());
            compare("window 1 48/32", attention_op({.B = 3, .S = 77, .H = 4, .G = 2, .nope = 32, .rope = 16, .v = 32, .window = 1}, false, packed), 1.5e-2, half());
            compare("window 9 56/40", attention_op({.B = 1, .S = 40, .H = 2, .G = 2, .nope = 48, .rope = 8, .v = 200, .window = 9}, true, packed), 1.5e-2, half());
        }
    }
    compare("window fp32", attention_op({.B = 2, .S = 70, .H = 4, .G = 2, .nope = 9, .rope = 6, .v = 11, .window = 12}, true, true), 0, {at::kFloat});
}

TEST_CASE("cuda mla_attention: no gradient wanted gives the same output", "[gpu][kernels]") {
    if (!has_gpu()) return;
    const int64_t S = GENERATE(100, 1100);
    const MlaShape m{.B = 2, .S = S, .H = 4, .G = 4, .nope = 128, .rope = 64, .v = 128, .softmax_scale = 0.07};
    Place p{at::Device(at::kCUDA, 0), at::kBFloat16, at::kBFloat16};
    auto table = kernels::rope_table(m.S, m.rope, 1e4, true, {}, at::kFloat, p.device);
    Tensor q = p.leaf({2 * S, 4 * 192}, 1), kv = p.leaf({2 * S, 4 * 256}, 2), k_rope = p.leaf({2 * S, 64}, 3);
    for (bool packed : {false, true}) {
        Tensor doc = packed ? on(p, documents(m)) : Tensor();
        Tensor with = kernels::mla_attention(q, kv, k_rope, table, m, doc), without = kernels::mla_attention(q.detach(), kv.detach(), k_rope.detach(), table, m, doc);
        check_close("no gradient", without, with.detach().cpu(), 1e-3);
    }
}
