// The whole model on a GPU against the same model on the CPU: loss and every gradient.
#include "core/model/model.h"
#include "core/train/optimizer.h"
#include "core/train/step_program.h"
#include "tests/catch.h"
#include "tests/gpu.h"
#include "tests/small_config.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>

using namespace moe;

namespace {
constexpr int64_t kRows = 3, kLength = 70, kDomains = 3;

struct Outcome {
    double loss = 0, grad_norm = 0;
    size_t num_known = 0;                            // handles whose squares came with the gradient
    std::map<std::string, at::Tensor> grads;         // fp64, on the CPU
    at::Tensor counts;
};

/// One scheduled step of the micro-batch that every call makes again.
Outcome step(const Config& c, const char* precision, at::Device device) {
    Model model(c, {}, {Precision::named(precision), device, true});
    auto gen = at::make_generator<at::CPUGeneratorImpl>(3);
    for (int64_t layer : model.routed_layers()) model.bias(layer).copy_(at::randn({c.model.moe.num_experts}, gen, at::kDouble) * 0.05);
    at::Tensor ids = at::randint(0, c.model.vocab_size.value(), {kRows, kLength}, gen, at::kLong);
    at::Tensor targets = at::randint(0, c.model.vocab_size.value(), {kRows, kLength}, gen, at::kLong), domain = at::randint(0, kDomains, {kRows, kLength}, gen, at::kInt);
    at::Tensor starts = at::zeros({kRows, kLength}, at::kInt);
    starts.narrow(1, 25, kLength - 25).fill_(25);
    targets.select(1, 24).fill_(-100);
    routing::Ledger ledger(c.model.num_layers + c.training.mtp_depth(), c.model.moe.num_experts, kDomains, device);
    std::vector<MicroBatch> batches = {model.micro_batch(ids, targets, domain, starts)};
    batches[0].training = true;
    batches[0].ledger = &ledger;
    batches[0].loss_scale = 1.0 / double(kRows * (kLength - 1));
    batches[0].token_share = 1.0 / double(kRows * kLength);
    for (auto& m : batches[0].mtp) m.loss_scale = 0.1 / double(kRows * kLength);
    model.store().begin_grads();                     // as every step but the first: gradients are overwritten
    train::Executor executor(model);
    Outcome out;
    out.loss = executor.run(train::schedule("1f1b", {int(model.segments().size()), 1}), batches).item<double>();
    out.num_known = model.store().grad_norm_parts().known.size();
    out.grad_norm = train::grad_norm(model.store(), model.mesh().world);
    for (auto& name : model.store().names()) out.grads[name] = model.store().grad(name).to(at::kCPU, at::kDouble, false, true);
    out.counts = ledger.counts().cpu();
    return out;
}

double difference(const at::Tensor& got, const at::Tensor& want) { return ((got - want).norm() / want.norm().clamp_min(1e-300)).item<double>(); }

struct Kind {
    const char* name;
    std::function<void(Config&)> change;
};

/// Widths that the GPU's quick ways take (multiples of 8 and 64), and odd ones that they refuse.
std::vector<Kind> kinds() {
    return {{"odd widths", [](Config&) {}},
            {"even widths, sigmoid, bias, shared expert", [](Config& c) {
                c.model.vocab_size = 96; c.model.dense_intermediate_size = 128;
                auto& a = c.model.mla;
                a.d_model = 128; a.d_latent = 64; a.num_heads = 2; a.qk_nope_head_dim = 32; a.qk_rope_head_dim = 16; a.v_head_dim = 32;
                auto& m = c.model.moe;
                m.num_experts = 8; m.num_experts_per_token = 3; m.expert_intermediate_size = 64;
            }},
            {"groups, softmax, MTP, capacity", [](Config& c) {
                auto& m = c.model.moe;
                m.num_experts = 8; m.n_group = 4; m.topk_group = 2; m.scoring_func = "softmax"; m.norm_topk_prob = false; m.capacity_factor = 1.2; m.router_aux_loss_weight = 0.01;
                c.training.use_mtp = true; c.training.num_predict_tokens = 2;
            }}};
}
}  // namespace

TEST_CASE("the model on a GPU has the CPU's loss, counts and gradients: fp64 to 1e-10, fp32 to 1e-4", "[gpu]") {
    if (!test::has_gpu()) return;
    for (auto& kind : kinds()) {
        Config c = test::small_config();
        kind.change(c);
        INFO(kind.name);
        Outcome want = step(c, "fp64", at::kCPU);
        for (auto [precision, bound] : {std::pair("fp64", 1e-10), std::pair("fp32", 1e-4)}) {
            Outcome got = step(c, precision, at::kCUDA);
            CHECK(std::abs(got.loss - want.loss) < bound * want.loss);
            CHECK(at::equal(got.counts, want.counts));
            for (auto& [name, grad] : want.grads) {
                INFO(precision << " " << name);
                CHECK(difference(got.grads.at(name), grad) < bound);
            }
        }
    }
}

/// bf16 rounds what is routed, so a few tokens may choose otherwise: all gradients as one vector.
TEST_CASE("the model on a GPU in bf16 has the fp64 model's loss to 0.5 % and gradients to 10 %", "[gpu]") {
    if (!test::has_gpu()) return;
    for (auto& kind : kinds()) {
        Config c = test::small_config();
        kind.change(c);
        INFO(kind.name);
        Outcome want = step(c, "fp64", at::kCPU), got = step(c, "bf16", at::kCUDA);
        CHECK(std::abs(got.loss - want.loss) < 5e-3 * want.loss);
        double apart = 0, whole = 0;
        for (auto& [name, grad] : want.grads) {
            apart += (got.grads.at(name) - grad).square().sum().item<double>();
            whole += grad.square().sum().item<double>();
        }
        CHECK(std::sqrt(apart / whole) < 0.1);
    }
}

TEST_CASE("a gradient norm from squares that products left is that of the gradients", "[gpu]") {
    if (!test::has_gpu()) return;
    Config c = test::small_config();
    kinds()[1].change(c);
    Outcome got = step(c, "bf16", at::kCUDA);
    CHECK(got.num_known > 0);
    double sum = 0;
    for (auto& [name, grad] : got.grads) sum += grad.square().sum().item<double>();
    CHECK(got.grad_norm == Approx(std::sqrt(sum)).epsilon(1e-6));
}
