// Published shapes against their published totals, and a reference that adds up named tensors.
#include "core/base/error.h"
#include "core/config/load.h"
#include "core/config/names.h"
#include "core/plan/count.h"
#include "tests/catch.h"

#include <cmath>
#include <map>

using namespace moe;
using namespace moe::plan;

namespace {
/// As many digits as a published figure has: |value − figure| ≤ half of its last one.
void check_near(double value, double figure, double last_digit) {
    INFO(value << " against " << figure);
    CHECK(std::abs(value - figure) <= last_digit * 0.5000001);
}

/// Shapes of all tensors of a checkpoint, by Hugging Face's names, without MTP.
std::map<std::string, int64_t> tensors(const ModelConfig& m) {
    std::map<std::string, int64_t> t;
    const MlaConfig& a = m.mla;
    int64_t d = a.d_model, h = a.num_heads, g = m.num_kv_heads(), qk = a.qk_nope_head_dim + a.qk_rope_head_dim;
    t["model.embed_tokens"] = *m.vocab_size * d;
    t["lm_head"] = *m.vocab_size * d;
    t["model.norm"] = d;
    for (int64_t l = 0; l < m.num_layers; ++l) {
        std::string at = "model.layers." + std::to_string(l) + ".";
        if (a.q_lora_rank) {
            t[at + "q_a_proj"] = *a.q_lora_rank * d;
            t[at + "q_a_layernorm"] = *a.q_lora_rank;
            t[at + "q_b_proj"] = h * qk * *a.q_lora_rank;
        } else {
            t[at + "q_proj"] = h * qk * d;
        }
        t[at + "kv_a_proj_with_mqa"] = (a.d_latent + a.qk_rope_head_dim) * d;
        t[at + "kv_a_layernorm"] = a.d_latent;
        t[at + "kv_b_proj"] = g * (a.qk_nope_head_dim + a.v_head_dim) * a.d_latent;
        t[at + "o_proj"] = d * h * a.v_head_dim;
        t[at + "input_layernorm"] = t[at + "post_attention_layernorm"] = d;
        bool dense = l < m.first_k_dense_replace || (m.dense_layer_interval && l % *m.dense_layer_interval == 0) || l % m.moe_layer_freq != 0;
        if (dense) {
            for (auto name : {"gate_proj", "up_proj", "down_proj"}) t[at + "mlp." + name] = d * *m.dense_intermediate_size;
            continue;
        }
        t[at + "gate"] = m.moe.num_experts * d;
        for (auto name : {"gate_proj", "up_proj", "down_proj"}) {
            for (int64_t e = 0; e < m.moe.num_experts; ++e) t[at + std::to_string(e) + "." + name] = d * m.moe.expert_intermediate_size;
            if (m.moe.num_shared_experts) t[at + "shared." + name] = d * m.moe.num_shared_experts * m.moe.expert_intermediate_size;
        }
    }
    return t;
}
}  // namespace

TEST_CASE("count: published models have their published totals and active parameters", "[plan][count]") {
    struct Row {
        const char* name;
        double total, total_digit, active, active_digit;
    };
    for (Row r : {Row{"deepseek_v3_671b", 671.03e9, 1e7, 36.625e9, 1e6 * 2}, Row{"deepseek_v2_lite", 15.71e9, 1e7, 2.451e9, 1e6}, Row{"deepseek_v3_16b", 15.71e9, 1e7, 2.451e9, 1e6},
                  Row{"moonlight_16b_a3b", 15.96e9, 1e7, 2.579e9, 1e6}, Row{"kimi_k2", 1026.4e9, 1e8, 31.69e9, 1e7}}) {
        INFO(r.name);
        Counts c = count(named_config(r.name).model);
        check_near(double(c.total), r.total, r.total_digit);
        check_near(double(c.active_without_embedding), r.active, r.active_digit);
    }
}

TEST_CASE("count: DeepSeek-V3 to the last parameter, without and with its MTP module and bias", "[plan][count]") {
    Counts c = count(named_config("deepseek_v3_671b").model, 1);
    CHECK(c.total == 671026404352);             // num_parameters() of Hugging Face
    CHECK(c.router_bias == 58 * 256);
    CHECK(c.total + c.router_bias == 671026419200);
    // The checkpoint holds copies of embedding and head for the module, and its bias: 684.53 B in all.
    int64_t copies = 2 * int64_t(129280) * 7168;
    check_near(double(c.total_with_mtp() + copies + c.router_bias + 256), 684.53e9, 1e8);
}

