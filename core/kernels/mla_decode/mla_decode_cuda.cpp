#ifdef MOE_WITH_CUDA
#include "core/kernels/mla_decode/mla_decode_kernels.h"

#include "core/kernels/common/cuda_check.h"
#include "core/kernels/mla_decode/mla_decode_sm90.h"

#include <ATen/ops/empty.h>

namespace moe::kernels {

void mla_decode_cuda(const Tensor& q_latent, const Tensor& q_rope, const LatentCache& cache, const Tensor& lengths, double scale, Tensor out, Tensor lse) {
    OnDevice on(q_latent);
    const int64_t B = lengths.size(0), Q = q_latent.size(0) / B, H = q_latent.size(1), M = cache.block_table.size(1);
    MOE_CHECK(B <= 65535 && Q * H <= 65535 && B * (M + 1) <= (1 << 30), shape, "mla_decode: sizes on CUDA", fmt::format("{} sequences of {} blocks, {} new tokens, {} heads", B, M, Q, H),
              "at most 65535 sequences, 65535 tokens times heads, 2^30 blocks", "");
    sm90::MlaDecode p{};
    p.dtype = sm90_dtype("mla_decode", q_latent), p.fp8 = cache.format == LatentCache::Format::fp8;
    p.B = int(B), p.Q = int(Q), p.H = int(H), p.L = int(cache.latent), p.R = int(cache.rope), p.M = int(M);
    p.q_latent = in_pointer(q_latent), p.latent_token = q_latent.stride(0), p.latent_head = q_latent.stride(1);
    p.q_rope = in_pointer(q_rope), p.rope_token = q_rope.stride(0), p.rope_head = q_rope.stride(1);
    p.rows = in_pointer(cache.rows), p.N = cache.rows.size(0), p.block_table = lengths.numel() ? cache.block_table.const_data_ptr<int32_t>() : nullptr;
    p.lengths = lengths.const_data_ptr<int32_t>(), p.scale = scale, p.out = out_pointer(out), p.lse = out_pointer(lse);
    Tensor workspace = at::empty({int64_t(sm90::mla_decode_workspace(p))}, q_latent.options().dtype(at::kByte));
    p.workspace = out_pointer(workspace);
    MOE_CUDA_CHECK(sm90::mla_decode(p, on.stream));
}

void append_latent_cuda(const LatentCache& cache, const Tensor& latent_TL, const Tensor& rope_TR, const Tensor& sequence_T, const Tensor& position_T) {
    OnDevice on(latent_TL);
    sm90::AppendLatent p{};
    p.dtype = sm90_dtype("append_latent", latent_TL), p.fp8 = cache.format == LatentCache::Format::fp8;
    p.T = latent_TL.size(0), p.B = int(cache.block_table.size(0)), p.L = int(cache.latent), p.R = int(cache.rope), p.M = int(cache.block_table.size(1));
    p.latent = in_pointer(latent_TL), p.latent_stride = latent_TL.stride(0), p.rope = in_pointer(rope_TR), p.rope_stride = rope_TR.stride(0);
    p.rows = out_pointer(cache.rows), p.N = cache.rows.size(0), p.block_table = cache.block_table.const_data_ptr<int32_t>();
    p.sequence = sequence_T.const_data_ptr<int32_t>(), p.position = position_T.const_data_ptr<int32_t>();
    MOE_CUDA_CHECK(sm90::append_latent(p, on.stream));
}
}  // namespace moe::kernels
#endif
