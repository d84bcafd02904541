// Attention of packed documents and of sliding windows by cuDNN's graph interface: LibTorch's way to it plans anew at every call and gives wrong gradients where v is
// narrower than q and k (2.11).
// Letters: B sequences of S positions, T = B·S tokens, H query heads, G key and value heads, D width of q and k, V of v, N documents with room for more.
#pragma once
#ifdef MOE_WITH_CUDA
#include <ATen/core/Tensor.h>

#include <tuple>

namespace moe::kernels {
using at::Tensor;

/// What a plan is made for; it is kept by it for as long as the process lives.
struct PackedShape {
    at::ScalarType dtype = at::kBFloat16;   ///< bf16 or fp16
    int64_t T = 0, S = 0, N = 0;            ///< no document is longer than S
    int64_t H = 0, G = 0, D = 0, V = 0;
    int64_t v_row = 0, v_head = 0;          ///< elements from one token's v to the next one's, from one head's to the next's
    int64_t window = 0;                     ///< a token sees at most so many, itself included; 0: all of its document before it
    double scale = 1;
    bool operator<(const PackedShape& o) const {
        auto key = [](const PackedShape& s) { return std::tie(s.dtype, s.T, s.S, s.N, s.H, s.G, s.D, s.V, s.v_row, s.v_head, s.window, s.scale); };
        return key(*this) < key(o);
    }
};

/// Where documents lie. Those beyond the real ones are empty and start at T.
struct PackedDocuments {
    Tensor lengths;                         ///< int32 [N]
    Tensor offsets;                         ///< int64 [operands, N + 1]: starts in elements of each
};
/// From starts of documents and T, int32 [N + 1] on the device.
PackedDocuments packed_documents(const Tensor& starts, const PackedShape& shape);

/// q [T, H, D], k [T, G, D], v as shape says → out [T, H, V] and the log-sum-exp fp32 [T, H]. The first call of a shape plans: 0.1 to 1 s.
/// Throws moe::Error (cuda) with cuDNN's reason.
void cudnn_packed_forward(const PackedShape& shape, const PackedDocuments& documents, const Tensor& q, const Tensor& k, const Tensor& v, Tensor out, Tensor lse);
/// dq, dk like q, k; dv [T, G, V] contiguous. Adds in the order of arrival: not bit for bit the same from run to run.
void cudnn_packed_backward(const PackedShape& shape, const PackedDocuments& documents, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse, const Tensor& dout,
                           Tensor dq, Tensor dk, Tensor dv);
}  // namespace moe::kernels
#endif
