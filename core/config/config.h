// The configuration of a run: one plain struct a section, one field a key, under the key's own name. Defaults describe a plain,
// exact, dropless model. A std::optional that is empty is the JSON null: off, or derived from other keys by the methods below.
// Names, help texts, ranges and aliases are listed once in core/config/schema_*.cpp; reading and checking are in load.h.
// Sizes are in tokens unless the name carries a unit. Layer indices are 0-based; MTP module k is layer num_layers + k.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace moe {

/// YaRN's extension of the context. Source: Peng et al., 2309.00071; the keys are Hugging Face's.
struct RopeScaling {
    std::string type = "yarn";
    double factor = 1.0;
    int64_t original_max_position_embeddings = 4096;
    double beta_fast = 32.0, beta_slow = 1.0;
    double mscale = 1.0, mscale_all_dim = 0.0;
    bool operator==(const RopeScaling&) const = default;
};

/// Multi-head latent attention.
struct MlaConfig {
    int64_t d_model = 1024;
    int64_t d_latent = 256;                    ///< width of the compressed keys and values (kv_lora_rank)
    std::optional<int64_t> q_lora_rank;        ///< null: a plain query projection
    int64_t num_heads = 16;
    std::optional<int64_t> num_kv_heads;       ///< null: num_heads; ModelConfig::num_kv_heads() resolves it
    int64_t qk_nope_head_dim = 64, qk_rope_head_dim = 32, v_head_dim = 64;
    bool use_rope = true;
    double rope_theta = 10000.0;
    bool rope_interleave = true;               ///< rotary pairs are neighbours (DeepSeek's checkpoints), else halves
    std::optional<RopeScaling> rope_scaling;
    int64_t max_context_length = 4096;
    std::optional<int64_t> sliding_window;
    double attn_dropout = 0.0;
    bool use_flash_mla = true;
    std::string flash_mla_backend = "auto";    ///< auto, dense, sparse
    bool fallback_to_dense = true;
    int64_t sparse_top_k = 2048, indexer_heads = 4, indexer_head_dim = 64;
    bool use_fp8_kv = false;
    bool operator==(const MlaConfig&) const = default;
};

/// Router, experts and their balance.
struct MoeConfig {
    int64_t num_experts = 8, num_experts_per_token = 2;
    int64_t expert_intermediate_size = 2048;
    int64_t num_shared_experts = 0;
    int64_t shared_intermediate_size = 0;      ///< width of all shared experts together; 0: num_shared_experts × expert_intermediate_size
    double dropout = 0.0;
    std::string scoring_func = "sigmoid";      ///< sigmoid, softmax
    int64_t n_group = 1, topk_group = 1;
    bool norm_topk_prob = true;
    double routed_scaling_factor = 1.0;
    double router_temperature = 1.0;
    double router_noise_std = 0.0;
    std::optional<int64_t> router_noise_anneal_steps;
    std::string router_dtype = "fp32";         ///< fp32, fp64
    std::optional<double> capacity_factor;     ///< null: dropless
    int64_t min_expert_capacity = 4;
    bool use_aux_loss_free = true;
    double bias_update_speed = 0.001;
    std::string bias_update_rule = "sign";     ///< sign, magnitude, centred
    std::optional<int64_t> bias_freeze_step;
    double router_aux_loss_weight = 0.0, sequence_aux_loss_weight = 0.0, global_aux_loss_weight = 0.0, router_z_loss_weight = 0.0;
    std::string balance_loss_type = "none";    ///< none, entropy, load
    double balance_loss_weight = 0.0;
    bool force_balance = false;                ///< benchmarks only
    bool use_deep_ep = false, deep_ep_fp8 = false, deep_ep_async = false;
    int64_t redundant_experts = 0;
    bool operator==(const MoeConfig&) const = default;
};

