// Raw entry points of mla_decode and append_latent: checked tensors of one device, outputs made by the caller, shapes as in mla_decode.h.
#pragma once
#include "core/kernels/mla_decode/mla_decode.h"

namespace moe::kernels {

/// q_latent [B·Q, H, L], q_rope [B·Q, H, R]: last dim contiguous. out and lse contiguous. B, Q, H above 0.
void mla_decode_cpu(const Tensor& q_latent, const Tensor& q_rope, const LatentCache& cache, const Tensor& lengths, double scale, Tensor out, Tensor lse);
void mla_decode_cuda(const Tensor& q_latent, const Tensor& q_rope, const LatentCache& cache, const Tensor& lengths, double scale, Tensor out, Tensor lse);

/// latent and rope: last dim contiguous. T above 0.
void append_latent_cpu(const LatentCache& cache, const Tensor& latent_TL, const Tensor& rope_TR, const Tensor& sequence_T, const Tensor& position_T);
void append_latent_cuda(const LatentCache& cache, const Tensor& latent_TL, const Tensor& rope_TR, const Tensor& sequence_T, const Tensor& position_T);
}  // namespace moe::kernels
