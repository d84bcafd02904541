// E4M3 copies that travel with the rows they were made of: from the kernels that make the rows to the products that read them.
#include "core/kernels/linear/linear.h"
#include "core/kernels/mla/attention.h"
#include "core/kernels/norm/rmsnorm.h"
#include "core/kernels/permute/permute.h"
#include "core/kernels/quantize/quantize.h"
#include "core/kernels/swiglu/swiglu.h"
#include "tests/gpu.h"
#include "tests/quantizations.h"
#include "tests/unit/kernels/reference.h"

#include <ATen/ATen.h>

#include <limits>

using namespace moe;
using namespace moe::kernels;
using namespace moe::kernels::test;

namespace {
const at::Device kGpu(at::kCUDA, 0);

QuantizedRows rows_of(const Tensor& x) {
    auto q = empty_quantized_rows(x.size(0), x.size(1), x);
    quantize_rows(x, q);
    return q;
}
Tensor bf16(std::string_view name, at::IntArrayRef sizes, at::Device device = at::kCPU) { return randn(name, sizes).to(at::kBFloat16).to(device); }
Tensor bytes(const Tensor& q) { return q.cpu().view(at::kByte); }

/// y carries the copy that quantize_rows makes of it, bit for bit, for one reader.
void check_copy(const std::string& what, const Tensor& y) {
    INFO(what);
    auto got = take_rows(y);
    REQUIRE(got);
    CHECK(!take_rows(y));
    if (y.numel() == 0) return;
    auto want = rows_of(y.detach());
    CHECK(bytes(got->q_RK).equal(bytes(want.q_RK)));
    auto scales = [&](const QuantizedRows& q) { return q.scale_KR.narrow(1, 0, y.size(0)).cpu().nan_to_num(-7, -8); };
    CHECK(scales(*got).equal(scales(want)));
}

/// Rows with a NaN, an infinity, zeros and tiny values among ordinary ones.
Tensor awkward_rows(std::string_view name, int64_t R, int64_t K, at::Device device) {
    Tensor x = randn(name, {R, K}) * at::linspace(-12, 12, K, at::kDouble).exp2();
    if (R > 4) {
        x[1][K / 2] = std::numeric_limits<double>::quiet_NaN();
        x[2][K - 1] = -std::numeric_limits<double>::infinity();
        x[3].zero_();
        x[4].fill_(1e-38);
    }
    return x.to(at::kBFloat16).to(device);
}
/// The same numbers one element after a multiple of 16 bytes.
Tensor unaligned(const Tensor& x) {
    Tensor room = at::empty({x.numel() + 1}, x.options());
    return room.narrow(0, 1, x.numel()).view(x.sizes()).copy_(x);
}
WeightPtr weight_on(at::Device device, const Tensor& value, bool fp8 = false) {
    auto w = weight(value, at::kBFloat16);
    w->value = w->value.to(device), w->grad = w->grad.to(device);
    w->is_fp8 = fp8;
    return w;
}

void check_rmsnorm(at::Device device, int64_t T, int64_t D) {
    auto gamma = weight_on(device, randn("gamma", {D}));
    Tensor x = awkward_rows("x", T, D, device);
    check_copy(fmt::format("rmsnorm {}x{}", T, D), rmsnorm(x, gamma, 1e-6, {1, 0}));
    check_copy("rmsnorm with a graph", rmsnorm(x.detach().requires_grad_(true), gamma, 1e-6, {1, 0}));
    check_copy("rmsnorm of unaligned rows", rmsnorm(unaligned(x), gamma, 1e-6, {1, 0}));
    CHECK(!take_rows(rmsnorm(x, gamma, 1e-6)));
    Tensor leaf_x = x.detach().requires_grad_(true), dy = bf16("dy", {T, D}, device), more = awkward_rows("more", T, D, device);
    Tensor dx = backward(rmsnorm(leaf_x, gamma, 1e-6, {0, 1}), {leaf_x}, dy)[0];
    check_copy("rmsnorm's gradient", dx);
    CHECK(dx.nan_to_num(7).equal(backward(rmsnorm(leaf_x, gamma, 1e-6), {leaf_x}, dy)[0].nan_to_num(7)));
    auto both = [&](const Tensor& added) {
        auto [y, same] = rmsnorm_and_input(leaf_x, gamma, 1e-6, {0, 1});
        return torch::autograd::grad({y, same}, {leaf_x}, {dy, added})[0];
    };
    check_copy("rmsnorm's gradient with another", both(more));
    check_copy("rmsnorm's gradient with an unaligned one", both(unaligned(more)));
}

void check_swiglu(at::Device device, int64_t R, int64_t F, bool weighted) {
    Tensor x = awkward_rows("gate_up", R, 2 * F, device).requires_grad_(true), dy = bf16("dy", {R, F}, device), row_weight;
    if (weighted) row_weight = randn("weight", {R}).to(at::kFloat).to(device).requires_grad_(true);
    const std::string what = fmt::format("swiglu {}x{}", R, F);
    check_copy(what, swiglu(x.detach(), row_weight.defined() ? row_weight.detach() : row_weight, true));
    Tensor y = swiglu(x, row_weight, true), plain = swiglu(x, row_weight);
    check_copy(what + " with a graph", y);
    CHECK(!take_rows(plain));
    Tensor dx = backward(y, {x}, dy)[0], plain_dx = backward(plain, {x}, dy)[0];
    check_copy(what + " backward", dx);
    CHECK(!take_rows(plain_dx));
    CHECK(dx.nan_to_num(7).equal(plain_dx.nan_to_num(7)));
    check_copy(what + " unaligned", swiglu(unaligned(x.detach()), {}, true));
}

void check_permute(at::Device device, int64_t T, int64_t D, int64_t align) {
    const int64_t K = 3, E = 6;
    Tensor ids = at::randint(-1, E, {T, K}, at::make_generator<at::CPUGeneratorImpl>(uint64_t(7)), at::TensorOptions().dtype(at::kLong)).to(device);
    auto plan = sort_by_expert(ids, E, align);
    Tensor x = awkward_rows("x", T, D, device), weights = at::ones({T, K}, at::TensorOptions().dtype(at::kFloat).device(device));
    const std::string what = fmt::format("permute {}x{} by {}", T, D, align);
    check_copy(what, permute(x, weights, plan, true).first);
    check_copy(what + " with a graph", permute(x.detach().requires_grad_(true), weights, plan, true).first);
    check_copy(what + " unaligned", permute(unaligned(x), weights, plan, true).first);
    Tensor rows = bf16("rows", {plan.R, D}, device).requires_grad_(true), base = bf16("base", {T, D}, device).requires_grad_(true);
    auto grads = backward(unpermute(base, rows, plan, {}, true), {rows, base}, x);
    check_copy(what + " of a gradient", grads[0]);
    CHECK(!take_rows(grads[1]));
    CHECK(!take_rows(backward(unpermute({}, rows, plan), {rows}, x)[0]));
}

void check_attention(at::Device device, MlaShape m) {
    Tensor q = bf16("q", {m.B * m.S, m.H * (m.nope + m.rope)}, device).requires_grad_(true), kv = bf16("kv", {m.B * m.S, m.G * (m.nope + m.v)}, device).requires_grad_(true);
    Tensor k_rope = bf16("k", {m.B * m.S, m.rope}, device).requires_grad_(true), dout = bf16("dout", {m.B * m.S, m.H * m.v}, device);
    auto table = rope_table(m.S, m.rope, 1e4, true, {}, at::kFloat, device);
    auto with = backward(mla_attention(q, kv, k_rope, table, m, {}, true), {q, kv, k_rope}, dout);
    const std::string what = fmt::format("attention {}x{}+{}/{}", m.H, m.nope, m.rope, m.v);
    check_copy(what + " dq", with[0]);
    check_copy(what + " dkv", with[1]);
    CHECK(!take_rows(with[2]));
    CHECK(!take_rows(backward(mla_attention(q, kv, k_rope, table, m), {q}, dout)[0]));
}

/// A layer's products: a norm that two of them read, experts with their rows sorted, and back. Returns the output, the gradient of x and those of the weights.
std::vector<Tensor> layer(at::Device device, bool copies) {
    const int64_t T = 40, D = 144, F = 80, E = 4;
    auto gamma = weight_on(device, randn("gamma", {D})), one = weight_on(device, randn("one", {D, D}) * 0.1, true), two = weight_on(device, randn("two", {2 * F, D}) * 0.1, true);
    auto dense = weight_on(device, randn("dense", {D, F}) * 0.1, true), up = weight_on(device, randn("up", {E, 2 * F, D}) * 0.1, true), down = weight_on(device, randn("down", {E, D, F}) * 0.1, true);
    Tensor x = bf16("x", {T, D}, device).requires_grad_(true);
    auto plan = sort_by_expert(at::arange(2 * T, at::kLong).remainder(E).view({T, 2}).to(device), E, 128);
    Tensor h = rmsnorm(x, gamma, 1e-6, {copies ? 2 : 0, 0});
    Tensor a = linear(h, one), b = linear(swiglu(linear(h, two), {}, copies), dense);
    auto [rows, weights] = permute(a, at::full({T, 2}, 0.5, at::TensorOptions().dtype(at::kFloat).device(device)), plan, copies);
    Tensor made = grouped_linear(swiglu(grouped_linear(rows, plan.groups, up), weights, copies), plan.groups, down);
    Tensor y = unpermute(b, made, plan, {}, copies), dx = backward(y, {x}, bf16("dy", {T, D}, device))[0];
    return {y.detach(), dx, gamma->grad, one->grad, two->grad, dense->grad, up->grad, down->grad};
}
void check_layer(at::Device device) {
    auto counted = [&](bool copies, int times) {
        moe::test::Quantizations rows;
        auto out = layer(device, copies);
        CHECK(rows.count() == times);
        return out;
    };
    auto got = counted(true, 2);                           // gradients that no kernel of ours makes: those of `dense`'s and of `one`'s output
    auto want = counted(false, 10);
    for (size_t i = 0; i < got.size(); ++i) {
        INFO("tensor " << i);
        CHECK(got[i].isfinite().all().item<bool>());
        CHECK(bit_equal(got[i], want[i]));
    }
}
}  // namespace

