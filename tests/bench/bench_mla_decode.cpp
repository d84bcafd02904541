// mla_decode on one GPU beside a plain copy: `bench_mla_decode [part of a name [once]]`; once: one launch each, for profilers; edges once: few tokens, every kernel, for sanitizers. Bytes are those of the cache's rows that are seen, read once; the copy counts
// bytes read and written. Caches larger than the L2 take turns. Calls are replayed from one graph, so that launches cost what they cost in decoding.
#include "core/kernels/mla_decode/mla_decode.h"
#include "core/kernels/mla_decode/mla_decode_sm90.h"
#include "tests/gpu.h"

#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAGuard.h>
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <functional>
#include <string>
#include <vector>

using namespace moe::kernels;
using Tensor = at::Tensor;

namespace {
std::string filter;
bool once = false;
double copy_speed = 0;

void check(cudaError_t e, const char* what) {
    if (e != cudaSuccess) throw std::runtime_error(fmt::format("{}: {}", what, cudaGetErrorString(e)));
}

at::TensorOptions on_gpu(at::ScalarType t) { return at::TensorOptions().dtype(t).device(at::kCUDA); }

/// Median seconds of one call of `calls` calls made by record(stream), replayed from a graph.
double seconds(int calls, const std::function<void(cudaStream_t)>& record, int repeats = 9) {
    auto stream = c10::cuda::getStreamFromPool();
    c10::cuda::CUDAStreamGuard guard(stream);
    record(stream);                                                   // first launches load code
    check(cudaStreamSynchronize(stream), "run");
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
    record(stream);
    check(cudaStreamEndCapture(stream, &graph), "capture end");
    check(cudaGraphInstantiate(&exec, graph, 0), "instantiate");
    std::vector<float> ms(repeats);
    cudaEvent_t a, b;
    cudaEventCreate(&a), cudaEventCreate(&b);
    // A card that was idle takes a while to reach its clocks.
    const auto start = std::chrono::steady_clock::now();
    while (std::chrono::steady_clock::now() - start < std::chrono::milliseconds(40)) {
        for (int i = 0; i < 3; ++i) cudaGraphLaunch(exec, stream);
        check(cudaStreamSynchronize(stream), "warm-up");
    }
    for (auto& t : ms) {
        cudaGraphLaunch(exec, stream);
        cudaEventRecord(a, stream), cudaGraphLaunch(exec, stream), cudaEventRecord(b, stream);
        check(cudaStreamSynchronize(stream), "replay");
        cudaEventElapsedTime(&t, a, b);
    }
    cudaEventDestroy(a), cudaEventDestroy(b), cudaGraphExecDestroy(exec), cudaGraphDestroy(graph);
    std::nth_element(ms.begin(), ms.begin() + repeats / 2, ms.end());
    return ms[repeats / 2] * 1e-3 / calls;
}

struct Load {
    int B, Q, H;
    std::vector<int> lengths;
    bool fp8;
    std::string name() const {
        const bool even = std::all_of(lengths.begin(), lengths.end(), [&](int n) { return n == lengths[0]; });
        return fmt::format("{} B{} Q{} H{} {}", fp8 ? "fp8" : "bf16", B, Q, H, even ? fmt::format("x {}", lengths[0]) : "ragged");
    }
};

Tensor random_rows(int64_t N, bool fp8) {
    if (!fp8) return at::randn({N, 64, 576}, on_gpu(at::kBFloat16));
    Tensor rows = at::randint(0, 120, {N, 64, 656}, on_gpu(at::kByte)) + at::randint(0, 2, {N, 64, 656}, on_gpu(at::kByte)) * 128;
    rows.narrow(2, 512, 16).copy_((at::rand({N, 64, 4}, on_gpu(at::kFloat)) * 0.01 + 0.005).view(at::kByte));
    rows.narrow(2, 528, 128).copy_(at::randn({N, 64, 64}, on_gpu(at::kBFloat16)).view(at::kByte));
    return rows;
}

void measure(const Load& load, std::vector<int> variants) {
    if (!filter.empty() && load.name().find(filter) == std::string::npos) return;
    int64_t M = 1, blocks = 0, tokens = 0;
    for (int n : load.lengths) M = std::max<int64_t>(M, (n + 63) / 64), blocks += (n + 63) / 64, tokens += n;
    const double bytes = double(tokens) * (load.fp8 ? 656 : 1152), flops = double(tokens) * load.Q * load.H * 2 * (576 + 512);
    const int sets = int(std::clamp<double>(1.5e8 / bytes + 1.5, 3, 40));
    struct Set { Tensor rows, table; };
    std::vector<Set> all;
    Tensor table = at::zeros({load.B, M}, at::kInt);
    for (int i = 0; i < sets; ++i) {
        Tensor order = at::randperm(blocks, at::kInt);
        int64_t next = 0;
        for (int b = 0; b < load.B; ++b) {
            const int64_t n = (load.lengths[b] + 63) / 64;
            table[b].narrow(0, 0, n).copy_(order.narrow(0, next, n));
            next += n;
        }
        all.push_back({random_rows(blocks, load.fp8), table.to(at::kCUDA)});
    }
    Tensor q_latent = at::randn({load.B * load.Q, load.H, 512}, on_gpu(at::kBFloat16)) * 0.3, q_rope = at::randn({load.B * load.Q, load.H, 64}, on_gpu(at::kBFloat16));
    Tensor lengths = at::tensor(load.lengths, at::kInt).to(at::kCUDA), out = at::empty_like(q_latent), lse = at::empty({load.B * load.Q, load.H}, on_gpu(at::kFloat));
    auto params = [&](int set, int variant) {
        sm90::MlaDecode p{};
        p.dtype = sm90::Dtype::bf16, p.fp8 = load.fp8, p.B = load.B, p.Q = load.Q, p.H = load.H, p.L = 512, p.R = 64, p.M = int(M);
        p.q_latent = q_latent.const_data_ptr(), p.q_rope = q_rope.const_data_ptr(), p.latent_token = load.H * 512, p.latent_head = 512, p.rope_token = load.H * 64, p.rope_head = 64;
        p.rows = all[set].rows.const_data_ptr(), p.N = blocks, p.block_table = all[set].table.const_data_ptr<int>(), p.lengths = lengths.const_data_ptr<int>(), p.scale = 0.05;
        p.out = out.mutable_data_ptr(), p.lse = lse.mutable_data_ptr(), p.variant = variant;
        return p;
    };
    check(cudaDeviceSynchronize(), "fill");
    check(sm90::mla_decode(params(0, -1), nullptr), "general");
    check(cudaDeviceSynchronize(), "general");
    Tensor want = out.to(at::kFloat), want_lse = lse.clone();
    for (int variant : variants) {
        Tensor workspace = at::empty({int64_t(sm90::mla_decode_workspace(params(0, variant)))}, on_gpu(at::kByte));
        auto call = [&](int set, cudaStream_t stream) {
            auto p = params(set, variant);
            p.workspace = workspace.mutable_data_ptr();
            check(sm90::mla_decode(p, stream), "mla_decode");
        };
        workspace.fill_(255), out.fill_(std::nan("")), lse.fill_(std::nan(""));
        check(cudaDeviceSynchronize(), "poison");
        call(0, nullptr);
        check(cudaDeviceSynchronize(), "mla_decode");
        const double error = ((out.to(at::kFloat) - want).norm() / want.norm()).item<double>(), lse_error = (lse - want_lse).abs().nan_to_num(1e9, 0, 0).max().item<double>();
        if (once) {
            std::printf("%s variant %d error %.1e %.0e%s\n", load.name().c_str(), variant, error, lse_error, error < 1e-2 && lse_error < 1e-3 ? "" : "  WRONG");
            continue;
        }
        const int calls = std::max(sets, 8) / sets * sets;
        const double t = seconds(calls, [&](cudaStream_t stream) {
            for (int i = 0; i < calls; ++i) call(i % sets, stream);
        });
        std::printf("%-28s variant %d  %8.1f us  %6.0f GB/s = %5.1f %% of the copy  %5.0f TFLOPS  error %.1e %.0e%s\n", load.name().c_str(), variant, t * 1e6, bytes / t * 1e-9,
                    100 * bytes / t / copy_speed, flops / t * 1e-12, error, lse_error, error < 1e-2 && lse_error < 1e-3 ? "" : "  WRONG");
        std::fflush(stdout);
    }
}
void measure_or_say(const Load& load, const std::vector<int>& variants) {
    try {
        measure(load, variants);
    } catch (const std::exception& e) {
        std::printf("%s: %s\n", load.name().c_str(), e.what());
        std::fflush(stdout);
    }
}
}  // namespace

