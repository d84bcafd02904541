#ifdef MOE_WITH_CUDA
#include "core/kernels/head/head_loss_kernels.h"

#include "core/kernels/common/cuda_check.h"
#include "core/kernels/head/head_loss.h"
#include "core/kernels/head/head_loss_sm90.h"

namespace moe::kernels {

void cross_entropy_cuda(const Tensor& logits_NV, const Tensor& targets_N, const Factor& scale, Tensor loss_N, Tensor dlogits_NV) {
    check_wide_float("head_loss", {"logits", logits_NV});
    OnDevice on(logits_NV);
    sm90::CrossEntropy p{};
    p.dtype = sm90_dtype("head_loss", logits_NV), p.n = logits_NV.size(0), p.V = logits_NV.size(1), p.ignore = kIgnore;
    p.logits = in_pointer(logits_NV), p.targets = targets_N.const_data_ptr<int64_t>(), p.scale = scale.number, p.loss = loss_N.mutable_data_ptr<double>();
    if (scale.tensor.defined()) p.device_scale = scale.tensor.const_data_ptr<double>();
    p.pitch = dlogits_NV.defined() ? dlogits_NV.stride(0) : 0;
    p.dlogits = out_pointer(dlogits_NV), p.dlogits_dtype = dlogits_NV.defined() ? sm90_dtype("head_loss", dlogits_NV) : p.dtype;
    MOE_CUDA_CHECK(sm90::cross_entropy(p, on.stream));
}
bool overwrites_rows_cuda(at::ScalarType logits, int64_t V) { return sm90::cross_entropy_keeps_rows(int64_t(c10::elementSize(logits)), V); }
}  // namespace moe::kernels
#endif
