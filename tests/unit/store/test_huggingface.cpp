#include "core/base/json.h"
#include "core/store/huggingface.h"
#include "tests/error_of.h"
#include "tests/folder.h"

#include <ATen/ATen.h>
#include <nlohmann/json.hpp>

#include <filesystem>
#include <set>

using namespace moe;
using moe::test::error_of;
using namespace moe::store;

namespace {
std::string golden(const std::string& name) { return (std::filesystem::path(__FILE__).parent_path() / "../../golden/hf" / name).lexically_normal().string(); }

// config.json of DeepSeek-V3 itself, in the spelling of its authors.
nlohmann::json deepseek_v3() {
    return nlohmann::json::parse(R"({"architectures": ["DeepseekV3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1,
        "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840,
        "model_type": "deepseek_v3", "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": true,
        "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
        "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096, "type": "yarn"},
        "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": false, "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16",
        "use_cache": true, "v_head_dim": 128, "vocab_size": 129280})");
}

HfConfig import(const nlohmann::json& json) {
    test::Folder folder;
    folder.write("config.json", json.dump());
    return config_from_hf(folder.path());
}
}  // namespace

TEST_CASE("huggingface: DeepSeek-V3's config.json gives its model", "[store]") {
    HfConfig hf = import(deepseek_v3());
    const auto& m = hf.config.model;
    REQUIRE(m.num_layers == 61);
    REQUIRE(m.vocab_size == 129280);
    REQUIRE(m.dense_intermediate_size == 18432);
    REQUIRE(m.first_k_dense_replace == 3);
    REQUIRE(m.mla.d_model == 7168);
    REQUIRE(m.mla.q_lora_rank == 1536);
    REQUIRE(m.mla.d_latent == 512);
    REQUIRE(m.mla.num_heads == 128);
    REQUIRE((m.mla.qk_nope_head_dim == 128 && m.mla.qk_rope_head_dim == 64 && m.mla.v_head_dim == 128));
    REQUIRE(m.mla.rope_interleave);
    REQUIRE(m.mla.rope_scaling.has_value());
    REQUIRE((m.mla.rope_scaling->factor == 40 && m.mla.rope_scaling->mscale_all_dim == 1 && m.mla.rope_scaling->original_max_position_embeddings == 4096));
    REQUIRE((m.moe.num_experts == 256 && m.moe.num_experts_per_token == 8 && m.moe.num_shared_experts == 1 && m.moe.expert_intermediate_size == 2048));
    REQUIRE((m.moe.n_group == 8 && m.moe.topk_group == 4 && m.moe.norm_topk_prob && m.moe.use_aux_loss_free));
    REQUIRE(m.moe.routed_scaling_factor == 2.5);
    REQUIRE(m.moe.scoring_func == "sigmoid");
    REQUIRE(hf.dtype == "bfloat16");
    REQUIRE(hf.num_nextn_predict_layers == 1);
    REQUIRE(hf.notes.size() == 1);
    REQUIRE(hf.notes[0].find("MTP") != std::string::npos);
    auto json = deepseek_v3();
    json["something_new"] = 3;
    REQUIRE(import(json).notes.back().find("something_new") == 0);
}

TEST_CASE("huggingface: both spellings of rope and absent keys give the same model", "[store]") {
    auto json = deepseek_v3();
    Config before = import(json).config;
    json["rope_parameters"] = json["rope_scaling"];
    json["rope_parameters"]["rope_type"] = "yarn";
    json["rope_parameters"]["rope_theta"] = 10000.0;
    for (const char* key : {"rope_scaling", "rope_theta", "scoring_func", "topk_method", "moe_layer_freq"}) json.erase(key);
    REQUIRE(import(json).config == before);
    json["rope_parameters"] = {{"rope_type", "default"}, {"rope_theta", 50000.0}};
    json["q_lora_rank"] = nullptr;
    Config plain = import(json).config;
    REQUIRE(!plain.model.mla.rope_scaling.has_value());
    REQUIRE(plain.model.mla.rope_theta == 50000.0);
    REQUIRE(!plain.model.mla.q_lora_rank.has_value());
    REQUIRE(config_from_hf(golden("old_spelling")).config.model.mla.rope_scaling == config_from_hf(golden("yarn")).config.model.mla.rope_scaling);
}

