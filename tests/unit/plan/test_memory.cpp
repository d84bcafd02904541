#include "core/base/error.h"
#include "core/config/names.h"
#include "core/plan/count.h"
#include "core/plan/memory.h"
#include "tests/catch.h"

using namespace moe;
using plan::memory;

namespace {
/// Five layers of DeepSeek-V3 16B in one micro-batch of sequences of 4096.
Config train_16b_5l(int64_t batch) {
    Config c = named_config("deepseek_v3_16b");
    c.model.num_layers = 5;
    c.model.vocab_size = 102400;
    c.training.use_bf16 = true;
    c.training.seq_length = 4096;
    c.training.micro_batch_size = c.training.global_batch_size = batch;
    return c;
}
}  // namespace

TEST_CASE("memory: one rank holds every parameter once, with 16 bytes in fp32 and in bf16", "[plan]") {
    Config c = named_config("cpu_quick");
    double n = double(plan::count(c.model).total);
    CHECK(memory(c, 1).weights == Approx(4 * n));
    CHECK(memory(c, 1).gradients == Approx(4 * n));
    CHECK(memory(c, 1).optimizer == Approx(8 * n));
    double router = double(plan::count(c.model).part("router").total);
    c.training.use_bf16 = true;
    CHECK(memory(c, 1).weights == Approx(2 * n + 2 * router));          // the router stays in fp32
    CHECK(memory(c, 1).optimizer == Approx(10 * n - 2 * router));           // masters: two bytes beside the weights' two
    c.training.use_bf16 = false;
    c.training.use_fp8 = true;
    CHECK(memory(c, 1).weights == Approx(4 * n));                       // bf16, and E4M3 straight and transposed
    c.training.use_fp8 = false;
    c.training.use_bf16 = true;
    c.training.moments_dtype = "bf16";
    CHECK(memory(c, 1).optimizer == Approx(6 * n - 2 * router));
    c.training.optimizer = "sgd";
    c.training.momentum = 0;
    CHECK(memory(c, 1).optimizer == Approx(2 * n - 2 * router));
}

TEST_CASE("memory: ZeRO cuts optimizer state, then gradients, then weights", "[plan]") {
    Config c = named_config("cpu_quick");
    plan::Memory whole = memory(c, 4);
    for (int64_t stage : {1, 2, 3}) {
        c.distributed.zero_stage = stage;
        plan::Memory m = memory(c, 4);
        CHECK(m.optimizer == Approx(whole.optimizer / 4));
        CHECK(m.gradients == Approx(whole.gradients / (stage >= 2 ? 4 : 1)));
        CHECK(m.weights == Approx(whole.weights / (stage >= 3 ? 4 : 1)));
    }
}

TEST_CASE("memory: expert, tensor and pipeline parallel sizes cut what is theirs", "[plan]") {
    Config c = named_config("cpu_quick");
    double n = double(plan::count(c.model).total), experts = double(plan::count(c.model).part("experts").total), table = double(plan::count(c.model).part("embedding").total);
    c.distributed.expert_parallel_size = 4;
    CHECK(memory(c, 4).weights == Approx(4 * (n - experts * 3 / 4)));
    c.distributed.zero_stage = 1;                                       // each expert is on one rank of four: nothing left to cut
    CHECK(memory(c, 4).optimizer == Approx(8 * ((n - experts) / 4 + experts / 4)));
    c.distributed = {};
    c.distributed.pipeline_parallel_size = 2;
    CHECK(memory(c, 2).weights < 4 * (n / 2 + table));
    CHECK(memory(c, 2).weights > 4 * (n / 2 - table));
    c.distributed = {};
    c.distributed.tensor_parallel_size = 2;
    CHECK(memory(c, 2).weights < memory(Config(named_config("cpu_quick")), 1).weights);
    CHECK(memory(c, 2).weights > memory(Config(named_config("cpu_quick")), 1).weights / 2);
}

TEST_CASE("memory: MTP modules count, recomputation lowers activations", "[plan]") {
    Config c = named_config("tiny");
    double with = memory(c, 1).weights;
    plan::Counts counts = plan::count(c.model, 1);
    CHECK(with == Approx(2.0 * double(counts.total_with_mtp()) + 2.0 * double(counts.part("router").total + c.model.moe.num_experts * c.model.mla.d_model)));
    double kept = memory(c, 1).activations;
    c.training.gradient_checkpointing = "full";
    CHECK(memory(c, 1).activations < kept / 2);
    c.training.micro_batch_size = 4;
    CHECK(memory(c, 1).activations < kept / 4);
}

TEST_CASE("memory: train_16b_5l's activations are what an H100 measured, within 5 %", "[plan]") {
    auto gib = [](int64_t batch) { return memory(train_16b_5l(batch), 1).total() / double(1 << 30); };
    CHECK(gib(4) == Approx(54.4).epsilon(0.05));
    CHECK(gib(8) - gib(4) == Approx(10.14).epsilon(0.05));
}

TEST_CASE("memory: the segments to compute again are as few as a budget asks for, the cheapest first, and the plan counts them", "[plan]") {
    Config c = train_16b_5l(4);
    double whole = memory(c, 1).total(), gib = double(1 << 30);
    CHECK(plan::choose_recompute(c, 1, whole).empty());
    std::vector<std::string> before;
    for (double less : {0.1, 1.0, 2.5, 5.0}) {
        auto chosen = plan::choose_recompute(c, 1, whole - less * gib);
        REQUIRE(chosen.size() >= before.size());
        CHECK(std::equal(before.begin(), before.end(), chosen.begin()));
        Config with = c, without = c;
        with.training.gradient_checkpointing = without.training.gradient_checkpointing = "selective";
        with.training.recompute = without.training.recompute = chosen;
        without.training.recompute.pop_back();
        CHECK(memory(with, 1).total() <= whole - less * gib);
        CHECK(memory(without, 1).total() > whole - less * gib);
        before = chosen;
    }
    CHECK(plan::choose_recompute(c, 1, 0).size() == 5 + 1 + 2 * 4);                            // all there is
    c.training.seq_length = 1 << 17;                                                           // now attention costs most for what it frees
    auto all = plan::choose_recompute(c, 1, 0);
    for (size_t i = 0; i < all.size(); ++i) CHECK((all[i].find("attention") != std::string::npos) == (i >= 9));
    c.training.seq_length = 4096;
    c.training.gradient_checkpointing = "selective";
    c.training.recompute = {"experts"};
    double kinds = memory(c, 1).total();
    c.training.recompute = {"layers.1.experts", "layers.2.experts", "layers.3.experts", "layers.4.experts"};
    CHECK(memory(c, 1).total() == Approx(kinds));
}

TEST_CASE("memory: sizes that do not fit the ranks are refused", "[plan]") {
    Config c = named_config("cpu_quick");
    c.distributed.tensor_parallel_size = 2;
    CHECK_THROWS_AS(memory(c, 3), Error);
    c.distributed = {};
    c.distributed.expert_parallel_size = 4;
    CHECK_THROWS_AS(memory(c, 2), Error);
}
