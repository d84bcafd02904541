#include "core/kernels/linear/linear.h"
#include "core/kernels/permute/permute.h"
#include "core/kernels/quantize/quantize.h"
#include "tests/gpu.h"
#include "tests/unit/kernels/reference.h"

#include <ATen/ATen.h>

using namespace moe;
using namespace moe::kernels;
using namespace moe::kernels::test;

namespace {
/// x as its E4M3 numbers read, float64.
Tensor as_rows(const Tensor& x) {
    auto q = empty_quantized_rows(x.size(0), x.size(1), x);
    quantize_rows(x, q);
    return dequantize_rows(q).to(at::kDouble);
}
Tensor as_weight(const Tensor& w) {
    auto q = empty_quantized_weight(w.dim() == 3 ? w.size(0) : 1, w.size(-2), w.size(-1), w);
    quantize_weight(w, q);
    return dequantize_weight(q).to(at::kDouble);
}
WeightPtr fp8_weight_of(const Tensor& value, at::Device device = at::kCPU) {
    auto w = weight(value, at::kBFloat16);
    w->value = w->value.to(device);
    w->grad = w->grad.to(device);
    w->is_fp8 = true;
    return w;
}
std::vector<double> host(const Tensor& t) { return values(t.cpu()); }
/// bf16 rounds a sum once: 2^-9.
constexpr double kRounded = 4e-3;

void check_dense(at::Device device, int64_t T, int64_t I, int64_t O) {
    Tensor x = leaf(randn("x", {T, I}).to(device), at::kBFloat16), dy = randn("dy", {T, O}).to(at::kBFloat16).to(device);
    auto w = fp8_weight_of(randn("w", {O, I}) * 0.1, device);
    Tensor y = linear(x, w), dx = backward(y, {x}, dy)[0];
    Tensor xq = as_rows(x.detach().cpu()), wq = as_weight(w->value.cpu())[0], dyq = as_rows(dy.cpu());
    require_close(y.cpu(), host(at::mm(xq, wq.t())), kRounded);
    require_close(dx.cpu(), host(at::mm(dyq, wq)), kRounded);
    require_close(w->grad.cpu(), host(at::mm(dy.cpu().to(at::kDouble).t(), x.detach().cpu().to(at::kDouble))), 1e-5);
}

void check_grouped(at::Device device, int64_t I, int64_t O) {
    Tensor ids = at::tensor({0, 2, 2, 0, 3, 2, 0, 0, 3, 2}, at::kLong).view({5, 2}).to(device);
    auto plan = sort_by_expert(ids, 4, 128);
    Tensor tokens = randn("x", {5, I}).to(at::kBFloat16).to(device), grads = randn("dy", {5, O}).to(at::kBFloat16).to(device);
    auto rows = [&](const Tensor& t) { return permute(t, at::ones({5, 2}, at::TensorOptions().dtype(at::kFloat).device(device)), plan).first; };
    Tensor x = rows(tokens).requires_grad_(true), dy = rows(grads);
    auto w = fp8_weight_of(randn("w", {4, O, I}) * 0.1, device);
    Tensor y = grouped_linear(x, plan.groups, w), dx = backward(y, {x}, dy)[0];
    Tensor wq = as_weight(w->value.cpu()), xq = as_rows(tokens.cpu()), dyq = as_rows(grads.cpu());
    for (int64_t t = 0; t < 5; ++t)
        for (int64_t k = 0; k < 2; ++k) {
            int64_t row = plan.position_TK.cpu()[t][k].item<int>(), e = ids.cpu()[t][k].item<int64_t>();
            require_close(y[row].cpu(), host(at::mv(wq[e], xq[t])), kRounded);
            require_close(dx[row].cpu(), host(at::mv(wq[e].t(), dyq[t])), kRounded);
        }
}
}  // namespace

TEST_CASE("linear in fp8: y and dx are products of the E4M3 numbers, the weight's gradient is bf16's", "[kernels][linear]") {
    check_dense(at::kCPU, 5, 200, 72);
    check_dense(at::kCPU, 130, 64, 130);
    auto w = fp8_weight_of(randn("w", {16, 16}));
    CHECK(linear(at::zeros({0, 16}, at::kBFloat16), w).sizes() == at::IntArrayRef({0, 16}));
    Tensor wide = randn("x", {3, 16}).to(at::kFloat);
    w->value = w->value.to(at::kFloat);
    CHECK(bit_equal(linear(wide, w), at::mm(wide, w->value.t())));             // only bf16 activations are rounded to it
}

TEST_CASE("linears in fp8: each weight as linear has it, dx the sum of both", "[kernels][linear]") {
    auto a = fp8_weight_of(randn("a", {72, 48}) * 0.1), b = fp8_weight_of(randn("b", {40, 48}) * 0.1), plain = weight(randn("p", {16, 48}) * 0.1, at::kBFloat16);
    Tensor x = leaf(randn("x", {9, 48}), at::kBFloat16);
    std::vector<Tensor> dys;
    for (int64_t O : {72, 40, 16}) dys.push_back(randn("dy" + std::to_string(O), {9, O}).to(at::kBFloat16));
    auto ys = linears(x, {a, b, plain});
    Tensor dx = torch::autograd::grad(ys, {x}, dys)[0], want = at::zeros({9, 48}, at::kDouble);
    const WeightPtr all[] = {a, b, plain};
    for (size_t k = 0; k < 3; ++k) {
        CHECK(bit_equal(ys[k].detach(), linear(x.detach(), all[k])));
        want += backward(linear(x, all[k]), {x}, dys[k])[0].to(at::kDouble);
    }
    require_close(dx, want, 3 * kRounded);
}

TEST_CASE("grouped_linear in fp8: rows of an expert meet its E4M3 numbers", "[kernels][linear]") { check_grouped(at::kCPU, 144, 80); }

TEST_CASE("linear in fp8: a weight's copies follow its values", "[kernels][linear]") {
    auto w = fp8_weight_of(randn("w", {16, 32}));
    Tensor x = randn("x", {4, 32}).to(at::kBFloat16), before = linear(x, w);
    CHECK(bit_equal(linear(x, w), before));
    w->value.mul_(2);
    CHECK(bit_equal(linear(x, w), before * 2));
    w->value = w->value.clone().mul_(2);                                       // other memory
    CHECK(bit_equal(linear(x, w), before * 4));
}

TEST_CASE("cuda linear in fp8: dense and grouped products and gradients are those of the E4M3 numbers", "[gpu][kernels]") {
    if (!moe::test::has_gpu()) return;
    check_dense(at::Device(at::kCUDA, 0), 300, 256, 144);
    check_dense(at::Device(at::kCUDA, 0), 64, 144, 576);
    check_grouped(at::Device(at::kCUDA, 0), 256, 128);
    check_grouped(at::Device(at::kCUDA, 0), 144, 80);
}
