#include "core/plan/count.h"

#include "core/base/error.h"
#include "core/base/suggest.h"

namespace moe::plan {
namespace {
/// Matrices and norms of one attention, in elements.
struct Attention {
    int64_t matrices = 0, norms = 0;
};

Attention attention_of(const ModelConfig& model) {
    const MlaConfig& m = model.mla;
    int64_t queries = m.num_heads * model.qk_head_dim(), groups = model.num_kv_heads();
    Attention a;
    if (m.q_lora_rank) {
        a.matrices += *m.q_lora_rank * (m.d_model + queries);      // q_a_proj, q_b_proj
        a.norms += *m.q_lora_rank;                                 // q_a_layernorm
    } else {
        a.matrices += queries * m.d_model;                         // q_proj
    }
    a.matrices += (m.d_latent + m.qk_rope_head_dim) * m.d_model;   // kv_a_proj_with_mqa
    a.norms += m.d_latent;                                         // kv_a_layernorm
    a.matrices += groups * (m.qk_nope_head_dim + m.v_head_dim) * m.d_latent;   // kv_b_proj
    a.matrices += m.d_model * m.num_heads * m.v_head_dim;          // o_proj
    return a;
}

/// A gated feed-forward: gate, up and down.
int64_t feed_forward(int64_t d_model, int64_t width) { return 3 * d_model * width; }

/// A norm of the residual stream: a layer norm has a bias, too.
int64_t block_norm(const ModelConfig& model) { return model.mla.d_model * (model.norm_type == "layernorm" ? 2 : 1); }

}  // namespace

std::vector<Part> layer_parts(const ModelConfig& model, int64_t num_dense, int64_t num_moe) {
    const MoeConfig& e = model.moe;
    int64_t d = model.mla.d_model, num = num_dense + num_moe;
    Attention a = attention_of(model);
    int64_t attention = num * a.matrices, norms = num * (a.norms + 2 * block_norm(model));
    int64_t dense = num_dense * feed_forward(d, model.dense_width()), router = num_moe * e.num_experts * d;
    int64_t expert = num_moe * feed_forward(d, e.expert_intermediate_size), shared = num_moe * feed_forward(d, model.shared_width());
    return {{"attention", attention, attention, attention},
            {"norms", norms, norms, 0},
            {"dense", dense, dense, dense},
            {"router", router, router, router},
            {"experts", expert * e.num_experts, expert * e.num_experts_per_token, expert * e.num_experts_per_token},
            {"shared", shared, shared, shared}};
}

const Part& Counts::part(const std::string& name) const {
    std::vector<std::string> names;
    for (const Part& p : parts) {
        if (p.name == name) return p;
        names.push_back(p.name);
    }
    MOE_THROW(usage, "part", "\"" + name + "\"", fmt::format("one of {}", fmt::join(names, ", ")), did_you_mean(name, names));
}

Counts count(const ModelConfig& model, int64_t mtp_depth) {
    int64_t d = model.mla.d_model, table = model.vocab() * d, num_moe = model.num_moe_layers();
    int64_t head = model.tie_word_embeddings ? 0 : table;
    Counts c;
    c.parts = layer_parts(model, model.num_layers - num_moe, num_moe);
    c.parts[1].total += block_norm(model);      // the final norm
    c.parts[1].active += block_norm(model);
    c.parts.insert(c.parts.begin(), Part{"embedding", table, table, 0});
    c.parts.push_back({"head", head, head, table});     // a tied head is multiplied with all the same
    for (const Part& p : c.parts) {
        c.total += p.total;
        c.active += p.active;
        c.matmul += p.matmul;
    }
    // A tied matrix is counted as the embedding, but it is the head that a token is multiplied with.
    c.active_without_embedding = model.tie_word_embeddings ? c.active : c.active - table;
    if (model.moe.use_aux_loss_free) c.router_bias = num_moe * model.moe.num_experts;

    int64_t joint = 2 * d * d;                  // eh_proj
    for (const Part& p : layer_parts(model, 0, mtp_depth)) {
        c.mtp += p.total;
        c.mtp_active += p.active;
        c.mtp_matmul += p.matmul;
    }
    c.mtp += mtp_depth * (joint + 3 * block_norm(model));       // enorm, hnorm, shared_head.norm
    c.mtp_active += mtp_depth * (joint + 3 * block_norm(model));
    c.mtp_matmul += mtp_depth * (joint + table);
    return c;
}

double flops_per_token(const ModelConfig& model, int64_t seq_length, FlopsRule rule, int64_t mtp_depth) {
    Counts c = count(model, mtp_depth);
    double attention = 3.0 * double(model.num_layers + mtp_depth) * double(model.mla.num_heads) * double(model.qk_head_dim() + model.mla.v_head_dim) * double(seq_length);
    return 6.0 * double(c.matmul + c.mtp_matmul) + attention * (rule == FlopsRule::full ? 2 : 1);
}
}  // namespace moe::plan
