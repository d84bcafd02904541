#include "core/config/config.h"

#include "core/base/error.h"

#include <cmath>

namespace moe {
int64_t ModelConfig::dense_width() const {
    return dense_intermediate_size ? *dense_intermediate_size : (4 * mla.d_model + 127) / 128 * 128;
}

int64_t ModelConfig::shared_width() const {
    if (moe.num_shared_experts == 0) return 0;
    return moe.shared_intermediate_size > 0 ? moe.shared_intermediate_size : moe.num_shared_experts * moe.expert_intermediate_size;
}

bool ModelConfig::is_moe_layer(int64_t layer) const {
    if (layer >= num_layers) return true;
    if (layer < first_k_dense_replace) return false;
    if (dense_layer_interval && layer % *dense_layer_interval == 0) return false;
    return layer % moe_layer_freq == 0;
}

int64_t ModelConfig::num_moe_layers() const {
    int64_t count = 0;
    for (int64_t layer = 0; layer < num_layers; ++layer) count += is_moe_layer(layer);
    return count;
}

int64_t ModelConfig::num_kv_heads() const { return mla.num_kv_heads.value_or(mla.num_heads); }

int64_t ModelConfig::vocab() const {
    MOE_CHECK(vocab_size, config, "model.vocab_size", "null", "the tokenizer's size", "it is filled in when the tokenizer is opened; or give a number");
    return *vocab_size;
}

std::string TrainingConfig::precision() const {
    return use_fp64 ? "fp64" : use_fp8 ? "fp8" : use_fp16 ? "fp16" : use_bf16 ? "bf16" : "fp32";
}

int64_t TrainingConfig::micro_batches(int64_t data_parallel) const {
    int64_t at_once = micro_batch_size * data_parallel, fits = micro_batch_size;
    while (fits > 1 && data_parallel > 0 && global_batch_size % (fits * data_parallel) != 0) --fits;
    bool one_fits = fits > 0 && data_parallel > 0 && global_batch_size % (fits * data_parallel) == 0;
    MOE_CHECK(at_once > 0 && global_batch_size % at_once == 0, config, "training.global_batch_size", fmt::format("{}", global_batch_size),
              fmt::format("a multiple of micro_batch_size × data-parallel ranks = {} × {}", micro_batch_size, data_parallel),
              one_fits ? fmt::format("training.micro_batch_size = {} fits", fits) : "change training.global_batch_size or the number of ranks");
    return global_batch_size / at_once;
}

std::optional<int64_t> TrainingConfig::total_steps(int64_t parameters) const {
    if (train_steps) return train_steps;
    double tokens = total_training_tokens ? double(*total_training_tokens) : tokens_per_parameter_ratio ? *tokens_per_parameter_ratio * double(parameters) : 0;
    if (tokens <= 0) return std::nullopt;
    return int64_t(std::ceil(tokens / double(tokens_per_step())));
}
}  // namespace moe