struct ModelConfig {
    int64_t num_layers = 12;
    std::optional<int64_t> vocab_size = 256;               ///< null: the tokenizer's, filled in before the build
    std::string norm_type = "rmsnorm";                     ///< rmsnorm, layernorm
    double norm_eps = 1e-6;
    bool tie_word_embeddings = false;
    double init_method_std = 0.006;
    std::string hidden_act = "silu";
    std::optional<int64_t> dense_intermediate_size;        ///< null: derived; dense_width() resolves it
    std::optional<int64_t> dense_layer_interval;
    int64_t first_k_dense_replace = 0, moe_layer_freq = 1;
    MlaConfig mla;
    MoeConfig moe;

    /// Width of a dense layer's feed-forward: the given one, else 4 × d_model rounded up to a multiple of 128.
    int64_t dense_width() const;
    /// Width of all shared experts of a layer together; 0 for none.
    int64_t shared_width() const;
    /// False for layers below first_k_dense_replace, for 0, N, 2N … of dense_layer_interval N, and for those that moe_layer_freq
    /// does not divide. MTP layers (layer ≥ num_layers) are always mixtures.
    bool is_moe_layer(int64_t layer) const;
    /// Layers below num_layers with experts.
    int64_t num_moe_layers() const;
    /// Heads of keys and values, num_heads where null.
    int64_t num_kv_heads() const;
    /// qk_nope_head_dim + qk_rope_head_dim.
    int64_t qk_head_dim() const { return mla.qk_nope_head_dim + mla.qk_rope_head_dim; }
    /// Rows of embedding and head. Throws moe::Error (config) while it is null.
    int64_t vocab() const;
    bool operator==(const ModelConfig&) const = default;
};

struct SftConfig {
    std::optional<std::string> chat_template;
    std::string loss_on = "answers";           ///< answers, all
    bool packing = true;
    bool operator==(const SftConfig&) const = default;
};

struct LoraConfig {
    std::optional<int64_t> rank;               ///< null: off
    double alpha = 16.0;
    std::vector<std::string> targets;
    bool operator==(const LoraConfig&) const = default;
};

struct DpoConfig {
    double beta = 0.1;
    bool operator==(const DpoConfig&) const = default;
};

/// Grows the batch linearly from `start` sequences to global_batch_size over `tokens` tokens.
struct BatchSizeRamp {
    int64_t start = 1, tokens = 0;
    bool operator==(const BatchSizeRamp&) const = default;
};

struct TrainingConfig {
    int64_t global_batch_size = 64, micro_batch_size = 1;  ///< sequences
    int64_t seq_length = 2048;
    std::optional<int64_t> train_steps, total_training_tokens;
    std::optional<double> tokens_per_parameter_ratio;
    double learning_rate = 3e-4, min_learning_rate = 3e-5;
    int64_t lr_warmup_steps = 0;
    std::string lr_decay_style = "cosine";     ///< cosine, linear, constant, wsd, deepseek_v3
    std::optional<double> lr_decay_ratio;
    double weight_decay = 0.1, grad_clip = 1.0;
    std::string optimizer = "adamw";           ///< adamw, adam, sgd, muon
    double adam_beta1 = 0.9, adam_beta2 = 0.95, adam_eps = 1e-8, momentum = 0.9;
    std::string moments_dtype = "fp32", grads_dtype = "fp32";  ///< fp32, bf16
    bool use_fp64 = false, use_fp16 = false, use_bf16 = false, use_fp8 = false;
    std::string gradient_checkpointing = "none";           ///< none, selective, full; JSON's true is full, false is none
    std::vector<std::string> recompute;
    bool use_mtp = false;
    int64_t num_predict_tokens = 2;            ///< tokens predicted at each position: MTP depth + 1
    double mtp_loss_weight = 0.3;
    std::optional<BatchSizeRamp> batch_size_ramp;
    std::optional<int64_t> dynamic_batch_tokens;
    int64_t eval_interval = 1000, save_interval = 5000, log_interval = 10;  ///< steps
    std::optional<std::string> init_from;
    int64_t max_skipped_steps = 10;
    std::string compile_graphs = "auto";       ///< auto, on, off; JSON's true is on, false is off
    SftConfig sft;
    LoraConfig lora;
    DpoConfig dpo;