TEST_CASE("huggingface: settings that would change the result and are not built are errors", "[store]") {
    std::vector<std::pair<const char*, nlohmann::json>> cases = {
        {"attention_bias", true}, {"mlp_bias", true}, {"hidden_act", "gelu"}, {"model_type", "llama"}, {"scoring_func", "relu"}, {"topk_method", "other"}, {"num_key_value_heads", 64},
        {"hidden_size", "wide"}, {"hidden_size", nullptr}, {"rope_scaling", {{"type", "longrope"}}}, {"rope_scaling", 3}, {"rope_scaling", {{"type", "yarn"}}},
        {"quantization_config", {{"quant_method", "fp8"}}},
    };
    for (const auto& [key, value] : cases) {
        INFO(key << " " << value.dump());
        auto json = deepseek_v3();
        json[key] = value;
        REQUIRE(error_of([&] { import(json); }).kind() == ErrorKind::config);
    }
    REQUIRE(error_of([] { import(3); }).kind() == ErrorKind::data);
    test::Folder folder;
    REQUIRE(error_of([&] { config_from_hf(folder.path()); }).kind() == ErrorKind::io);
}

TEST_CASE("huggingface: DeepSeek-V2 routes by softmax without bias, in groups where its method says so", "[store]") {
    Config plain = config_from_hf(golden("softmax")).config;
    REQUIRE(plain.model.moe.scoring_func == "softmax");
    REQUIRE(!plain.model.moe.use_aux_loss_free);
    REQUIRE(!plain.model.moe.norm_topk_prob);
    REQUIRE(plain.model.moe.n_group == 1);
    Config groups = config_from_hf(golden("softmax_groups")).config;
    REQUIRE((groups.model.moe.n_group == 4 && groups.model.moe.topk_group == 2));
    REQUIRE(!config_from_hf(golden("rope_halves")).config.model.mla.rope_interleave);
    REQUIRE(config_from_hf(golden("tied")).config.model.tie_word_embeddings);
    REQUIRE(config_from_hf(golden("two_shared")).config.model.moe.num_shared_experts == 2);
}

TEST_CASE("huggingface: every golden model's tensors have the names and shapes of its gradients", "[store]") {
    for (const auto& entry : std::filesystem::directory_iterator(golden(""))) {
        std::string folder = entry.path().string();
        INFO(folder);
        Config config = config_from_hf(folder).config;
        SafetensorsFile expected(folder + "/expected.safetensors");
        std::set<std::string> names;
        for (const auto& [name, tensor] : hf_tensors(folder)) {
            if (name.ends_with("e_score_correction_bias")) {
                REQUIRE(tensor.scalar_type() == at::kFloat);
                REQUIRE(tensor.numel() == config.model.moe.num_experts);
                continue;
            }
            names.insert(name);
            REQUIRE(tensor.sizes().vec() == expected.info("grad." + name).shape);
            REQUIRE(tensor.scalar_type() == (folder.ends_with("bf16") ? at::kBFloat16 : at::kFloat));
        }
        size_t gradients = 0;
        for (const auto& name : expected.names()) gradients += name.starts_with("grad.");
        REQUIRE(gradients == names.size());
        REQUIRE(expected.info("logits").shape == std::vector<int64_t>{2, 23, *config.model.vocab_size});
    }
}

TEST_CASE("huggingface: stacked experts come apart into gate, up and down", "[store]") {
    test::Folder folder;
    at::Tensor both = at::arange(2 * 6 * 4, at::kFloat).view({2, 6, 4}), down = at::arange(2 * 4 * 3, at::kFloat).view({2, 4, 3});
    NamedTensors tensors = {{"model.layers.1.mlp.experts.gate_up_proj", both}, {"model.layers.1.mlp.experts.down_proj", down}, {"model.layers.2.x.weight", down}, {"model.layers.1.self_attn.rotary_emb.inv_freq", down}};
    save_safetensors(folder / "model.safetensors", tensors);
    std::map<std::string, at::Tensor> got;
    for (const auto& [name, tensor] : hf_tensors(folder.path(), 2)) got[name] = tensor;
    REQUIRE(got.size() == 6);   // layer 2 and the frequencies are left out
    REQUIRE(hf_tensors(folder.path()).size() == 7);
    REQUIRE(at::equal(got.at("model.layers.1.mlp.experts.1.gate_proj.weight"), both[1].narrow(0, 0, 3)));
    REQUIRE(at::equal(got.at("model.layers.1.mlp.experts.1.up_proj.weight"), both[1].narrow(0, 3, 3)));
    REQUIRE(at::equal(got.at("model.layers.1.mlp.experts.0.down_proj.weight"), down[0]));
    tensors.emplace_back("model.layers.1.mlp.experts.0.up_proj.weight", both);
    save_safetensors(folder / "model.safetensors", tensors);
    REQUIRE(error_of([&] { hf_tensors(folder.path()); }).kind() == ErrorKind::data);
    save_safetensors(folder / "model.safetensors", {{"model.layers.1.mlp.experts.gate_up_proj", at::ones({2, 5, 4})}});
    REQUIRE(error_of([&] { hf_tensors(folder.path()); }).kind() == ErrorKind::data);
}
