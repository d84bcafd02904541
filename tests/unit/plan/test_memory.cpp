#include "core/base/error.h"
#include "core/config/names.h"
#include "core/plan/count.h"
#include "core/plan/memory.h"
#include "tests/catch.h"

using namespace moe;
using plan::memory;

TEST_CASE("memory: one rank holds every parameter once, with 16 bytes in fp32 and 18 in bf16", "[plan]") {
    Config c = named_config("cpu_quick");
    double n = double(plan::count(c.model).total);
    CHECK(memory(c, 1).weights == Approx(4 * n));
    CHECK(memory(c, 1).gradients == Approx(4 * n));
    CHECK(memory(c, 1).optimizer == Approx(8 * n));
    double router = double(plan::count(c.model).part("router").total);
    c.training.use_bf16 = true;
    CHECK(memory(c, 1).weights == Approx(2 * n + 2 * router));          // the router stays in fp32
    CHECK(memory(c, 1).optimizer == Approx(12 * n - 4 * router));
    c.training.use_bf16 = false;
    c.training.use_fp8 = true;
    CHECK(memory(c, 1).weights == Approx(4 * n));                       // bf16, and E4M3 straight and transposed
    c.training.use_fp8 = false;
    c.training.use_bf16 = true;
    c.training.moments_dtype = "bf16";
    CHECK(memory(c, 1).optimizer == Approx(8 * n - 4 * router));
    c.training.optimizer = "sgd";
    c.training.momentum = 0;
    CHECK(memory(c, 1).optimizer == Approx(4 * n - 4 * router));
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

TEST_CASE("memory: sizes that do not fit the ranks are refused", "[plan]") {
    Config c = named_config("cpu_quick");
    c.distributed.tensor_parallel_size = 2;
    CHECK_THROWS_AS(memory(c, 3), Error);
    c.distributed = {};
    c.distributed.expert_parallel_size = 4;
    CHECK_THROWS_AS(memory(c, 2), Error);
}
