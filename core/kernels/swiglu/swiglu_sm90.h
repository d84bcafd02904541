// Launchers of swiglu, see swiglu_kernels.h.
#pragma once
#include "core/kernels/common/sm90.h"
#include "core/kernels/quantize/quantize_sm90.h"

namespace moe::kernels::sm90 {

struct SwiGlu {
    Dtype dtype;                  ///< of gate_up, y, dy, dgate_up
    int64_t R, F;
    const void* gate_up;          ///< [R, 2F]
    const void* row_weight;       ///< [R] or null: 1
    bool row_weight_fp64;
    void* y;                      ///< [R, F]
    const void* dy;               ///< [R, F]
    void* dgate_up;               ///< [R, 2F], may be gate_up
    void* drow_weight;            ///< [R] like row_weight, or null
    RowsCopy copy;                ///< forward: of y, backward: of dgate_up; bf16 with F a multiple of 8 only
};
cudaError_t swiglu_forward(const SwiGlu& p, cudaStream_t stream);
cudaError_t swiglu_backward(const SwiGlu& p, cudaStream_t stream);

}  // namespace moe::kernels::sm90
