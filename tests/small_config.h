// A model of odd sizes that takes milliseconds, for tests of everything above the kernels.
#pragma once
#include "core/config/config.h"

namespace moe::test {

/// 3 layers (the first dense), 5 experts of which 2 are chosen, one shared, float64, synthetic data of three domains.
inline Config small_config() {
    Config c;
    c.seed = 11;
    c.device = "cpu";
    c.model.num_layers = 3;
    c.model.vocab_size = 37;
    c.model.init_method_std = 0.08;
    c.model.dense_intermediate_size = 36;
    c.model.first_k_dense_replace = 1;
    auto& a = c.model.mla;
    a.d_model = 48;
    a.d_latent = 20;
    a.num_heads = 3;
    a.qk_nope_head_dim = 8;
    a.qk_rope_head_dim = 4;
    a.v_head_dim = 6;
    a.max_context_length = 128;
    auto& m = c.model.moe;
    m.num_experts = 5;
    m.num_experts_per_token = 2;
    m.expert_intermediate_size = 12;
    m.num_shared_experts = 1;
    auto& t = c.training;
    t.use_fp64 = true;
    t.global_batch_size = 4;
    t.micro_batch_size = 1;
    t.seq_length = 21;
    t.train_steps = 20;
    t.learning_rate = 1e-2;
    t.min_learning_rate = 1e-3;
    t.lr_warmup_steps = 2;
    c.data.dataset_type = "synthetic";
    c.data.synthetic.domains = 3;
    return c;
}

}  // namespace moe::test