int main(int argc, char** argv) {
    if (!moe::test::has_gpu()) return 0;
    if (argc > 1) filter = argv[1];
    once = argc > 2;
    if (!once) {
        Tensor x = at::randn({int64_t(1) << 29}, on_gpu(at::kBFloat16)), y = at::empty_like(x);
        check(cudaDeviceSynchronize(), "fill");
        copy_speed = 4 * double(x.numel()) / seconds(4, [&](cudaStream_t) {
            for (int i = 0; i < 4; ++i) y.copy_(x);
        });
        std::printf("%s, copy %.0f GB/s\n", at::cuda::getCurrentDeviceProperties()->name, copy_speed * 1e-9);
    }
    if (filter == "edges") {      // for the sanitizer: few tokens, every kernel
        filter.clear();
        const std::vector<int> edges = {1, 63, 64, 65, 200, 700};
        for (int heads : {16, 40, 128})
            for (bool fp8 : {false, true}) measure_or_say({6, 1, heads, edges, fp8}, fp8 ? std::vector<int>{3, 4} : std::vector<int>{1, 2});
        return 0;
    }
    const std::vector<int> even(64, 4096);
    std::vector<int> ragged;
    for (int i = 0; i < 64; ++i) ragged.push_back((i * 7919 + 131) % 8192);
    measure_or_say({64, 1, 16, even, false}, {1, 2});
    measure_or_say({64, 1, 16, even, true}, {3});
    measure_or_say({64, 1, 16, ragged, false}, {1, 2});
    measure_or_say({64, 1, 16, ragged, true}, {3});
    measure_or_say({64, 1, 128, even, false}, {2});
    measure_or_say({64, 1, 128, even, true}, {4});
    measure_or_say({64, 1, 128, ragged, false}, {2});
    measure_or_say({64, 4, 16, even, false}, {2});
    measure_or_say({64, 4, 16, even, true}, {4});
    measure_or_say({64, 2, 16, even, false}, {2});
    measure_or_say({64, 2, 16, even, true}, {4});
    for (bool fp8 : {false, true}) {
        const std::vector<int> small = {fp8 ? 3 : 1};
        measure_or_say({1, 1, 16, {4096}, fp8}, small);
        measure_or_say({1, 1, 16, {128}, fp8}, small);
        measure_or_say({1, 1, 16, {65536}, fp8}, small);
        measure_or_say({16, 1, 16, std::vector<int>(16, 2048), fp8}, small);
    }
}
