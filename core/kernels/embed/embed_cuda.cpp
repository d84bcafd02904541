#ifdef MOE_WITH_CUDA
#include "core/kernels/embed/embed_kernels.h"

#include "core/kernels/common/cuda_check.h"
#include "core/kernels/embed/embed_sm90.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/sort.h>

namespace moe::kernels {

void embed_forward_cuda(const Tensor& ids_T, const Tensor& w_VD, Tensor y_TD) {
    OnDevice on(w_VD);
    sm90::Embed p{};
    p.dtype = sm90_dtype("embed", w_VD), p.T = ids_T.numel(), p.V = w_VD.size(0), p.D = w_VD.size(1);
    p.ids = ids_T.const_data_ptr<int64_t>(), p.w = in_pointer(w_VD), p.y = out_pointer(y_TD);
    MOE_CUDA_CHECK(sm90::embed_forward(p, on.stream));
}

Tensor embed_add_grad_cuda(const Tensor& dy_TD, const Tensor& ids_T, Tensor dw_VD, bool from_zero) {
    if (ids_T.numel() == 0 || dw_VD.numel() == 0) return {};
    OnDevice on(dy_TD);
    auto [sorted_T, order_T] = at::sort(ids_T.reshape({-1}), /*stable=*/true, /*dim=*/0, /*descending=*/false);
    sm90::Embed p{};
    p.dtype = sm90_dtype("embed", dy_TD), p.T = ids_T.numel(), p.V = dw_VD.size(0), p.D = dw_VD.size(1);
    p.ids = sorted_T.const_data_ptr<int64_t>(), p.order = order_T.const_data_ptr<int64_t>(), p.dy = in_pointer(dy_TD);
    p.dw = out_pointer(dw_VD), p.dw_dtype = sm90_dtype("embed", dw_VD);
    Tensor squares;
    if (from_zero) {
        squares = at::empty({sm90::embed_square_parts(p)}, dw_VD.options().dtype(at::kDouble));
        p.squares = squares.mutable_data_ptr<double>();
    }
    MOE_CUDA_CHECK(sm90::embed_add_grad(p, on.stream));
    return squares;
}
}  // namespace moe::kernels
#endif