TEST_CASE("fp8 copies: as many readers as were announced take one, detached tensors share it, views have none", "[kernels]") {
    Tensor x = bf16("x", {3, 40});
    CHECK(!take_rows(x));
    attach_rows(x, rows_of(x), 2);
    CHECK(!take_rows(x.narrow(0, 0, 2)));
    CHECK(!take_rows(x.view({3, 40})));
    CHECK(!take_rows(x.clone()));
    auto first = take_rows(x.detach());
    REQUIRE(first);
    CHECK(bytes(first->q_RK).equal(bytes(rows_of(x).q_RK)));
    CHECK(take_rows(x.contiguous()));
    CHECK(!take_rows(x));
    CHECK(first->q_RK.storage().use_count() == 1);         // x does not hold it any more
    attach_rows(x, {});                                    // none: nothing
    CHECK(!take_rows(x));
    attach_rows(x, rows_of(x), 0);
    CHECK(!take_rows(x));
    CHECK_THROWS_AS(attach_rows(x, empty_quantized_rows(3, 48, x)), Error);
    at::NoGradGuard no_grad;
    c10::InferenceMode inference;
    Tensor y = bf16("y", {3, 40});
    attach_rows(y, rows_of(y));
    CHECK(take_rows(y));
}

TEST_CASE("fp8 copies: a view that was passed the rows' copy shares its readers with them", "[kernels]") {
    Tensor x = bf16("x", {3, 200}), view = x.view_as(x), other = bf16("o", {3, 200});
    attach_rows(x, rows_of(x), 2);
    pass_rows(x, view);
    CHECK(take_rows(view));
    CHECK(take_rows(x));
    CHECK(!take_rows(view));
    pass_rows(other, view);                               // nothing to pass
    attach_rows(x, rows_of(x));
    pass_rows(x, other);                                  // not its memory: never believed
    CHECK(!take_rows(other));
}

