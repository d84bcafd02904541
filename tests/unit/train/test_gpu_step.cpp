// What a step on a GPU does besides mathematics: waits, allocations, recorded steps.
#include "core/base/error.h"
#include "core/kernels/quantize/quantize.h"
#include "core/train/hardware.h"
#include "core/train/optimizer.h"
#include "core/train/profile.h"
#include "core/train/run.h"
#include "core/train/step_graph.h"
#include "tests/catch.h"
#include "tests/gpu.h"
#include "tests/small_config.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#ifdef MOE_WITH_CUDA
#include <c10/cuda/CUDACachingAllocator.h>
#endif

using namespace moe;

namespace {
constexpr int64_t kDomains = 3;

/// Widths that the quick kernels take.
Config even_config() {
    Config c = test::small_config();
    c.model.vocab_size = 96;
    c.model.dense_intermediate_size = 128;
    auto& a = c.model.mla;
    a.d_model = 128; a.d_latent = 64; a.num_heads = 2; a.qk_nope_head_dim = 32; a.qk_rope_head_dim = 16; a.v_head_dim = 32;
    auto& m = c.model.moe;
    m.num_experts = 8; m.num_experts_per_token = 3; m.expert_intermediate_size = 64; m.router_aux_loss_weight = 0.01;
    c.training.seq_length = 64;
    c.training.use_fp64 = false;
    c.training.use_bf16 = true;
    return c;
}

/// A model, its counts and its executor on the GPU.
struct Trainer {
    Config config;
    Model model;
    routing::Ledger ledger;
    train::Executor executor;
    explicit Trainer(const Config& c, const std::string& precision = "bf16")
        : config(c), model(c, {}, {Precision::named(precision), at::kCUDA, true}), ledger(c.model.num_layers + c.training.mtp_depth(), c.model.moe.num_experts, kDomains, at::kCUDA), executor(model) {}

    /// Micro-batches of one step, other ones for every seed: data, documents and number of targets.
    std::vector<MicroBatch> batches(uint64_t seed, bool documents) {
        auto gen = at::make_generator<at::CPUGeneratorImpl>(seed);
        std::vector<MicroBatch> out;
        int64_t B = 4, S = config.training.seq_length, V = config.model.vocab_size.value();
        for (int i = 0; i < 2; ++i) {
            at::Tensor ids = at::randint(0, V, {B, S}, gen, at::kLong), targets = at::randint(0, V, {B, S}, gen, at::kLong), domain = at::randint(0, kDomains, {B, S}, gen, at::kInt), starts = at::zeros({B, S}, at::kInt);
            int64_t cut = 10 + int64_t(seed) * 3 + i;
            starts.narrow(1, cut, S - cut).fill_(cut);
            targets.select(1, cut - 1).fill_(-100);
            targets[0].narrow(0, 0, int64_t(seed)).fill_(-100);
            out.push_back(model.micro_batch(ids, targets, domain, starts, documents));
            auto& b = out.back();
            b.training = true;
            b.ledger = &ledger;
            b.loss_scale = 1.0 / double(2 * targets.ge(0).sum().item<int64_t>());
            b.token_share = 1.0 / double(2 * B * S);
        }
        return out;
    }
    train::Program program() { return train::schedule("1f1b", {int(model.segments().size()), 2}); }
    double loss(const std::vector<MicroBatch>& list) {
        double sum = 0;
        for (auto& b : list) sum += b.losses.at("loss").item<double>() + b.losses.at("balance").item<double>();
        return sum;
    }
};

int64_t calls_of(const train::Profile& p, const std::string& name) {
    for (auto& row : p.calls)
        if (row.name == name) return row.count;
    return 0;
}
}  // namespace

TEST_CASE("a steady forward and backward on a GPU waits for nothing and allocates nothing", "[gpu]") {
    if (!test::has_gpu()) return;
    for (bool documents : {false, true}) {
        Trainer t(even_config());
        auto batches = t.batches(1, documents);
        for (int i = 0; i < 3; ++i) t.executor.execute(t.program(), batches);
        auto p = train::profile([&] { t.executor.execute(t.program(), batches); });
        CHECK(p.busy_secs > 0);
        for (const char* wait : {"cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cudaMalloc", "cudaFree", "cudaHostAlloc", "cudaMallocHost", "cudaMallocAsync"}) {
            INFO(wait);
            CHECK(calls_of(p, wait) == 0);
        }
        CHECK(calls_of(p, "cudaDeviceSynchronize") <= 1);                 // the profile's own, at its end
    }
}

TEST_CASE("a step recorded as a CUDA graph and replayed on other data gives the losses, counts and gradients of steps that are not", "[gpu]") {
    if (!test::has_gpu()) return;
    for (bool documents : {false, true}) {
        INFO("documents " << documents);
        Trainer plain(even_config()), recorded(even_config());
        train::StepGraph graph(recorded.executor, recorded.model);
        for (uint64_t step = 0; step < 8; ++step) {
            INFO("step " << step);
            auto a = plain.batches(step, documents), b = recorded.batches(step, documents);
            plain.model.store().begin_grads();
            recorded.model.store().begin_grads();
            plain.ledger.clear();
            recorded.ledger.clear();
            plain.executor.execute(plain.program(), a);
            graph.run(recorded.program(), b);
            CHECK(graph.is_recorded() == (step >= 3));
            CHECK(std::abs(recorded.loss(b) - plain.loss(a)) < 1e-4 * plain.loss(a));
            CHECK(at::equal(recorded.ledger.counts_by_domain(), plain.ledger.counts_by_domain()));
            for (auto& name : plain.model.store().names()) {
                INFO(name);
                at::Tensor want = plain.model.store().grad(name).to(at::kDouble), got = recorded.model.store().grad(name).to(at::kDouble);
                CHECK((got - want).norm().item<double>() <= 2e-2 * want.norm().item<double>() + 1e-9);
            }
        }
    }
}

