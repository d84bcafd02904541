// Parameters and floating-point operations of a model, from its configuration alone.
// Letters: L layers, D hidden, H heads, G heads of keys and values, E experts, K active experts a token.
#pragma once
#include "core/config/config.h"

#include <cstdint>
#include <string>
#include <vector>

namespace moe::plan {

/// Parameters of one kind over all layers: how many there are, and how many one token uses.
struct Part {
    std::string name;         ///< "embedding", "attention", "norms", "dense", "router", "experts", "shared", "head"
    int64_t total = 0, active = 0;
    int64_t matmul = 0;       ///< of `active`, those that a token is multiplied with (no norm, no look-up)
};

/// Parameters of a model. The router's balance bias (Hugging Face: e_score_correction_bias) is a buffer, not a parameter: it is
/// in `router_bias` and in no other figure, as in Hugging Face's num_parameters(). Its checkpoints do hold it.
struct Counts {
    std::vector<Part> parts;               ///< of the model without MTP
    int64_t total = 0;                     ///< without MTP
    int64_t active = 0;                    ///< used by one token, embedding included (all of its rows, as is usual)
    int64_t active_without_embedding = 0;  ///< the figure that papers give: head in, embedding out
    int64_t mtp = 0, mtp_active = 0;       ///< of the MTP modules; they share embedding and head with the model
    int64_t matmul = 0;                    ///< weights that a token is multiplied with, without MTP
    int64_t mtp_matmul = 0;                ///< the same of the MTP modules; each uses the head once more
    int64_t router_bias = 0;               ///< elements of the balance bias, without MTP

    int64_t total_with_mtp() const { return total + mtp; }
    /// The part of that name. Throws moe::Error (usage) with the nearest.
    const Part& part(const std::string& name) const;
};

/// Counts the parameters of `model` with `mtp_depth` MTP modules. Throws moe::Error (config) while vocab_size is null.
Counts count(const ModelConfig& model, int64_t mtp_depth = 0);

/// The parts of `num_dense` dense and `num_moe` mixture layers, without embedding, final norm and head. An MTP module has those of one
/// mixture layer, and its joint and norms (see count()).
std::vector<Part> layer_parts(const ModelConfig& model, int64_t num_dense, int64_t num_moe);

/// What of the attention matrix is counted: causal is the lower half, which is what must be computed; full is all of it, which
/// many published figures count.
enum class FlopsRule { causal, full };

/// Forward and backward FLOPs of one token in a sequence of `seq_length` tokens: 6 a matmul weight, and 3·L·H·(qk + v)·seq for
/// attention by the causal rule, twice that by the full rule. Recomputation is not counted. Say the rule with the figure.
/// Source: Chowdhery et al., 2204.02311, appendix B, with the causal half.
double flops_per_token(const ModelConfig& model, int64_t seq_length, FlopsRule rule, int64_t mtp_depth = 0);

}  // namespace moe::plan