TEST_CASE("fp8 copies: rows that were changed since have none", "[kernels]") {
    for (bool other_memory : {false, true}) {
        Tensor x = bf16("x", {3, 40});
        auto copy = rows_of(x);
        attach_rows(x, copy, 2);
        if (other_memory) x.set_data(x.clone());
        else x.detach().mul_(2);
        CHECK(!take_rows(x));
        CHECK(!take_rows(x));
        CHECK(copy.q_RK.storage().use_count() == 1);
    }
}

TEST_CASE("fp8 copies: a product reads the copy that its rows carry", "[kernels][linear]") {
    auto w = weight_on(at::kCPU, randn("w", {16, 40}), true);
    Tensor x = bf16("x", {3, 40}), other = bf16("other", {3, 40}), y = linear(x, w);
    attach_rows(x, rows_of(other));
    CHECK(bit_equal(linear(x, w), linear(other, w)));
    CHECK(bit_equal(linear(x, w), y));                     // taken: x's own again
    Tensor leaf_x = x.detach().requires_grad_(true), dy = bf16("dy", {3, 16}), other_dy = bf16("other dy", {3, 16});
    Tensor want = backward(linear(leaf_x, w), {leaf_x}, other_dy)[0];
    attach_rows(dy, rows_of(other_dy));
    CHECK(bit_equal(backward(linear(leaf_x, w), {leaf_x}, dy)[0], want));
}

