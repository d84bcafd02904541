// Launchers that rotate and lay out the operands of MLA's attention, and take its gradients apart again.
// Letters: T tokens (B·S), H query heads, G key and value heads, W padded width of q and k, U of v.
#pragma once
#include "core/kernels/common/sm90.h"
#include "core/kernels/quantize/quantize_sm90.h"

namespace moe::kernels::sm90 {

/// Forward: q_in [T, H, nope + rope] → q [T, H, W]; kv_in [T, G, nope + v], k_rope [T, rope] → k [T, G, W] and, where it is
/// not null, v_out [T, G, U]. The last rope of nope + rope columns are rotated; columns beyond the data become 0.
/// Backward, the same fields the other way: q, k, v_out hold gradients that are read, q_in, kv_in, k_rope gradients that are
/// written; k_rope's is the sum over G, in order, rotated back.
struct MlaLayout {
    Dtype dtype;
    int64_t T, S;
    int H, G, nope, rope, v, W, U;
    bool interleaved;
    void *q_in, *kv_in, *k_rope;
    void *q, *k, *v_out;
    const void *cos, *sin;        ///< [S, rope / 2], fp64 for fp64, else fp32
    RowsCopy q_copy, kv_copy;     ///< backward, where mla_walks_vectors: of q_in as [T, H·(nope + rope)] and kv_in as [T, G·(nope + v)]
};
/// Whether threads take 8 bf16 elements at a time: widths and pointers are multiples of 16 bytes.
bool mla_walks_vectors(const MlaLayout& p);
cudaError_t mla_assemble(const MlaLayout& p, cudaStream_t stream);
cudaError_t mla_take_apart(const MlaLayout& p, cudaStream_t stream);

/// y [rows, to] = x [rows, from] with zeros appended or columns dropped.
cudaError_t repad(Dtype dtype, const void* x, int64_t rows, int from, int to, void* y, cudaStream_t stream);

}  // namespace moe::kernels::sm90
