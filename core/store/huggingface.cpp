#include "core/store/huggingface.h"

#include "core/base/error.h"
#include "core/base/json.h"
#include "core/tensor/check.h"

#include <ATen/ATen.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <filesystem>
#include <set>

namespace moe::store {
namespace {
using Json = nlohmann::json;

// Keys that say nothing about the function that the model computes, or that follow from others.
const std::set<std::string> kWithoutEffect = {
    "architectures", "auto_map", "bos_token_id", "eos_token_id", "pad_token_id", "ep_size", "head_dim", "pretraining_tp", "qk_head_dim", "seq_aux", "torch_dtype", "dtype",
    "transformers_version", "use_cache", "_name_or_path", "num_local_experts", "num_mtp_layers", "model_type", "aux_loss_alpha", "attn_implementation", "initializer_range",
};

// Looks keys up in one config.json and remembers which were asked for.
class Reader {
public:
    Reader(std::string path, Json json) : path_(std::move(path)), json_(std::move(json)) {
        MOE_CHECK(json_.is_object(), data, "config_from_hf", fmt::format("{}: {}", path_, brief(json_)), "an object", "");
    }
    template <class T>
    T required(const std::string& key) {
        MOE_CHECK(has(key), config, "config_from_hf", fmt::format("{}: no \"{}\"", path_, key), "a config.json of deepseek_v3 or deepseek_v2", "");
        return value<T>(json_, key);
    }
    template <class T>
    T optional(const std::string& key, T otherwise) {
        return has(key) ? value<T>(json_, key) : otherwise;
    }
    bool has(const std::string& key) {
        asked_.insert(key);
        return json_.contains(key) && !json_[key].is_null();
    }
    const Json& object(const std::string& key) {
        asked_.insert(key);
        if (!json_[key].is_object()) wrong(key, json_[key]);
        return json_[key];
    }
    template <class T>
    T value(const Json& object, const std::string& key) const {
        try {
            return object.at(key).get<T>();
        } catch (const Json::exception&) {
            wrong(key, object.contains(key) ? object[key] : Json());
        }
    }
    /// The setting changes the result and is not built.
    void refuse(bool condition, const std::string& key, const std::string& want, const std::string& hint) {
        asked_.insert(key);
        MOE_CHECK(!condition, config, "config_from_hf", fmt::format("{}: \"{}\" is {}", path_, key, json_.contains(key) ? brief(json_[key]) : "null"), want, hint);
    }
    std::vector<std::string> unknown() const {
        std::vector<std::string> keys;
        for (const auto& [key, value] : json_.items()) {
            if (!asked_.count(key) && !kWithoutEffect.count(key)) keys.push_back(key);
        }
        return keys;
    }
    const std::string& path() const { return path_; }

private:
    [[noreturn]] void wrong(const std::string& key, const Json& value) const {
        MOE_THROW(config, "config_from_hf", fmt::format("{}: \"{}\" is {}", path_, key, brief(value)), "a value of the right type", "");
    }
    std::string path_;
    Json json_;
    std::set<std::string> asked_;
};

RopeScaling read_yarn(Reader& json, const std::string& key, const Json& rope, int64_t max_context, std::vector<std::string>& notes) {
    RopeScaling yarn;
    auto number = [&](const char* name, double otherwise) { return rope.contains(name) && !rope[name].is_null() ? json.value<double>(rope, name) : otherwise; };
    yarn.factor = json.value<double>(rope, "factor");
    yarn.original_max_position_embeddings = int64_t(number("original_max_position_embeddings", double(max_context)));
    yarn.beta_fast = number("beta_fast", 32.0);
    yarn.beta_slow = number("beta_slow", 1.0);
    yarn.mscale = number("mscale", 1.0);
    yarn.mscale_all_dim = number("mscale_all_dim", 0.0);
    // transformers takes m(mscale) / m(mscale_all_dim) only where both are given, else m(1); the formula here is always the ratio.
    bool same = (number("mscale", 0.0) != 0 && yarn.mscale_all_dim != 0) || (yarn.mscale == 1.0 && yarn.mscale_all_dim == 0);
    if (!same) notes.push_back(fmt::format("{}: mscale {} with mscale_all_dim {}: cos and sin are scaled by m(mscale) / m(mscale_all_dim), other programs may differ", key, yarn.mscale, yarn.mscale_all_dim));
    for (const char* name : {"attention_factor", "partial_rotary_factor"}) json.refuse(number(name, 1.0) != 1.0, key, fmt::format("no {}", name), "not built");
    json.refuse(rope.contains("truncate") && rope["truncate"] == false, key, "\"truncate\" true or absent", "not built");
    return yarn;
}

void read_rope(Reader& json, MlaConfig& mla, std::vector<std::string>& notes) {
    mla.rope_theta = json.optional<double>("rope_theta", 10000.0);
    mla.rope_interleave = json.optional<bool>("rope_interleave", true);
    for (const char* key : {"rope_scaling", "rope_parameters"}) {
        if (!json.has(key)) continue;
        const Json& rope = json.object(key);
        if (rope.contains("rope_theta")) mla.rope_theta = json.value<double>(rope, "rope_theta");
        std::string type = rope.contains("rope_type") ? json.value<std::string>(rope, "rope_type") : rope.contains("type") ? json.value<std::string>(rope, "type") : "default";
        json.refuse(type != "default" && type != "yarn", key, "type \"default\" or \"yarn\"", "other extensions of the context are not built");
        if (type == "yarn") mla.rope_scaling = read_yarn(json, key, rope, mla.max_context_length, notes);
    }
}

void read_attention(Reader& json, MlaConfig& mla) {
    mla.d_model = json.required<int64_t>("hidden_size");
    mla.d_latent = json.required<int64_t>("kv_lora_rank");
    if (json.has("q_lora_rank")) mla.q_lora_rank = json.required<int64_t>("q_lora_rank");
    mla.num_heads = json.required<int64_t>("num_attention_heads");
    // Keys and values are expanded to all heads from one latent: every checkpoint says num_attention_heads here.
    json.refuse(json.optional<int64_t>("num_key_value_heads", mla.num_heads) != mla.num_heads, "num_key_value_heads", fmt::format("num_attention_heads, {}", mla.num_heads), "");
    mla.qk_nope_head_dim = json.required<int64_t>("qk_nope_head_dim");
    mla.qk_rope_head_dim = json.required<int64_t>("qk_rope_head_dim");
    mla.v_head_dim = json.required<int64_t>("v_head_dim");
    mla.max_context_length = json.optional<int64_t>("max_position_embeddings", 4096);
    mla.attn_dropout = json.optional<double>("attention_dropout", 0.0);
    json.refuse(json.optional<bool>("attention_bias", false), "attention_bias", "false", "biases of projections are not built");
    json.refuse(json.optional<bool>("mlp_bias", false), "mlp_bias", "false", "biases of projections are not built");
}

void read_experts(Reader& json, bool v3, MoeConfig& moe) {
    moe.num_experts = json.required<int64_t>("n_routed_experts");
    moe.num_experts_per_token = json.required<int64_t>("num_experts_per_tok");
    moe.expert_intermediate_size = json.required<int64_t>("moe_intermediate_size");
    moe.num_shared_experts = json.optional<int64_t>("n_shared_experts", 0);
    moe.routed_scaling_factor = json.optional<double>("routed_scaling_factor", v3 ? 2.5 : 1.0);
    moe.norm_topk_prob = json.optional<bool>("norm_topk_prob", v3);
    moe.scoring_func = json.optional<std::string>("scoring_func", v3 ? "sigmoid" : "softmax");
    json.refuse(moe.scoring_func != "sigmoid" && moe.scoring_func != "softmax", "scoring_func", "\"sigmoid\" or \"softmax\"", "");
    std::string method = json.optional<std::string>("topk_method", v3 ? "noaux_tc" : "greedy");
    json.refuse(method != "noaux_tc" && method != "greedy" && method != "group_limited_greedy", "topk_method", "\"noaux_tc\", \"greedy\" or \"group_limited_greedy\"", "");
    // Only noaux_tc has a correction bias; greedy looks at no groups whatever n_group says.
    moe.use_aux_loss_free = method == "noaux_tc";
    int64_t n_group = json.optional<int64_t>("n_group", 1), topk_group = json.optional<int64_t>("topk_group", 1);
    if (method != "greedy") moe.n_group = n_group, moe.topk_group = topk_group;
    // DeepSeek-V2's own code normalises without scaling, transformers does neither: no checkpoint settles which is meant.
    json.refuse(!v3 && moe.norm_topk_prob, "norm_topk_prob", "false for deepseek_v2", "programs disagree on what true means here");
}
}  // namespace

HfConfig config_from_hf(const std::string& folder) {
    std::string path = (std::filesystem::path(folder) / "config.json").string();
    Reader json(path, read_json(path, ErrorKind::data));
    HfConfig hf;
    hf.model_type = json.required<std::string>("model_type");
    bool v3 = hf.model_type == "deepseek_v3";
    json.refuse(!v3 && hf.model_type != "deepseek_v2", "model_type", "\"deepseek_v3\" or \"deepseek_v2\"", "other models are not read");
    json.refuse(json.has("quantization_config"), "quantization_config", "weights in BF16, FP16 or FP32", "block-quantised FP8 files are not read in this version");
    auto& model = hf.config.model;
    model.num_layers = json.required<int64_t>("num_hidden_layers");
    model.vocab_size = json.required<int64_t>("vocab_size");
    model.norm_eps = json.optional<double>("rms_norm_eps", 1e-6);
    model.tie_word_embeddings = json.optional<bool>("tie_word_embeddings", false);
    model.init_method_std = json.optional<double>("initializer_range", 0.02);
    model.hidden_act = json.optional<std::string>("hidden_act", "silu");
    json.refuse(model.hidden_act != "silu", "hidden_act", "\"silu\"", "other activations are not built");
    model.dense_intermediate_size = json.required<int64_t>("intermediate_size");
    model.first_k_dense_replace = json.optional<int64_t>("first_k_dense_replace", v3 ? 3 : 0);
    model.moe_layer_freq = json.optional<int64_t>("moe_layer_freq", 1);
    read_attention(json, model.mla);
    read_rope(json, model.mla, hf.notes);
    read_experts(json, v3, model.moe);
    hf.dtype = json.optional<std::string>("dtype", json.optional<std::string>("torch_dtype", ""));
    hf.num_nextn_predict_layers = json.optional<int64_t>("num_nextn_predict_layers", 0);
    if (hf.num_nextn_predict_layers > 0)
        hf.notes.push_back(fmt::format("num_nextn_predict_layers: {} MTP layers are not loaded (layers {} on)", hf.num_nextn_predict_layers, model.num_layers));
    if (json.optional<double>("aux_loss_alpha", 0.0) > 0) hf.notes.push_back("aux_loss_alpha: a setting of training, set model.moe.sequence_aux_loss_weight to use it");
    for (const auto& key : json.unknown()) hf.notes.push_back(key + ": not known here, has no effect");
    auto& c = hf.config;      // a training length that the model can take
    c.training.seq_length = std::min(c.training.seq_length, c.model.mla.max_context_length);
    return hf;
}

namespace {
constexpr std::string_view kStackedGateUp = ".mlp.experts.gate_up_proj", kStackedDown = ".mlp.experts.down_proj";

// Layer number of "model.layers.N.…", −1 for any other name.
int64_t layer_of(const std::string& name) {
    constexpr std::string_view prefix = "model.layers.";
    if (!name.starts_with(prefix)) return -1;
    size_t end = name.find_first_not_of("0123456789", prefix.size());
    if (end == prefix.size() || end == std::string::npos || end - prefix.size() > 9) return -1;
    return std::stoll(name.substr(prefix.size(), end - prefix.size()));
}

void unstack(const std::string& name, const at::Tensor& stacked_EOI, NamedTensors& out) {
    bool both = name.ends_with(kStackedGateUp);
    MOE_CHECK(stacked_EOI.dim() == 3 && (!both || stacked_EOI.size(1) % 2 == 0), data, "hf_tensors", fmt::format("{} of shape {}", name, shape_text(stacked_EOI.sizes())),
              both ? "experts x 2·width x hidden" : "experts x hidden x width", "");
    std::string head = name.substr(0, name.rfind('.'));
    for (int64_t e = 0; e < stacked_EOI.size(0); ++e) {
        at::Tensor w = stacked_EOI.select(0, e);
        std::string expert = fmt::format("{}.{}.", head, e);
        if (both) {
            int64_t width = w.size(0) / 2;
            out.emplace_back(expert + "gate_proj.weight", w.narrow(0, 0, width));
            out.emplace_back(expert + "up_proj.weight", w.narrow(0, width, width));
        } else {
            out.emplace_back(expert + "down_proj.weight", w);
        }
    }
}
}  // namespace

NamedTensors hf_tensors(const std::string& folder, int64_t num_layers) {
    SafetensorsFolder files(folder);
    NamedTensors out;
    for (const auto& name : files.names()) {
        if (name.ends_with(".rotary_emb.inv_freq")) continue;
        if (num_layers >= 0 && layer_of(name) >= num_layers) continue;
        bool copy = layer_of(name) >= 0 && (name.ends_with(".embed_tokens.weight") || name.ends_with(".shared_head.head.weight"));
        if (copy) continue;                              // an MTP module's copies of the main ones
        if (name.ends_with(kStackedGateUp) || name.ends_with(kStackedDown)) unstack(name, files.get(name), out);
        else out.emplace_back(name, files.get(name));
    }
    std::sort(out.begin(), out.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
    auto twice = std::adjacent_find(out.begin(), out.end(), [](const auto& a, const auto& b) { return a.first == b.first; });
    MOE_CHECK(twice == out.end(), data, "hf_tensors", fmt::format("{} both stacked and alone in {}", twice == out.end() ? "" : twice->first, folder), "every tensor once", "");
    return out;
}

}  // namespace moe::store
