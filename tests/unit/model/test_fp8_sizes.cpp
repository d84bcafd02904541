#include "core/base/error.h"
#include "core/model/model.h"
#include "tests/catch.h"
#include "tests/gpu.h"
#include "tests/small_config.h"

using namespace moe;

TEST_CASE("use_fp8: a matrix whose sizes the GPU's products do not take is named with them; a CPU takes any", "[model][fp8]") {
    const at::Device gpu(at::kCUDA, 0);
    REQUIRE_NOTHROW(check_fp8_sizes("w", 24, 20, at::kCPU));
    for (auto [out, in] : {std::pair<int64_t, int64_t>(24, 32), {32, 20}, {65552, 32}}) {
        INFO(out << " x " << in);
        try {
            check_fp8_sizes("model.layers.1.mlp.experts.gate_up", out, in, gpu);
            FAIL("nothing was thrown");
        } catch (const Error& e) {
            CHECK(e.kind() == ErrorKind::config);
            CHECK(e.parts().op == "training.use_fp8");
            CHECK(e.parts().got == "model.layers.1.mlp.experts.gate_up of " + std::to_string(out) + " x " + std::to_string(in) + " on cuda:0");
            CHECK(e.parts().want == "both multiples of 16 up to 65536, on a GPU of compute capability 9.0");
            CHECK(e.parts().hint == "use_bf16, or other widths");
        }
    }
}

TEST_CASE("use_fp8: a model whose widths are no multiples of 16 is refused on a GPU before anything runs", "[model][fp8][gpu]") {
    if (!test::has_gpu()) return;
    Config c = test::small_config();                     // widths of 48, 20, 36 and 12
    c.training.use_fp64 = false;
    c.training.use_fp8 = true;
    REQUIRE_THROWS_WITH(Model(c, {}, {Precision::named("fp8"), at::Device(at::kCUDA, 0), true}), Catch::Contains("training.use_fp8: got model.layers.0.self_attn.") && Catch::Contains("multiples of 16"));
}
