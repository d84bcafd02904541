// Causal attention as MLA needs it: keys made of a part per head and a rotated part shared by heads, values of another
// width, several query heads a key head, packed documents.
// Letters: B sequences, S positions, T = B·S tokens, H query heads, G key and value heads (H a multiple of G).
#pragma once
#include "core/kernels/dropout/dropout.h"
#include "core/tensor/weight.h"

namespace moe::kernels {

struct MlaShape {
    int64_t B = 0, S = 0;
    int64_t H = 0, G = 0;                  ///< query heads; key and value heads
    int64_t nope = 0, rope = 0, v = 0;     ///< widths; rope may be 0 (use_rope false)
    double softmax_scale = 1;              ///< (nope + rope)^−0.5, times YaRN's m²
    int64_t window = 0;                    ///< a token sees at most so many, itself included; 0: all of its document before it
};

/// Tables of the rotary embedding, float64 on the host, moved to the compute device and dtype by the op.
/// cos, sin [S, rope/2], already multiplied by YaRN's factor.
struct RopeTable {
    Tensor cos, sin;
    bool interleaved = true;               ///< pairs are (2i, 2i + 1); else halves: (i, i + rope/2)
};

/// Table for positions 0 … S−1; yarn_factor 1 means plain rope. Source: YaRN (Peng et al. 2023) as DeepSeek-V3 uses it.
struct YarnSettings { double factor = 1, beta_fast = 32, beta_slow = 1, mscale = 1, mscale_all_dim = 0; int64_t original_context = 4096; };
RopeTable rope_table(int64_t S, int64_t rope, double theta, bool interleaved, const YarnSettings& yarn, at::ScalarType dtype, at::Device device);
/// YaRN's correction of the softmax scale: m² with m = 0.1·mscale_all_dim·ln(factor) + 1 (1 without YaRN).
double yarn_softmax_correction(const YarnSettings& yarn);

/// out = softmax(scale · q kᵀ + mask) v, causal within a document.
/// q [T, H·(nope + rope)], not yet rotated (each head: nope, then rope); kv [T, G·(nope + v)] (each head: k_nope, then v);
/// k_rope [T, rope], not yet rotated, shared by heads (undefined where rope is 0); doc_start int32 [B, S]: token s of a sequence
/// sees positions doc_start[b][s] … s, or undefined: it sees 0 … s. → [T, H·v]. Positions are those within the sequence.
/// fp64, fp32, bf16, fp16; softmax in at least fp32. Backward gives dq, dkv and dk_rope; nothing of size S² outlives a block
/// on the CPU, nor on CUDA in bf16 and fp16. fp8: products in E4M3 made q and kv (bf16) and read their gradients, whose copies are made in the same pass and go with them
/// (kernels/quantize: attach_rows).
Tensor mla_attention(const Tensor& q, const Tensor& kv, const Tensor& k_rope, const RopeTable& table, const MlaShape& shape, const Tensor& doc_start_BS = {}, bool fp8 = false);

/// The same with probabilities dropped with probability p (before they meet v): row of a draw is (token, head), column the key's
/// position. Keeps [B, H, S, S]. fp64, fp32, bf16.
Tensor mla_attention_dropout(const Tensor& q, const Tensor& kv, const Tensor& k_rope, const RopeTable& table, const MlaShape& shape, const Tensor& doc_start_BS, double p, const RandomRows& rows);

/// Whether CUDA takes packed documents of sequences of S tokens as a mask, where shape and dtype allow it (cuDNN's widths, H = G, bf16 or fp16):
/// nothing then waits for their number.
bool masks_documents(int64_t S);

/// First position that each token sees, int32 [B, S]: its document's start (0 where undefined) or position − window + 1, whichever
/// is later.
Tensor windowed(const Tensor& doc_start_BS, int64_t B, int64_t S, int64_t window, at::Device device);

}  // namespace moe::kernels