TEST_CASE("fp8 copies: what makes rows gives them the copy that quantize_rows makes", "[kernels]") {
    check_rmsnorm(at::kCPU, 6, 136);
    check_rmsnorm(at::kCPU, 0, 16);
    for (bool weighted : {false, true}) check_swiglu(at::kCPU, 6, 72, weighted);
    check_permute(at::kCPU, 11, 136, 16);
    check_attention(at::kCPU, {.B = 2, .S = 5, .H = 4, .G = 2, .nope = 8, .rope = 4, .v = 6, .softmax_scale = 0.3});
    Tensor wide = randn("x", {3, 16});
    auto gamma = weight(randn("gamma", {16}));
    CHECK(!take_rows(rmsnorm(wide, gamma, 1e-6, {1, 0})));      // only bf16 rows meet E4M3 weights
    CHECK(!take_rows(swiglu(wide, {}, true)));
}

TEST_CASE("fp8 copies: a layer with them gives the bits of one without, and reads no rows again", "[kernels][linear]") { check_layer(at::kCPU); }

TEST_CASE("cuda fp8 copies: kernels that make rows write quantize_rows' bits in passing", "[gpu][kernels]") {
    if (!moe::test::has_gpu()) return;
    for (auto [T, D] : {std::pair<int64_t, int64_t>{7, 2048}, {33, 512}, {6, 136}, {5, 8}, {130, 7168}, {0, 128}, {9, 1416}}) check_rmsnorm(kGpu, T, D);
    for (bool weighted : {false, true})
        for (auto [R, F] : {std::pair<int64_t, int64_t>{9, 1408}, {6, 136}, {7, 2816}, {5, 10944}, {130, 128}, {6, 72}, {5, 8}, {0, 128}, {6, 4096}}) check_swiglu(kGpu, R, F, weighted);
    for (auto [T, D] : {std::pair<int64_t, int64_t>{90, 2048}, {33, 136}, {5, 8}, {64, 7168}})
        for (int64_t align : {1, 128}) check_permute(kGpu, T, D, align);
    check_attention(kGpu, {.B = 2, .S = 64, .H = 4, .G = 4, .nope = 128, .rope = 64, .v = 128, .softmax_scale = 0.07});       // cuDNN
    check_attention(kGpu, {.B = 1, .S = 72, .H = 3, .G = 3, .nope = 32, .rope = 16, .v = 32, .softmax_scale = 0.1});          // widths of no whole block
    check_attention(kGpu, {.B = 1, .S = 40, .H = 4, .G = 2, .nope = 32, .rope = 16, .v = 24, .softmax_scale = 0.1});          // flash
    check_attention(kGpu, {.B = 1, .S = 40, .H = 4, .G = 2, .nope = 20, .rope = 4, .v = 12, .softmax_scale = 0.1});           // one element at a time
}

TEST_CASE("cuda fp8 copies: a layer with them gives the bits of one without", "[gpu][kernels]") {
    if (!moe::test::has_gpu()) return;
    check_layer(kGpu);
}
