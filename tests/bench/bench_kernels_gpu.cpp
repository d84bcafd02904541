// Kernels on one GPU: a JSON line per figure. `bench_kernels_gpu [part of a name]`.
// Median of repeats between two events; inputs are larger than the cache where bandwidth is measured.
#include "core/kernels/adamw/adamw.h"
#include "core/kernels/adamw/adamw_kernels.h"
#include "core/kernels/embed/embed_kernels.h"
#include "core/kernels/grouped/grouped.h"
#include "core/kernels/head/head_loss_kernels.h"
#include "core/kernels/linear/linear_kernels.h"
#include "core/kernels/mla/attention_kernels.h"
#include "core/kernels/norm/rmsnorm_kernels.h"
#include "core/kernels/permute/permute.h"
#include "core/kernels/permute/permute_kernels.h"
#include "core/kernels/swiglu/swiglu_kernels.h"
#include "tests/gpu.h"

#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>
#include <ATen/cuda/CUDAEvent.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>
#include <string>
#include <thread>
#include <vector>

using namespace moe;
using namespace moe::kernels;

namespace {
std::string filter, device_name;
at::TensorOptions bf16() { return at::TensorOptions().dtype(at::kBFloat16).device(at::kCUDA); }
at::TensorOptions fp32() { return bf16().dtype(at::kFloat); }

/// Seconds of one call, the median of `repeats`.
double seconds(const std::function<void()>& f, int repeats = 20, int warm_up = 3) {
    for (int i = 0; i < warm_up; ++i) f();
    std::vector<double> times;
    for (int i = 0; i < repeats; ++i) {
        at::cuda::CUDAEvent start(cudaEventDefault), end(cudaEventDefault);
        start.record();
        f();
        end.record();
        end.synchronize();
        times.push_back(start.elapsed_time(end) * 1e-3);
    }
    std::nth_element(times.begin(), times.begin() + repeats / 2, times.end());
    return times[repeats / 2];
}

void print(const std::string& name, double value, const char* unit, const std::string& shape, const char* dtype) {
    nlohmann::ordered_json line{{"name", name}, {"value", value}, {"unit", unit}, {"shape", shape}, {"dtype", dtype}, {"device", device_name}};
    std::printf("%s\n", line.dump().c_str());
    std::fflush(stdout);
}
bool wanted(const std::string& name) { return filter.empty() || name.find(filter) != std::string::npos; }

void bandwidth(const std::string& name, const std::string& shape, const char* dtype, double bytes, const std::function<void()>& f) {
    if (wanted(name)) print(name, bytes / seconds(f) * 1e-9, "GB/s", shape, dtype);
}
void speed(const std::string& name, const std::string& shape, double flops, const std::function<void()>& f) {
    if (wanted(name)) print(name, flops / seconds(f) * 1e-12, "TFLOPS", shape, "bf16");
}

void rows_and_elements() {
    const int64_t T = 16384, D = 2048, K = 6, E = 64, F = 1408;
    Tensor x = at::randn({T, D}, bf16()), gamma = at::randn({D}, bf16()), y = at::empty_like(x), rstd = at::empty({T}, fp32()), dgamma = at::zeros({D}, fp32());
    const double x_bytes = double(T) * D * 2;
    bandwidth("copy", "16384x2048", "bf16", 2 * x_bytes, [&] { y.copy_(x); });
    bandwidth("rmsnorm_forward", "16384x2048", "bf16", 2 * x_bytes, [&] { rmsnorm_forward_cuda(x, gamma, 1e-6, y, rstd); });
    Tensor dx = at::empty_like(x);
    bandwidth("rmsnorm_backward", "16384x2048", "bf16", 3 * x_bytes, [&] { rmsnorm_backward_cuda(y, x, gamma, rstd, {}, dx, dgamma); });

    Tensor ids = std::get<1>(at::topk(at::rand({T, E}, fp32()), K));
    SortPlan plan = sort_by_expert(ids, E);
    if (wanted("sort_by_expert")) print("sort_by_expert", seconds([&] { sort_by_expert(ids, E); }) * 1e6, "us", "T16384 K6 E64", "int64");
    Tensor rows = at::empty({plan.R, D}, bf16()), out = at::empty_like(x);
    const double row_bytes = double(plan.R) * D * 2;
    // What must move: each token read once (its K copies come from the cache), each row written; and the other way.
    bandwidth("permute", "T16384 K6 D2048", "bf16", x_bytes + row_bytes, [&] { gather_rows_cuda(x, plan, rows); });
    bandwidth("unpermute", "T16384 K6 D2048", "bf16", 2 * x_bytes + row_bytes, [&] { add_rows_cuda(x, {}, rows, plan, out); });

    Tensor gate_up = at::randn({plan.R, 2 * F}, bf16()), h = at::randn({plan.R, F}, bf16()), weight = at::rand({plan.R}, fp32()), dgate_up = at::empty_like(gate_up), dweight = at::empty_like(weight);
    const double h_bytes = double(plan.R) * F * 2;
    bandwidth("swiglu_forward", "98304x1408 weighted", "bf16", 3 * h_bytes, [&] { swiglu_forward_cuda(gate_up, weight, h); });
    bandwidth("swiglu_backward", "98304x1408 weighted", "bf16", 5 * h_bytes, [&] { swiglu_backward_cuda(h, gate_up, weight, dgate_up, dweight); });
}

/// The passes above with E4M3 copies of what they write, and those passes followed by one that reads the rows again.
void fp8_copies() {
    if (!wanted("fp8_copy")) return;
    const int64_t T = 16384, D = 2048, K = 6, E = 64, F = 1408;
    auto both = [](const std::string& name, const std::string& shape, double bytes, double copy_bytes, const Tensor& made, const std::function<void(const QuantizedRows&)>& f) {
        auto copy = empty_quantized_rows(made.size(0), made.size(1), made);
        bandwidth("fp8_copy_" + name, shape, "bf16", bytes + copy_bytes, [&] { f(copy); });
        bandwidth("fp8_copy_" + name + "_apart", shape, "bf16", bytes + copy_bytes, [&] { f({}); quantize_rows(made, copy); });
    };
    auto copy_bytes = [](const Tensor& x) { return double(x.numel()) * (1 + 4.0 / 128); };
    auto bytes = [](const Tensor& x) { return double(x.numel()) * 2; };
    Tensor x = at::randn({T, D}, bf16()), gamma = at::randn({D}, bf16()), y = at::empty_like(x), rstd = at::empty({T}, fp32());
    both("rmsnorm_forward", "16384x2048", 2 * bytes(x), copy_bytes(y), y, [&](const QuantizedRows& c) { rmsnorm_forward_cuda(x, gamma, 1e-6, y, rstd, c); });
    Tensor dx = at::empty_like(x), dgamma = at::zeros({D}, fp32());
    both("rmsnorm_backward", "16384x2048 with another gradient", 4 * bytes(x), copy_bytes(dx), dx, [&](const QuantizedRows& c) { rmsnorm_backward_cuda(y, x, gamma, rstd, y, dx, dgamma, c); });
    SortPlan plan = sort_by_expert(std::get<1>(at::topk(at::rand({T, E}, fp32()), K)), E, 128);
    Tensor rows = at::empty({plan.R, D}, bf16());
    both("permute", "T16384 K6 D2048", bytes(x) + bytes(rows), copy_bytes(rows), rows, [&](const QuantizedRows& c) { gather_rows_cuda(x, plan, rows, c); });
    auto swiglu = [&](int64_t R, int64_t width, const std::string& shape) {
        Tensor gate_up = at::randn({R, 2 * width}, bf16()), h = at::randn({R, width}, bf16()), weight = at::rand({R}, fp32()), dgate_up = at::empty_like(gate_up), dweight = at::empty_like(weight);
        both("swiglu_forward", shape, 3 * bytes(h), copy_bytes(h), h, [&](const QuantizedRows& c) { swiglu_forward_cuda(gate_up, weight, h, c); });
        both("swiglu_backward", shape, 5 * bytes(h), copy_bytes(dgate_up), dgate_up, [&](const QuantizedRows& c) { swiglu_backward_cuda(h, gate_up, weight, dgate_up, dweight, c); });
    };
    swiglu(T * K, F, "98304x1408 weighted");
    swiglu(T, 10944, "16384x10944 weighted");
    const MlaShape m{.B = 4, .S = 4096, .H = 16, .G = 16, .nope = 128, .rope = 64, .v = 128, .softmax_scale = 0.0721};
    MlaInputs in{at::randn({T, m.H * 192}, bf16()), at::randn({T, m.G * 256}, bf16()), at::randn({T, m.rope}, bf16()), {}, m, {}};
    in.table = rope_table(m.S, m.rope, 1e4, true, {}, at::kFloat, at::Device(at::kCUDA, 0));
    Tensor out = at::empty({T, m.H * m.v}, bf16()), dout = at::randn_like(out), dq = at::empty_like(in.q), dkv = at::empty_like(in.kv), dk_rope = at::empty_like(in.k_rope);
    auto saved = mla_attention_forward_cuda(in, out, true);
    auto q_copy = empty_quantized_rows(T, dq.size(1), dq), kv_copy = empty_quantized_rows(T, dkv.size(1), dkv);
    if (wanted("fp8_copy_attention_backward")) {
        print("fp8_copy_attention_backward", seconds([&] { mla_attention_backward_cuda(in, out, saved, dout, {dq, dkv, dk_rope, q_copy, kv_copy}); }) * 1e6, "us", "192/128 B4 H16 S4096", "bf16");
        print("fp8_copy_attention_backward_apart", seconds([&] { mla_attention_backward_cuda(in, out, saved, dout, {dq, dkv, dk_rope}); quantize_rows(dq, q_copy); quantize_rows(dkv, kv_copy); }) * 1e6,
              "us", "192/128 B4 H16 S4096", "bf16");
    }
}

void optimizer() {
    const int64_t n = int64_t(1) << 28;
    Tensor grad = at::randn({n}, fp32()), m = at::zeros({n}, fp32()), v = at::zeros({n}, fp32());
    auto [value, rest] = split_master(at::randn({n}, fp32()));
    const Master master{rest, value};
    AdamWOptions options{.lr = 1e-4, .weight_decay = 0.1};
    bandwidth("adamw", "2^28", "bf16 value and 16-bit rest", double(n) * 28, [&] { adamw_cuda(master, grad, m, v, options); });
    const int64_t E = 64, O = 2048, I = 2048;
    const std::vector<AdamWMatrix> matrix = {{master, grad, m, v, empty_quantized_weight(E, O, I, value)}};
    bandwidth("adamw_quantized", "E64 2048x2048", "and E4M3 copies", double(n) * 30, [&] { adamw_quantized(matrix, options); });
    bandwidth("adamw_quantized_apart", "E64 2048x2048", "and E4M3 copies", double(n) * 30, [&] { adamw_quantized_apart(matrix[0], options); });
    Tensor sum = at::empty({}, fp32().dtype(at::kDouble));
    bandwidth("sum_of_squares", "2^28", "fp32", double(n) * 4, [&] { sum_of_squares_cuda(grad, sum); });
}

void vocabulary() {
    const int64_t T = 16384, D = 2048, V = 102400, n = 1024;
    Tensor ids = at::randint(V, {T}, fp32().dtype(at::kLong)), w = at::randn({V, D}, bf16()), y = at::randn({T, D}, bf16()), dw = at::zeros({V, D}, fp32());
    bandwidth("embed_forward", "T16384 V102400 D2048", "bf16", double(T) * D * 4, [&] { embed_forward_cuda(ids, w, y); });
    bandwidth("embed_add_grad", "T16384 V102400 D2048", "bf16", double(T) * D * 10, [&] { embed_add_grad_cuda(y, ids, dw, false); });
    Tensor logits = at::randn({n, V}, fp32()), loss = at::empty({n}, fp32().dtype(at::kDouble)), dlogits = at::empty({n, V}, bf16()), targets = at::randint(V, {n}, fp32().dtype(at::kLong));
    bandwidth("cross_entropy", "1024x102400", "fp32 -> bf16", double(n) * V * 6, [&] { cross_entropy_cuda(logits, targets, 1.0, loss, dlogits); });
    Tensor x = at::randn({n, D}, bf16());
    speed("head_logits", "1024x102400x2048 fp32 out", 2.0 * n * V * D, [&] { product_nt_cuda(x, w, logits); });
    speed("head_wgrad", "102400x2048x1024 into fp32", 2.0 * n * V * D, [&] { add_product_tn_cuda(dlogits, x, dw, false); });
}

void dense() {
    const int64_t T = 16384, I = 2048, O = 4096;
    Tensor x = at::randn({T, I}, bf16()), w = at::randn({O, I}, bf16()), y = at::randn({T, O}, bf16()), dx = at::empty_like(x), dw = at::zeros({O, I}, fp32());
    const double flops = 2.0 * T * I * O;
    speed("linear_forward", "16384x4096x2048", flops, [&] { product_nt_cuda(x, w, y); });
    speed("linear_dgrad", "16384x2048x4096", flops, [&] { product_nn_cuda(y, w, dx); });
    speed("linear_wgrad", "4096x2048x16384 into fp32", flops, [&] { add_product_tn_cuda(y, x, dw, false); });
    Tensor router = at::randn({64, I}, fp32()), scores = at::empty({T, 64}, fp32());
    speed("router", "16384x64x2048 fp32", 2.0 * T * I * 64, [&] { product_nt_cuda(x, router, scores); });
}

void grouped() {
    const int64_t E = 64, R = 98304, O = 1408, I = 2048;
    Tensor offsets = at::arange(0, R + 1, R / E, at::kLong), ends = offsets.slice(0, 1).to(at::kCUDA, at::kInt);
    Tensor x = at::randn({R, I}, bf16()), w = at::randn({E, O, I}, bf16()), y = at::randn({R, O}, bf16()), dx = at::empty_like(x), dw = at::zeros({E, O, I}, fp32());
    const double flops = 2.0 * R * I * O;
    const std::string shape = "E64 M98304 1408x2048";
    speed("grouped_forward", shape, flops, [&] { grouped_product_nt_cuda(x, offsets, w, y); });
    speed("grouped_forward_library", shape, flops, [&] { at::_grouped_mm(x, w.transpose(-2, -1), ends); });
    speed("grouped_dgrad", shape, flops, [&] { grouped_product_nn_cuda(y, offsets, w, dx); });
    speed("grouped_dgrad_library", shape, flops, [&] { at::_grouped_mm(y, w, ends); });
    speed("grouped_wgrad", shape + " into fp32", flops, [&] { add_grouped_product_tn_cuda(y, x, offsets, dw, false); });
    speed("grouped_wgrad_library", shape + " bf16 out", flops, [&] { at::_grouped_mm(y.t(), x, ends); });
    speed("grouped_wgrad_library_and_add", shape + " into fp32", flops, [&] { dw.add_(at::_grouped_mm(y.t(), x, ends)); });
}

struct Rival { std::string name; std::function<void()> run; const char* dtype = "bf16"; };
/// TFLOPS of each, call by call in turn: a card at its power limit slows down as it warms, which must not favour the first.
void in_turn(const std::string& shape, double flops, std::vector<Rival> rivals, int rounds = 15) {
    std::erase_if(rivals, [](const Rival& r) { return !wanted(r.name); });
    std::vector<std::vector<double>> times(rivals.size());
    for (int i = -2; i < rounds; ++i)
        for (size_t r = 0; r < rivals.size(); ++r) {
            const double t = seconds(rivals[r].run, 1, 0);
            if (i >= 0) times[r].push_back(t);
        }
    for (size_t r = 0; r < rivals.size(); ++r) {
        std::nth_element(times[r].begin(), times[r].begin() + rounds / 2, times[r].end());
        print(rivals[r].name, flops / times[r][rounds / 2] * 1e-12, "TFLOPS", shape, rivals[r].dtype);
    }
}

/// TFLOPS after a rest, as between a step's lighter kernels: before the power limit slows the card.
void in_burst(const std::string& name, const std::string& shape, double flops, const std::function<void()>& f) {
    if (!wanted(name)) return;
    std::vector<double> times;
    for (int i = 0; i < 9; ++i) {
        std::this_thread::sleep_for(std::chrono::milliseconds(60));
        times.push_back(seconds(f, 1, 1));
    }
    std::nth_element(times.begin(), times.begin() + 4, times.end());
    print(name, flops / times[4] * 1e-12, "TFLOPS", shape, "e4m3");
}

/// Groups of R rows; `skewed`: from none to twice the mean.
Tensor device_offsets(int64_t E, int64_t R, bool skewed) {
    std::vector<int> offset{0};
    const int64_t tiles = R / kGroupAlign;
    int64_t weights = 0, left = tiles;
    auto weight = [&](int64_t e) { return !skewed ? 1 : e % 16 == 5 ? 0 : 1 + e * 37 % 11; };
    for (int64_t e = 0; e < E; ++e) weights += weight(e);
    for (int64_t e = 0; e < E; ++e) {
        const int64_t n = e + 1 == E ? left : tiles * weight(e) / weights;
        left -= n;
        offset.push_back(int(offset.back() + n * kGroupAlign));
    }
    return at::tensor(offset, at::kInt).to(at::kCUDA);
}

/// Groups known on the device only, beside the library's product.
void grouped_on_device(int64_t E, int64_t R, int64_t O, int64_t I, bool skewed, bool wgrad) {
    Tensor offsets = device_offsets(E, R, skewed), host = offsets.cpu().to(at::kLong), ends = offsets.slice(0, 1).contiguous();
    Tensor x = at::randn({R, I}, bf16()), w = at::empty({E, O, I}, bf16()).normal_(), y = at::randn({R, O}, bf16()), dx = at::empty_like(x), out = at::empty_like(y);
    const double flops = 2.0 * double(R) * double(I * O);
    const std::string shape = "E" + std::to_string(E) + " M" + std::to_string(R) + " " + std::to_string(O) + "x" + std::to_string(I) + (skewed ? " skewed" : "");
    in_turn(shape, flops, {{"device_groups_forward", [&] { grouped_nt(x, offsets, w, out); }}, {"device_groups_forward_library", [&] { at::_grouped_mm(x, w.transpose(-2, -1), ends); }}});
    in_turn(shape, flops, {{"device_groups_dgrad", [&] { grouped_nn(y, offsets, w, dx); }}, {"device_groups_dgrad_library", [&] { at::_grouped_mm(y, w, ends); }}});
    if (!wgrad) return;
    Tensor dw = at::zeros({E, O, I}, fp32()), narrow = at::zeros({E, O, I}, bf16());
    in_turn(shape + " into bf16", flops, {{"device_groups_wgrad_bf16", [&] { add_grouped_tn(y, x, offsets, narrow); }},
                                          {"device_groups_wgrad_bf16_written", [&] { grouped_tn(y, x, offsets, narrow); }},
                                          {"device_groups_wgrad_library_bf16_out", [&] { at::_grouped_mm(y.t(), x, ends); }}});
    in_turn(shape + " into fp32", flops, {{"device_groups_wgrad", [&] { add_grouped_tn(y, x, offsets, dw); }},
                                          {"device_groups_wgrad_written", [&] { grouped_tn(y, x, offsets, dw); }},
                                          {"device_groups_wgrad_library_bf16_out", [&] { at::_grouped_mm(y.t(), x, ends); }},
                                          {"device_groups_wgrad_library_and_add", [&] { add_grouped_product_tn_cuda(y, x, host, dw, false); }}});
}

void device_groups() {
    if (!wanted("device_groups")) return;
    for (bool skewed : {false, true}) {
        grouped_on_device(64, 98304, 2816, 2048, skewed, true);
        grouped_on_device(64, 98304, 2048, 1408, skewed, true);
    }
    grouped_on_device(64, 98304, 1408, 2048, false, true);
    grouped_on_device(256, 131072, 2048, 7168, false, true);
    grouped_on_device(8, 32768, 2048, 1024, false, true);
    grouped_on_device(4, 8192, 1024, 512, false, true);
    // What a launch costs the host, with descriptors that come again and with matrices that always lie elsewhere.
    Tensor x = at::zeros({1 << 20, 64}, bf16()), w = at::zeros({1, 128, 64}, bf16()), y = at::zeros({128, 128}, bf16()), offsets = at::tensor({0, 128}, at::kInt).to(at::kCUDA);
    for (bool fresh : {false, true}) {
        const int calls = 500;
        int64_t row = 0;
        auto once = [&] { grouped_nt(x.narrow(0, fresh ? row++ : 0, 128), offsets, w, y); };
        for (int i = 0; i < 5; ++i) once();
        at::cuda::getCurrentCUDAStream().synchronize();
        auto start = std::chrono::steady_clock::now();
        for (int i = 0; i < calls; ++i) once();
        const double us = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() / calls * 1e6;
        print(fresh ? "device_groups_launch_one_new_matrix" : "device_groups_launch", us, "us", "on the host", "bf16");
        at::cuda::getCurrentCUDAStream().synchronize();
    }
}

QuantizedRows quantized_rows(const Tensor& x) {
    QuantizedRows q = empty_quantized_rows(x.size(0), x.size(1), x);
    quantize_rows(x, q);
    return q;
}
QuantizedWeight quantized_weight(const Tensor& w) {
    QuantizedWeight q = empty_quantized_weight(w.dim() == 3 ? w.size(0) : 1, w.size(-2), w.size(-1), w);
    quantize_weight(w, q);
    return q;
}

/// E4M3 products beside bf16 and the library's with a scale a row. E = 1: dense.
void fp8_products(int64_t E, int64_t R, int64_t O, int64_t I, bool skewed) {
    Tensor offsets = device_offsets(E, R, skewed), ends = offsets.slice(0, 1).contiguous();
    Tensor x = at::randn({R, I}, bf16()), w = at::empty({E, O, I}, bf16()).normal_(), dy = at::randn({R, O}, bf16()), y = at::empty_like(dy), dx = at::empty_like(x);
    QuantizedRows qx = quantized_rows(x), qdy = quantized_rows(dy);
    QuantizedWeight qw = quantized_weight(w);
    Tensor ones_R = at::ones({R}, fp32()), ones_EO = at::ones({E, O}, fp32()), ones_EI = at::ones({E, I}, fp32());
    const double flops = 2.0 * double(R) * double(I * O);
    const std::string shape = "E" + std::to_string(E) + " M" + std::to_string(R) + " " + std::to_string(O) + "x" + std::to_string(I) + (skewed ? " skewed" : "");
    const Tensor groups = E == 1 ? Tensor() : offsets;
    const bool fits = grouped_fits(w);              // else dense: a plain product
    in_turn(shape, flops, {{"fp8_forward", [&] { grouped_nt_fp8(qx, groups, qw, y); }, "e4m3"},
                           {"fp8_forward_bf16", [&] { if (fits) grouped_nt(x, offsets, w, y); else at::mm_out(y, x, w[0].t()); }},
                           {"fp8_forward_library", [&] { at::_scaled_grouped_mm(qx.q_RK, qw.q_EOI.transpose(1, 2), ones_R, ones_EO, ends, {}, {}, at::kBFloat16, true); }, "e4m3"}});
    in_turn(shape, flops, {{"fp8_dgrad", [&] { grouped_nn_fp8(qdy, groups, qw, dx); }, "e4m3"},
                           {"fp8_dgrad_bf16", [&] { if (fits) grouped_nn(dy, offsets, w, dx); else at::mm_out(dx, dy, w[0]); }},
                           {"fp8_dgrad_library", [&] { at::_scaled_grouped_mm(qdy.q_RK, qw.q_EIO.transpose(1, 2), ones_R, ones_EI, ends, {}, {}, at::kBFloat16, true); }, "e4m3"}});
    in_burst("fp8_forward_burst", shape, flops, [&] { grouped_nt_fp8(qx, groups, qw, y); });
    in_burst("fp8_dgrad_burst", shape, flops, [&] { grouped_nn_fp8(qdy, groups, qw, dx); });
}

void fp8() {
    if (!wanted("fp8")) return;
    for (auto [R, K] : {std::pair<int64_t, int64_t>{16384, 2048}, {98304, 2048}, {98304, 1408}}) {
        Tensor x = at::randn({R, K}, bf16());
        QuantizedRows q = quantized_rows(x);
        bandwidth("fp8_quantize_rows", std::to_string(R) + "x" + std::to_string(K), "bf16", double(R) * K * (2 + 1 + 4.0 / 128), [&] { quantize_rows(x, q); });
    }
    for (bool wide : {false, true}) {
        const int64_t E = 64, O = 2816, I = 2048;
        Tensor w = at::randn({E, O, I}, wide ? fp32() : bf16());
        QuantizedWeight q = quantized_weight(w);
        bandwidth("fp8_quantize_weight", "E64 2816x2048", wide ? "fp32" : "bf16", double(E) * O * I * ((wide ? 4 : 2) + 2), [&] { quantize_weight(w, q); });
    }
    fp8_products(64, 98304, 2816, 2048, false);
    fp8_products(64, 98304, 2816, 2048, true);
    fp8_products(64, 98304, 2048, 1408, false);
    fp8_products(64, 98304, 1408, 2048, false);
    fp8_products(256, 131072, 2048, 7168, false);
    fp8_products(1, 16384, 4096, 2048, false);
    fp8_products(1, 16384, 10944, 2048, false);
}

/// Documents of 128 … 2047 tokens. Returns the pairs of query and key that are seen.
double documents(const MlaShape& m, Tensor& doc_start) {
    Tensor doc = at::empty({m.B, m.S}, at::kInt);
    double pairs = 0;
    uint32_t state = 1;
    for (int64_t b = 0; b < m.B; ++b)
        for (int64_t s = 0; s < m.S;) {
            state = state * 1664525u + 1013904223u;
            const int64_t n = std::min<int64_t>(m.S - s, 128 + (state >> 8) % 1920);
            doc[b].narrow(0, s, n).fill_(s);
            pairs += double(n) * double(n + 1) / 2;
            s += n;
        }
    doc_start = doc.to(at::kCUDA);
    return pairs;
}

void attention() {
    const MlaShape m{.B = 4, .S = 4096, .H = 16, .G = 16, .nope = 128, .rope = 64, .v = 128, .softmax_scale = 0.0721};
    const int64_t T = m.B * m.S, D = 192;
    MlaInputs in{at::randn({T, m.H * D}, bf16()), at::randn({T, m.G * (m.nope + m.v)}, bf16()), at::randn({T, m.rope}, bf16()), {}, m, {}};
    in.table = rope_table(m.S, m.rope, 1e4, true, {}, at::kFloat, at::Device(at::kCUDA, 0));
    Tensor dout = at::randn({T, m.H * m.v}, bf16()), dq = at::empty_like(in.q), dkv = at::empty_like(in.kv), dk_rope = at::empty_like(in.k_rope);
    const double causal = double(m.B) * m.H * m.S * (m.S + 1) / 2, forward = 2 * (192 + 128), backward = 2 * (3 * 192 + 2 * 128);
    auto ours = [&](const std::string& name, const std::string& shape, double pairs) {
        Tensor out;
        std::vector<Tensor> saved;
        auto run = [&] {
            out = at::empty({T, m.H * m.v}, bf16());
            saved = mla_attention_forward_cuda(in, out, true);
        };
        if (!wanted(name)) return;
        speed(name + "_forward", shape, pairs * forward, run);
        run();
        speed(name + "_backward", shape, pairs * backward, [&] { mla_attention_backward_cuda(in, out, saved, dout, {dq, dkv, dk_rope}); });
    };
    const std::string shape = "192/128 B4 H16 S4096 causal";
    ours("attention", shape, causal);

    Tensor q = at::randn({m.B, m.S, m.H, D}, bf16()).transpose(1, 2), k = at::randn({m.B, m.S, m.H, D}, bf16()).transpose(1, 2), v = at::randn({m.B, m.S, m.H, m.v}, bf16()).transpose(1, 2);
    auto library = [&] { return at::_scaled_dot_product_cudnn_attention(q, k, v, {}, true, 0.0, true, false, m.softmax_scale); };
    if (wanted("attention_library")) {
        speed("attention_library_forward", shape, causal * forward, [&] { library(); });
        auto r = library();
        Tensor d = dout.view({m.B, m.S, m.H, m.v}).transpose(1, 2);
        speed("attention_library_backward", shape, causal * backward, [&] {
            at::_scaled_dot_product_cudnn_attention_backward(d, q, k, v, std::get<0>(r), std::get<1>(r), std::get<6>(r), std::get<7>(r), Tensor(), Tensor(), Tensor(), m.S, m.S, 0.0,
                                                             true, m.softmax_scale);
        });
    }
    const double pairs = documents(m, in.doc_start_BS) * m.H;
    const std::string packed = "192/128 B4 H16 S4096 documents of 128-2047";
    ours("attention_documents", packed, pairs);
    if (wanted("attention_documents_library")) {           // flash, which wants one width: v padded to 192, operands ready
        Tensor first = (in.doc_start_BS == at::arange(m.S, fp32().dtype(at::kInt))).flatten();
        Tensor starts = at::cat({at::nonzero(first).flatten().to(at::kInt), at::full({1}, T, fp32().dtype(at::kInt))});
        Tensor fq = at::randn({T, m.H, D}, bf16()), fk = at::randn({T, m.H, D}, bf16()), fv = at::randn({T, m.H, D}, bf16()), d = at::randn({T, m.H, D}, bf16());
        auto flash = [&] { return at::_flash_attention_forward(fq, fk, fv, starts, starts, m.S, m.S, 0.0, true, false, m.softmax_scale); };
        speed("attention_documents_library_forward", packed, pairs * forward, [&] { flash(); });
        auto [o, lse, rng, unused, mask] = flash();
        speed("attention_documents_library_backward", packed, pairs * backward, [&] { at::_flash_attention_backward(d, fq, fk, fv, o, lse, starts, starts, m.S, m.S, 0.0, true, rng, unused, m.softmax_scale); });
    }
    in.doc_start_BS = Tensor();
    in.shape.window = 1024;
    ours("attention_window", "192/128 B4 H16 S4096 window 1024", double(m.B) * m.H * (1024.0 * (m.S - 1024) + 1024.0 * 1025 / 2));
}
/// A layer's experts and its shared ones in forward, one after the other and the shared ones on a stream beside: milliseconds of both.
void shared_beside() {
    if (!wanted("shared_experts")) return;
    const int64_t T = 16384, D = 2048, K = 6, E = 64, F = 1408;
    Tensor x = at::randn({T, D}, bf16()), router = at::randn({E, D}, fp32()), scores = at::empty({T, E}, fp32()), ids = std::get<1>(at::topk(at::rand({T, E}, fp32()), K));
    Tensor up = at::empty({E, 2 * F, D}, bf16()).normal_(0, 0.02), down = at::empty({E, D, F}, bf16()).normal_(0, 0.02);
    Tensor shared_up = at::randn({4 * F, D}, bf16()).mul_(0.02), shared_down = at::randn({D, 2 * F}, bf16()).mul_(0.02), out = at::empty_like(x), shared = at::empty_like(x);
    SortPlan plan = sort_by_expert(ids, E, kGroupAlign);
    Tensor rows = at::empty({plan.R, D}, bf16()), gate_up = at::empty({plan.R, 2 * F}, bf16()), h = at::empty({plan.R, F}, bf16()), back = at::empty({plan.R, D}, bf16()), weight = at::rand({plan.R}, fp32());
    Tensor shared_gate_up = at::empty({T, 4 * F}, bf16()), shared_h = at::empty({T, 2 * F}, bf16());
    auto routed = [&] {
        product_nt_cuda(x, router, scores);
        sort_by_expert(ids, E, kGroupAlign);
        gather_rows_cuda(x, plan, rows);
        grouped_nt(rows, plan.groups.offsets_E1, up, gate_up);
        swiglu_forward_cuda(gate_up, weight, h);
        grouped_nt(h, plan.groups.offsets_E1, down, back);
        add_rows_cuda(x, {}, back, plan, out);
    };
    auto beside = [&] {
        product_nt_cuda(x, shared_up, shared_gate_up);
        swiglu_forward_cuda(shared_gate_up, {}, shared_h);
        product_nt_cuda(shared_h, shared_down, shared);
    };
    auto on = [&](c10::cuda::CUDAStream side, bool side_first) {
        auto here = c10::cuda::getCurrentCUDAStream();
        at::cuda::CUDAEvent forked, joined;
        forked.record(here);
        forked.block(side);
        auto there = [&] {
            c10::cuda::CUDAStreamGuard guard(side);
            beside();
            joined.record(side);
        };
        if (side_first) there();
        routed();
        if (!side_first) there();
        joined.block(here);
    };
    auto low = c10::cuda::getStreamFromPool(), high = c10::cuda::getStreamFromPool(/*isHighPriority=*/true);
    std::vector<std::pair<std::string, std::function<void()>>> ways = {{"shared_experts_in_turn", [&] { beside(); routed(); }},
                                                                      {"shared_experts_beside", [&] { on(low, true); }},
                                                                      {"shared_experts_beside_later", [&] { on(low, false); }},
                                                                      {"shared_experts_beside_first", [&] { on(high, true); }}};
    std::vector<std::vector<double>> times(ways.size());
    for (int i = -2; i < 15; ++i)
        for (size_t w = 0; w < ways.size(); ++w)
            if (double t = seconds(ways[w].second, 1, 0); i >= 0) times[w].push_back(t);
    for (size_t w = 0; w < ways.size(); ++w) {
        std::nth_element(times[w].begin(), times[w].begin() + 7, times[w].end());
        print(ways[w].first, times[w][7] * 1e3, "ms", "T16384 D2048 E64 K6 F1408 and 2816 shared, forward", "bf16");
    }
}
}  // namespace

int main(int argc, char** argv) {
    if (!moe::test::has_gpu()) return 0;
    if (argc > 1) filter = argv[1];
    device_name = at::cuda::getCurrentDeviceProperties()->name;
    at::NoGradGuard no_grad;
    for (auto part : {rows_and_elements, fp8_copies, optimizer, vocabulary, dense, grouped, device_groups, fp8, attention, shared_beside}) {
        try {
            part();
        } catch (const std::exception& e) {
            std::fprintf(stderr, "error: %s\n", e.what());
        }
    }
}
