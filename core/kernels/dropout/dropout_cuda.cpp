#ifdef MOE_WITH_CUDA
#include "core/kernels/common/cuda_check.h"
#include "core/kernels/dropout/dropout_kernels.h"
#include "core/kernels/dropout/dropout_sm90.h"

namespace moe::kernels {
namespace {
sm90::Draws draws(const char* op, const RandomRows& rows, const Tensor& out_RC) {
    sm90::Draws p{};
    p.fp64 = sm90_dtype(op, out_RC) == sm90::Dtype::fp64;
    p.seed = rows.key.seed, p.purpose = uint32_t(rows.key.purpose), p.step = rows.key.step, p.layer = rows.key.layer;
    p.first = rows.first, p.group = rows.group, p.stride = rows.stride;
    p.R = out_RC.size(0), p.C = out_RC.size(1), p.out = out_pointer(out_RC);
    return p;
}
}  // namespace

void dropout_mask_cuda(const RandomRows& rows, uint32_t threshold, double keep, Tensor out_RC) {
    OnDevice on(out_RC);
    MOE_CUDA_CHECK(sm90::dropout_mask(draws("dropout", rows, out_RC), threshold, keep, on.stream));
}

void normal_rows_cuda(const RandomRows& rows, Tensor out_RC) {
    OnDevice on(out_RC);
    MOE_CUDA_CHECK(sm90::normal_rows(draws("normal_rows", rows, out_RC), on.stream));
}
}  // namespace moe::kernels
#endif