TEST_CASE("a recorded step in fp8 reads copies of the weights as they are, after updates and after weights were set", "[gpu]") {
    if (!test::has_gpu()) return;
    Trainer plain(even_config(), "fp8"), recorded(even_config(), "fp8");
    train::StepGraph graph(recorded.executor, recorded.model);
    const std::string name = "model.layers.0.mlp.down_proj.weight";
    for (uint64_t step = 0; step < 9; ++step) {
        INFO("step " << step);
        auto a = plain.batches(step, false), b = recorded.batches(step, false);
        for (Trainer* t : {&plain, &recorded}) t->model.store().begin_grads();
        plain.executor.execute(plain.program(), a);
        graph.run(recorded.program(), b);
        CHECK(graph.is_recorded() == (step >= 3));
        CHECK(std::abs(recorded.loss(b) - plain.loss(a)) < 1e-2 * plain.loss(a));
        int copies = 0;
        for (auto& w : recorded.model.weights()) {
            if (!w->fp8.q.defined()) continue;
            INFO(w->name);
            ++copies;
            auto want = kernels::empty_quantized_weight(w->fp8.q.size(0), w->fp8.q.size(1), w->fp8.q.size(2), w->value);
            kernels::quantize_weight(w->value, want);
            CHECK(at::equal(w->fp8.q.view(at::kByte), want.q_EOI.view(at::kByte)));
            CHECK(at::equal(w->fp8.transposed.view(at::kByte), want.q_EIO.view(at::kByte)));
            CHECK(at::equal(w->fp8.scale, want.scale_EOI));
        }
        CHECK(copies > 8);
        for (Trainer* t : {&plain, &recorded}) {
            if (step != 4) train::update(t->model.store(), t->config.training, 1e-3, 1, int64_t(step) + 1);
            if (step == 5) t->model.store().set(name, t->model.store().master(name).mul(-3));
        }
    }
}

TEST_CASE("a step whose shapes change is recorded anew", "[gpu]") {
    if (!test::has_gpu()) return;
    Trainer t(even_config());
    train::StepGraph graph(t.executor, t.model);
    auto run = [&](bool documents) {
        auto b = t.batches(2, documents);
        graph.run(t.program(), b);
    };
    for (int i = 0; i < 4; ++i) run(true);
    CHECK(graph.is_recorded());
    run(false);
    CHECK_FALSE(graph.is_recorded());
    for (int i = 0; i < 4; ++i) run(false);
    CHECK(graph.is_recorded());
}

#ifdef MOE_WITH_CUDA
TEST_CASE("a step that runs out of the GPU's memory says what it asked for and what to lower, is undone, and the run goes on", "[gpu]") {
    if (!test::has_gpu()) return;
    Config c = even_config();
    c.device = "cuda";
    c.training.global_batch_size = c.training.micro_batch_size = 64;
    c.training.seq_length = 128;
    c.training.train_steps = 10;
    c.data.document_mask = false;
    train::RunOptions quiet;
    quiet.log_folder = quiet.console = false;
    train::Run run(c, quiet);
    double loss = run.step().loss;
    train::release_cached_memory(at::kCUDA);
    namespace cuda = c10::cuda::CUDACachingAllocator;
    auto stats = cuda::getDeviceStats(0);
    double reserved = double(stats.reserved_bytes[size_t(c10::CachingAllocator::StatType::AGGREGATE)].current), total = double(train::gpus()[0].memory_bytes);
    cuda::setMemoryFraction((reserved + 4e6) / total, 0);
    ErrorParts parts;
    try {
        run.step();
    } catch (const Error& e) {
        parts = e.parts();
    }
    cuda::setMemoryFraction(1, 0);
    CHECK(parts.kind == ErrorKind::memory);
    CHECK(parts.got.find("Tried to allocate") != std::string::npos);
    CHECK(parts.hint.find("micro_batch_size") != std::string::npos);
    CHECK(run.current_step() == 1);
    auto next = run.step();
    CHECK(next.step == 2);
    CHECK(next.loss < 2 * loss);
}
#endif

TEST_CASE("what a recorded step cannot follow is named", "[step-graph]") {
    Config c = even_config();
    Model model(c, {}, {Precision::named("bf16"), at::kCPU, true});
    std::string why;
    CHECK_FALSE(train::StepGraph::takes(c, model, &why));
    CHECK(why == "the model is not on a GPU");
    CHECK(train::StepGraph::pays(c));
    c.training.micro_batch_size = 4096;
    c.training.seq_length = 4096;
    CHECK_FALSE(train::StepGraph::pays(c));
}
