// Times of the CPU kernels at the quick shape (16 sequences of 256, hidden 256, 4 heads of 32 + 16 / 32, 16 experts of 128,
// top-2; fp32), one JSON object a line: {name, value, unit, shape, dtype, device, threads}. Medians of 15 runs after 3.
#include "core/kernels/linear/linear.h"
#include "core/kernels/linear/linear_kernels.h"
#include "core/kernels/mla/attention.h"
#include "core/kernels/norm/rmsnorm.h"
#include "core/kernels/swiglu/swiglu.h"

#include <ATen/Parallel.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/autograd.h>

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>

using namespace moe;
using namespace moe::kernels;

namespace {
constexpr int64_t B = 16, S = 256, T = B * S, D = 256, E = 16, K = 2, F = 128, H = 4, nope = 32, rope = 16, v = 32;

double median_secs(const std::function<void()>& f) {
    std::vector<double> secs;
    for (int i = 0; i < 18; ++i) {
        auto start = std::chrono::steady_clock::now();
        f();
        if (i >= 3) secs.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    std::nth_element(secs.begin(), secs.begin() + secs.size() / 2, secs.end());
    return secs[secs.size() / 2];
}
void print_line(const char* name, double value, const char* unit, const std::string& shape) {
    std::printf("{\"name\": \"%s\", \"value\": %.4g, \"unit\": \"%s\", \"shape\": \"%s\", \"dtype\": \"float32\", \"device\": \"cpu\", \"threads\": %d}\n",
                name, value, unit, shape.c_str(), at::get_num_threads());
}
void report_flops(const char* name, double flops, const std::string& shape, const std::function<void()>& f) { print_line(name, flops / median_secs(f) * 1e-9, "GFLOPS", shape); }
void report_bytes(const char* name, double bytes, const std::string& shape, const std::function<void()>& f) { print_line(name, bytes / median_secs(f) * 1e-9, "GB/s", shape); }

void products(int64_t O) {
    Tensor x = at::randn({T, D}), w = at::randn({O, D}), y = at::zeros({T, O}), dx = at::zeros({T, D}), dw = at::zeros({O, D});
    double flops = 2.0 * T * D * O;
    std::string shape = fmt::format("{}x{}x{}", T, O, D);
    report_flops("linear_forward", flops, shape, [&] { product_nt_cpu(x, w, y); });
    report_flops("linear_dx", flops, shape, [&] { product_nn_cpu(y, w, dx); });
    report_flops("linear_dw", flops, shape, [&] { add_product_tn_cpu(y, x, dw, false); });
}
void grouped_products(const char* which, int64_t I, int64_t O) {
    int64_t R = T * K;
    Tensor x = at::randn({R, I}), w = at::randn({E, O, I}), y = at::zeros({R, O}), dx = at::zeros({R, I}), dw = at::zeros({E, O, I});
    RowGroups groups{at::arange(E + 1).mul(R / E), 1};
    double flops = 2.0 * double(R * I * O);
    std::string shape = fmt::format("E{} R{} {}x{} {}", E, R, O, I, which);
    report_flops("grouped_forward", flops, shape, [&] { grouped_product_nt_cpu(x, groups, w, y); });
    report_flops("grouped_dx", flops, shape, [&] { grouped_product_nn_cpu(y, groups, w, dx); });
    report_flops("grouped_dw", flops, shape, [&] { add_grouped_product_tn_cpu(y, x, groups, dw, /*overwrite=*/false); });
}
/// The op forward and, where asked, backward.
std::function<void()> with_backward(std::function<Tensor()> op, std::vector<Tensor> inputs, Tensor upstream) {
    return [=] { torch::autograd::grad({op()}, inputs, {upstream}); };
}
void attention() {
    MlaShape m{B, S, H, H, nope, rope, v, 1 / std::sqrt(double(nope + rope))};
    auto table = rope_table(S, rope, 1e4, true, {}, at::kFloat, at::kCPU);
    Tensor q = at::randn({T, H * (nope + rope)}), kv = at::randn({T, H * (nope + v)}), k_rope = at::randn({T, rope}), dout = at::randn({T, H * v});
    double flops = double(B * H * S * S) * (nope + rope + v);          // causal: half of 2 · S² · width for each of the two products
    std::string shape = fmt::format("B{} S{} H{} {}+{}/{}", B, S, H, nope, rope, v);
    report_flops("attention_forward", flops, shape, [&] { mla_attention(q, kv, k_rope, table, m); });
    for (Tensor* t : {&q, &kv, &k_rope}) t->requires_grad_(true);
    report_flops("attention_forward_backward", 3.5 * flops, shape, with_backward([=] { return mla_attention(q, kv, k_rope, table, m); }, {q, kv, k_rope}, dout));
}
void elementwise() {
    int64_t R = T * K;
    Tensor gate_up = at::randn({R, 2 * F}), weight = at::rand({R}), dy = at::randn({R, F}), x = at::randn({T, D}), dx = at::randn({T, D});
    auto gamma = c10::make_intrusive<Weight>();
    gamma->value = at::randn({D});
    gamma->grad = at::zeros({D});
    report_bytes("swiglu_forward", 4.0 * R * 3 * F, fmt::format("{}x{}", R, F), [&] { swiglu(gate_up, weight); });
    report_bytes("rmsnorm_forward", 4.0 * T * 2 * D, fmt::format("{}x{}", T, D), [&] { rmsnorm(x, gamma, 1e-6); });
    gate_up.requires_grad_(true);
    weight.requires_grad_(true);
    x.requires_grad_(true);
    report_bytes("swiglu_forward_backward", 4.0 * R * 8 * F, fmt::format("{}x{}", R, F), with_backward([=] { return swiglu(gate_up, weight); }, {gate_up, weight}, dy));
    report_bytes("rmsnorm_forward_backward", 4.0 * T * 5 * D, fmt::format("{}x{}", T, D), with_backward([=] { return rmsnorm(x, gamma, 1e-6); }, {x}, dx));
}
}  // namespace

int main() {
    products(2 * 704);
    products(D);
    grouped_products("gate and up", D, 2 * F);
    grouped_products("down", F, D);
    attention();
    elementwise();
}