    /// "fp64", "fp32", "bf16", "fp16" or "fp8": the one use_* flag that is set, fp32 for none.
    std::string precision() const;
    /// Micro-batches that one of `data_parallel` ranks accumulates in a step. Throws moe::Error (config) where they do not divide.
    int64_t micro_batches(int64_t data_parallel) const;
    /// Tokens of one optimizer step: global_batch_size × seq_length.
    int64_t tokens_per_step() const { return global_batch_size * seq_length; }
    /// Length of the run in steps of global_batch_size (train/schedule.h knows ramps): the first that is set of train_steps,
    /// total_training_tokens and tokens_per_parameter_ratio (of `parameters`, the total), rounded up; null when none is.
    std::optional<int64_t> total_steps(int64_t parameters) const;
    /// MTP modules: num_predict_tokens − 1 with use_mtp, else 0.
    int64_t mtp_depth() const { return use_mtp ? num_predict_tokens - 1 : 0; }
    bool operator==(const TrainingConfig&) const = default;
};

struct PreprocessingConfig {
    int64_t num_workers = 2;
    bool shuffle = true;
    int64_t shuffle_seed = 42;
    bool operator==(const PreprocessingConfig&) const = default;
};

/// One source of a mixture, and a domain of its own.
struct DataSource {
    std::string name;
    std::optional<std::string> subset, path;
    double weight = 1.0;                       ///< weights are normalised over the sources
    std::string description;
    bool operator==(const DataSource&) const = default;
};

struct SyntheticConfig {
    int64_t domains = 4, seed = 0;
    bool operator==(const SyntheticConfig&) const = default;
};

struct DataConfig {
    std::optional<std::string> dataset_name, dataset_version;
    std::string dataset_type = "synthetic";    ///< synthetic, text, jsonl, tokens, parquet, hf, local_corpus
    std::optional<std::string> path;
    std::string cache_dir = "./data/cache";
    std::string tokenizer = "bytes";
    PreprocessingConfig preprocessing;
    std::vector<DataSource> sources;
    std::string text_field = "text";
    bool packing = true, document_mask = true;
    double fim_rate = 0.0;
    std::string bad_lines = "error";           ///< error, skip
    SyntheticConfig synthetic;
    bool operator==(const DataConfig&) const = default;
};

struct ValidationConfig {
    bool enabled = false;
    std::vector<DataSource> sources;
    std::optional<std::string> path;
    int64_t max_batches = 50;
    bool by_domain = true;
    bool operator==(const ValidationConfig&) const = default;
};

struct CheckpointingConfig {
    bool enabled = true;
    std::optional<std::string> dir;
    int64_t keep_last = 3;
    bool async = true, save_on_exit = true;
    std::string format = "native";
    bool operator==(const CheckpointingConfig&) const = default;
};

struct StatisticsConfig {
    int64_t interval = 1, matrices_interval = 50, saturation_lag = 100;    ///< steps
    bool operator==(const StatisticsConfig&) const = default;
};

struct AlarmsConfig {
    std::optional<double> max_vio;
    int64_t dead_steps = 100;
    double spike_sigma = 6.0;
    bool operator==(const AlarmsConfig&) const = default;
};

struct TensorboardConfig {
    bool enabled = true;
    std::optional<std::string> log_dir;
    bool operator==(const TensorboardConfig&) const = default;
};

struct WandbConfig {
    bool enabled = false;
    std::optional<std::string> project, entity, name;
    std::vector<std::string> tags;
    bool operator==(const WandbConfig&) const = default;
};

/// The interval of the log line is training.log_interval; logging.log_interval is an alias of it.
struct LoggingConfig {
    bool console = true;
    StatisticsConfig statistics;
    AlarmsConfig alarms;
    TensorboardConfig tensorboard;
    WandbConfig wandb;
    std::optional<int64_t> log_rank;
    bool operator==(const LoggingConfig&) const = default;
};