TEST_CASE("count: ready files have the totals of their table", "[plan][count]") {
    check_near(double(count(named_config("tiny").model).total), 97.6e6, 1e5);
    check_near(double(count(named_config("small").model).total), 963e6, 1e6);
    check_near(double(count(named_config("large").model).total), 14.93e9, 1e7);
    check_near(double(count(named_config("cpu_quick").model).total), 6.3e6, 1e5);
    check_near(double(count(named_config("cpu_tiny").model).total), 48.6e6, 1e5);
}

TEST_CASE("count: the parts are the sums of the tensors", "[plan][count]") {
    for (std::string name : {"tiny", "cpu_quick", "deepseek_v3_debug", "deepseek_v2_lite", "kimi_k2"}) {
        INFO(name);
        ModelConfig m = named_config(name).model;
        int64_t sum = 0;
        for (auto& [tensor, size] : tensors(m)) sum += size;
        Counts c = count(m);
        CHECK(c.total == sum);
        int64_t parts = 0, active = 0;
        for (const Part& p : c.parts) parts += p.total, active += p.active;
        CHECK(parts == c.total);
        CHECK(active == c.active);
        CHECK(c.active - c.active_without_embedding == *m.vocab_size * m.mla.d_model);
    }
}

TEST_CASE("count: grouped kv heads, shared width, intervals and tied embeddings", "[plan][count]") {
    ModelConfig m = named_config("cpu_quick").model;
    int64_t whole = count(m).total;
    ModelConfig grouped = m;
    grouped.mla.num_kv_heads = 2;
    CHECK(whole - count(grouped).total == 4 * 2 * (32 + 32) * 128);
    ModelConfig tied = m;
    tied.tie_word_embeddings = true;
    CHECK(whole - count(tied).total == 264 * 256);
    CHECK(count(tied).matmul == count(m).matmul);
    ModelConfig shared = m;
    shared.moe.shared_intermediate_size = 200;
    CHECK(count(shared).part("shared").total == 3 * 3 * 256 * 200);
    ModelConfig dense = m;
    dense.first_k_dense_replace = 4;
    CHECK(count(dense).part("experts").total == 0);
    CHECK(count(dense).router_bias == 0);
    CHECK(count(dense).total == count(dense).active);
}

TEST_CASE("count: an unknown part and an unknown vocabulary are errors", "[plan][count]") {
    Counts c = count(named_config("cpu_quick").model);
    try {
        c.part("expert");
        FAIL("no error");
    } catch (const Error& e) {
        CHECK(e.parts().hint == "did you mean \"experts\"?");
    }
    ModelConfig m;
    m.vocab_size.reset();
    CHECK_THROWS_AS(count(m), Error);
}

TEST_CASE("flops: published figures a token at 4096, by both rules", "[plan][flops]") {
    ModelConfig v3 = named_config("deepseek_v3_671b").model, lite = named_config("deepseek_v2_lite").model;
    check_near(flops_per_token(v3, 4096, FlopsRule::causal), 250.4e9, 1e8);
    check_near(flops_per_token(v3, 4096, FlopsRule::full), 281.2e9, 1e8);
    check_near(flops_per_token(v3, 4096, FlopsRule::causal, 1), 260.6e9, 1e8);
    check_near(flops_per_token(lite, 4096, FlopsRule::causal), 16.4e9, 1e8);
    check_near(flops_per_token(lite, 4096, FlopsRule::full), 18.1e9, 1e8);
}

TEST_CASE("flops: without attention they are six times the weights a token meets", "[plan][flops]") {
    ModelConfig m = named_config("cpu_quick").model;
    Counts c = count(m);
    CHECK(flops_per_token(m, 0, FlopsRule::causal) == 6.0 * double(c.active_without_embedding - c.part("norms").active));
    double one = flops_per_token(m, 256, FlopsRule::causal) - flops_per_token(m, 0, FlopsRule::causal);
    CHECK(one == 3.0 * 4 * 4 * (48 + 32) * 256);
}
