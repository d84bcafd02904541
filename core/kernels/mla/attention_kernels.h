// Raw entry points of mla_attention: contiguous tensors of one device, outputs made by the caller, shapes as in attention.h.
#pragma once
#include "core/kernels/mla/attention.h"
#include "core/kernels/quantize/quantize.h"

#include <vector>

namespace moe::kernels {

/// What both directions read. The table is on q's device, fp64 for fp64 and fp32 otherwise; its tensors, k_rope and doc_start
/// may be undefined (rope 0; no packed documents).
struct MlaInputs {
    Tensor q, kv, k_rope;
    RopeTable table;
    MlaShape shape;
    Tensor doc_start_BS;       ///< int32 [B, S]
};

/// What both forms of the op want of their operands, as attention.h says.
void check_attention(const Tensor& q, const Tensor& kv, const Tensor& k_rope, const RopeTable& table, const MlaShape& shape, const Tensor& doc_start_BS);

/// out [T, H·v]. Returns what this device's backward wants besides the inputs and out (the CPU: the log-sum-exp of the scaled
/// scores [B, H, S]); it may be empty where want_grad is false.
std::vector<Tensor> mla_attention_forward_cpu(const MlaInputs& in, Tensor out, bool want_grad);
std::vector<Tensor> mla_attention_forward_cuda(const MlaInputs& in, Tensor out, bool want_grad);

/// Where a backward leaves its results: dq, dkv, dk_rope (undefined where rope is 0) like q, kv, k_rope, and E4M3 copies of the first two, or undefined ones.
struct MlaGradients {
    Tensor q, kv, k_rope;
    QuantizedRows q_copy = {}, kv_copy = {};
};
/// Gradients are written, not added to. Deterministic on the CPU. in.q is undefined on CUDA where forward returned something.
void mla_attention_backward_cpu(const MlaInputs& in, const Tensor& out, const std::vector<Tensor>& saved, const Tensor& dout, const MlaGradients& grads);
void mla_attention_backward_cuda(const MlaInputs& in, const Tensor& out, const std::vector<Tensor>& saved, const Tensor& dout, const MlaGradients& grads);
}  // namespace moe::kernels