struct ProfilingConfig {
    bool enabled = false;
    int64_t start = 10, steps = 3;
    std::optional<int64_t> profile_freq;
    std::string folder = "profile";
    bool memory_snapshot = false;
    bool operator==(const ProfilingConfig&) const = default;
};

struct DistributedConfig {
    std::string backend = "nccl";              ///< nccl, mpi, deepspeed (nccl, with its section read)
    std::string launcher = "local";            ///< local, torchrun, mpirun, slurm, deepspeed
    int64_t tensor_parallel_size = 1, pipeline_parallel_size = 1, expert_parallel_size = 1, context_parallel_size = 1;
    int64_t data_parallel_size = -1;           ///< −1: what the ranks allow
    int64_t replicate_size = 1, expert_tensor_parallel_size = 1;
    int64_t zero_stage = 0;
    bool zero_offload = false;
    bool overlap_grad_reduce = true, overlap_param_gather = true;
    int64_t reduce_bucket_bytes = 500'000'000;
    std::string pipeline_schedule = "gpipe";   ///< gpipe, 1f1b, interleaved, zero_bubble, dualpipev
    int64_t pipeline_chunks = 1;
    std::string dispatcher = "auto";           ///< auto, padded, symmetric, host_sized
    int64_t timeout_secs = 600;
    bool operator==(const DistributedConfig&) const = default;
};

struct DeepspeedPrecision {
    std::optional<bool> enabled;
    bool operator==(const DeepspeedPrecision&) const = default;
};

struct DeepspeedOffload {
    std::optional<std::string> device;         ///< none, cpu, nvme
    bool operator==(const DeepspeedOffload&) const = default;
};

struct DeepspeedZero {
    std::optional<int64_t> stage;
    DeepspeedOffload offload_optimizer, offload_param;
    std::optional<bool> overlap_comm, contiguous_gradients;
    std::optional<int64_t> reduce_bucket_size; ///< elements
    bool operator==(const DeepspeedZero&) const = default;
};

/// What a DeepSpeed user already has. Everything is null by default, so that only what is written is translated and compared.
struct DeepspeedConfig {
    bool enabled = false;
    std::optional<std::string> config_file;
    DeepspeedPrecision fp16, bf16;
    DeepspeedZero zero_optimization;
    std::optional<int64_t> gradient_accumulation_steps;
    std::optional<double> gradient_clipping;
    bool operator==(const DeepspeedConfig&) const = default;
};

struct SlurmConfig {
    bool enabled = false;
    std::string partition = "gpu";
    int64_t nodes = 1, ntasks_per_node = 1, gpus_per_node = 1, cpus_per_task = 8;
    std::string time = "24:00:00", mem = "64G";
    std::optional<std::string> job_name;       ///< null: experiment_name
    std::string output = "logs/slurm-%j.out", error = "logs/slurm-%j.err";
    std::optional<std::string> account, qos;
    std::vector<std::string> extra_args;
    std::optional<std::string> container_image;
    std::vector<std::string> container_mounts;
    bool requeue = true;
    int64_t signal_secs = 120;
    bool operator==(const SlurmConfig&) const = default;
};

/// Everything about a run. A value: copy it, change the copy; it is frozen once a model is built from it.
struct Config {
    std::string experiment_name = "experiment", output_dir = "outputs";
    int64_t seed = 42;
    std::optional<std::string> inherits;       ///< resolved while reading: null in every Config that load_config returns
    std::optional<std::string> device;         ///< cpu, cuda; null: cuda when there is one a rank
    bool deterministic = false;
    ModelConfig model;
    TrainingConfig training;
    DataConfig data;
    ValidationConfig validation;
    CheckpointingConfig checkpointing;
    LoggingConfig logging;
    ProfilingConfig profiling;
    DistributedConfig distributed;
    DeepspeedConfig deepspeed;
    SlurmConfig slurm;
    bool operator==(const Config&) const = default;
};

}  // namespace moe
