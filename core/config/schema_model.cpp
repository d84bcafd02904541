// Keys of model, model.mla and model.moe.
#include "core/config/schema.h"

namespace moe::reflect {
template <>
const Schema& schema<RopeScaling>() {
    using C = RopeScaling;
    static const Schema s("rope_scaling", {
        field("type", &C::type).one_of({"yarn"}).row("A1").help("Method that stretches the rotary frequencies."),
        field("factor", &C::factor).min(1).row("A1").help("How many times longer than the original the context becomes."),
        field("original_max_position_embeddings", &C::original_max_position_embeddings).min(1).unit("tokens").row("A1").help("Context length before stretching."),
        field("beta_fast", &C::beta_fast).above(0).unit("rotations").row("A1").help("Dimensions that turn more often than this over the original context keep their frequency."),
        field("beta_slow", &C::beta_slow).above(0).unit("rotations").row("A1").help("Dimensions that turn less often than this are divided by factor; between the two it is a ramp."),
        field("mscale", &C::mscale).min(0).row("A1").help("Scale of cosine and sine: their magnitude is m(mscale) / m(mscale_all_dim), m(s) = 0.1 s ln(factor) + 1."),
        field("mscale_all_dim", &C::mscale_all_dim).min(0).row("A1").help("Scale of the softmax: it is multiplied by m(mscale_all_dim) squared."),
    });
    return s;
}

template <>
const Schema& schema<MlaConfig>() {
    using C = MlaConfig;
    static const Schema s("mla", {
        field("d_model", &C::d_model).alias("hidden_size").min(1).unit("features").row("A1").help("Width of the residual stream."),
        field("d_latent", &C::d_latent).alias("kv_lora_rank").min(1).unit("features").row("A1").help("Width of the compressed keys and values, which is what decoding caches."),
        field("q_lora_rank", &C::q_lora_rank).min(1).unit("features").row("A1").help("Width of the compressed queries; null projects them directly."),
        field("num_heads", &C::num_heads).alias("num_attention_heads").min(1).row("A1").help("Attention heads."),
        field("num_kv_heads", &C::num_kv_heads).alias("num_key_value_heads").min(1).row("A1").help("Heads of keys and values, each shared by num_heads / num_kv_heads query heads; null is num_heads."),
        field("qk_nope_head_dim", &C::qk_nope_head_dim).min(1).unit("features").row("A1").help("Part of a query and key head without position."),
        field("qk_rope_head_dim", &C::qk_rope_head_dim).min(2).unit("features").row("A1").help("Part of a query and key head that is rotated; even; the key's is shared by all heads."),
        field("v_head_dim", &C::v_head_dim).min(1).unit("features").row("A1").help("Width of a value head."),
        field("use_rope", &C::use_rope).row("A1").help("Rotary positions; false leaves attention without positions."),
        field("rope_theta", &C::rope_theta).above(0).row("A1").help("Base of the rotary frequencies."),
        field("rope_interleave", &C::rope_interleave).row("A1").help("Rotary pairs are neighbouring features, as in DeepSeek's checkpoints; false pairs the two halves."),
        field("rope_scaling", &C::rope_scaling).row("A1").help("YaRN; null leaves the frequencies as they are."),
        field("max_context_length", &C::max_context_length).alias("max_position_embeddings").min(1).unit("tokens").row("A1").help("Longest sequence the model takes."),
        field("sliding_window", &C::sliding_window).min(1).unit("tokens").row("A1").help("Each token sees only this many before it, itself included; null sees all."),
        field("attn_dropout", &C::attn_dropout).min(0).below(1).row("A1").help("Probability that an attention weight is dropped in training."),
        field("use_flash_mla", &C::use_flash_mla).row("A2").help("Fused attention kernels; false takes the plain ones."),
        field("flash_mla_backend", &C::flash_mla_backend).one_of({"auto", "dense", "sparse"}).row("A2").help("Attention over all tokens, or over the sparse_top_k that a light indexer picks."),
        field("fallback_to_dense", &C::fallback_to_dense).row("A2").help("Dense attention for batches too small for the sparse kernel; false makes that an error."),
        field("sparse_top_k", &C::sparse_top_k).min(1).unit("tokens").row("A2").help("Tokens that a query sees with the sparse backend."),
        field("indexer_heads", &C::indexer_heads).min(1).row("A2").help("Heads of the sparse backend's indexer."),
        field("indexer_head_dim", &C::indexer_head_dim).min(1).unit("features").row("A2").help("Width of an indexer head."),
        field("use_fp8_kv", &C::use_fp8_kv).row("F2").help("Keep the decoding cache in FP8: 656 bytes a token and layer instead of 1152 at the published shape."),
    });
    return s;
}

template <>
const Schema& schema<MoeConfig>() {
    using C = MoeConfig;
    static const Schema s("moe", {
        field("num_experts", &C::num_experts).alias("n_routed_experts").min(1).row("A4").help("Routed experts of a layer."),
        field("num_experts_per_token", &C::num_experts_per_token).alias("num_experts_per_tok").alias("top_k").min(1).row("A4").help("Experts that each token goes to (top-k)."),
        field("expert_intermediate_size", &C::expert_intermediate_size).alias("expert_dim").alias("moe_intermediate_size").min(1).unit("features").row("A4").help("Inner width of one routed expert."),
        field("num_shared_experts", &C::num_shared_experts).alias("n_shared_experts").min(0).row("A4").help("Experts that every token passes."),
        field("shared_intermediate_size", &C::shared_intermediate_size).min(0).unit("features").row("A4").help("Inner width of all shared experts together; 0 is num_shared_experts × expert_intermediate_size."),
        field("dropout", &C::dropout).min(0).below(1).row("A4").help("Probability that a feature of the experts' output is dropped in training."),
        field("scoring_func", &C::scoring_func).one_of({"sigmoid", "softmax"}).row("A3").help("How router logits become scores."),
        field("n_group", &C::n_group).min(1).row("A3").help("Groups of experts; a token's experts come from topk_group of them."),
        field("topk_group", &C::topk_group).min(1).row("A3").help("Groups that a token may use."),
        field("norm_topk_prob", &C::norm_topk_prob).row("A3").help("Divide the chosen scores by their sum."),
        field("routed_scaling_factor", &C::routed_scaling_factor).above(0).row("A3").help("Factor on the routed experts' weights."),
        field("router_temperature", &C::router_temperature).above(0).row("A3").help("Router logits are divided by this; larger spreads tokens more evenly."),
        field("router_noise_std", &C::router_noise_std).min(0).row("A3").help("Standard deviation of normal noise on router logits in training, annealed linearly to 0."),
        field("router_noise_anneal_steps", &C::router_noise_anneal_steps).min(1).unit("steps").row("A3").help("Steps until the noise is 0; null is train_steps."),
        field("router_dtype", &C::router_dtype).one_of({"fp32", "fp64"}).row("A3").help("Precision of router weights and logits."),
        field("capacity_factor", &C::capacity_factor).above(0).row("A4").help("An expert takes at most this times the mean number of tokens and drops the rest; null drops none."),
        field("min_expert_capacity", &C::min_expert_capacity).min(0).unit("tokens").row("A4").help("An expert's capacity is never below this."),
        field("use_aux_loss_free", &C::use_aux_loss_free).row("A5").help("Balance by a bias on each expert's score that steers selection only and is moved after every step."),
        field("bias_update_speed", &C::bias_update_speed).min(0).row("A5").help("How far a bias moves in a step; at a billion parameters 0.001 is right, 0.01 oscillates and 0.0001 is slow."),
        field("bias_update_rule", &C::bias_update_rule).one_of({"sign", "magnitude", "centred"}).row("A5").help("Move by the sign of the missing load, by its relative size, or by the sign with the mean taken off."),
        field("bias_freeze_step", &C::bias_freeze_step).min(0).unit("steps").row("A5").help("Biases stand still from this step on; null never."),
        field("router_aux_loss_weight", &C::router_aux_loss_weight).min(0).row("A5").help("Weight of the Switch auxiliary loss N Σ f_i P_i over a micro-batch."),
        field("sequence_aux_loss_weight", &C::sequence_aux_loss_weight).min(0).row("A5").help("Weight of the same loss over each sequence; DeepSeek-V3 trained with 1e-4."),
        field("global_aux_loss_weight", &C::global_aux_loss_weight).min(0).row("A5").help("Weight of the same loss with f_i over all ranks and micro-batches of a step."),
        field("router_z_loss_weight", &C::router_z_loss_weight).min(0).row("A5").help("Weight of the mean squared log-sum-exp of router logits, which keeps them small."),
        field("balance_loss_type", &C::balance_loss_type).one_of({"none", "entropy", "load"}).row("A5").help("A further balance loss: minus the entropy of the mean scores, or the variance of the load."),
        field("balance_loss_weight", &C::balance_loss_weight).min(0).row("A5").help("Weight of balance_loss_type."),
        field("force_balance", &C::force_balance).row("A5").help("Ignore the router and spread tokens evenly. For benchmarks only: the model does not learn to route."),
        field("use_deep_ep", &C::use_deep_ep).row("D3").help("Fused expert dispatch without host synchronisation."),
        field("deep_ep_fp8", &C::deep_ep_fp8).row("D3").help("Send tokens to experts in FP8."),
        field("deep_ep_async", &C::deep_ep_async).row("D3").help("Overlap dispatch with computation."),
        field("redundant_experts", &C::redundant_experts).min(0).row("D3").help("Copies of busy experts on other ranks."),
    });
    return s;
}

template <>
const Schema& schema<ModelConfig>() {
    using C = ModelConfig;
    static const Schema s("model", {
        field("num_layers", &C::num_layers).alias("num_hidden_layers").min(1).row("A8").help("Decoder layers, MTP modules not counted."),
        field("vocab_size", &C::vocab_size).min(2).unit("tokens").row("A8").help("Rows of embedding and head; null follows the tokenizer."),
        field("norm_type", &C::norm_type).one_of({"rmsnorm", "layernorm"}).row("A8").help("Normalisation before attention, feed-forward and head."),
        field("norm_eps", &C::norm_eps).alias("rms_norm_eps").above(0).row("A8").help("Added to the mean square before the root."),
        field("tie_word_embeddings", &C::tie_word_embeddings).row("A8").help("Head and embedding share one matrix."),
        field("init_method_std", &C::init_method_std).alias("initializer_range").min(0).row("A8").help("Standard deviation of initial weights."),
        field("hidden_act", &C::hidden_act).one_of({"silu"}).row("A6").help("Activation of the gated feed-forward."),
        field("dense_intermediate_size", &C::dense_intermediate_size).alias("intermediate_size").min(1).unit("features").row("A6").help("Inner width of a dense layer's feed-forward; null is 4 × d_model rounded up to a multiple of 128."),
        field("dense_layer_interval", &C::dense_layer_interval).min(1).unit("layers").row("A6").help("Layers 0, N, 2N … have a dense feed-forward instead of experts; null makes none dense."),
        field("first_k_dense_replace", &C::first_k_dense_replace).min(0).unit("layers").row("A6").help("The first K layers have a dense feed-forward."),
        field("moe_layer_freq", &C::moe_layer_freq).min(1).unit("layers").row("A6").help("Only layers whose index it divides have experts."),
        field("mla", &C::mla).row("A1").help("Multi-head latent attention."),
        field("moe", &C::moe).row("A4").help("Router, experts and their balance."),
    });
    return s;
}
}  // namespace moe::reflect
