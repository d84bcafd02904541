// Launchers of grouped matrix products on Hopper. Plain C++. They never wait, allocate nothing and read the groups on the device, so they can be captured.
// Letters: R rows allocated, E groups, O out, I in. All tensors are contiguous and start at a multiple of 16 bytes.
#pragma once
#include "core/kernels/common/sm90.h"

namespace moe::kernels::sm90 {

/// Groups of a multiple of this many rows, empty ones included: rows that fill a group up are zeros, or whatever may be computed with.
constexpr int kGroupRows = 128;

struct GroupedShape {
    int64_t groups, rows, out, in;      ///< E, R, O, I; each of E · O, E · I and R below 2^31
    const int* offsets;                 ///< [E + 1] on the device, from 0 on, multiples of kGroupRows, none above R; nothing checks them
    int blocks = 0;                     ///< multiprocessors to use; 0: all
};

/// Whether the current device runs these kernels: compute capability 9.0.
bool grouped_device();
/// Whether the products below take bf16 experts of [out, in].
bool grouped_bf16_fits(int64_t out, int64_t in);

/// y [R, O] = x [R, I] w[e] [O, I]ᵀ in bf16, summed in fp32, rounded once. Rows from offsets[E] on are neither read nor written.
cudaError_t grouped_nt_bf16(const GroupedShape& s, const void* x, const void* w, void* y, cudaStream_t stream);
/// dx [R, I] = dy [R, O] w[e] [O, I], the same.
cudaError_t grouped_nn_bf16(const GroupedShape& s, const void* dy, const void* w, void* dx, cudaStream_t stream);
/// dw [E, O, I] in fp32 or bf16 (rounded once) += dyᵀ x over each group's rows of bf16. A group without rows is left alone. The same bits every time.
cudaError_t add_grouped_tn_bf16(const GroupedShape& s, const void* dy, const void* x, void* dw, Dtype dw_dtype, cudaStream_t stream);
/// dw [E, O, I] in fp32 or bf16 = dyᵀ x over each group's rows; a group without rows gets zeros. Nothing of dw is read. squares, where given, are
/// square_parts() doubles whose sum becomes that of dw's squares.
cudaError_t grouped_tn_bf16(const GroupedShape& s, const void* dy, const void* x, void* dw, Dtype dw_dtype, double* squares, cudaStream_t stream);
int square_parts();

/// E4M3 numbers and their fp32 scales, as quantize lays them out.
struct Fp8 { const void* q; const float* scales; };
/// Whether the products below take experts of [out, in].
bool grouped_fp8_fits(int64_t out, int64_t in);
/// y [R, O] = x [R, I] w[e] [O, I]ᵀ in bf16 from E4M3 with scales by 1 x 128 and by 128 x 128, every 128 products added up in fp32. Offsets may be nullptr with one
/// group: all rows, as many as there are.
cudaError_t grouped_nt_fp8(const GroupedShape& s, Fp8 x, Fp8 w, void* y, cudaStream_t stream);
/// dx [R, I] = dy [R, O] w[e], from the transposed q [E, I, O] and the scales of w as it was.
cudaError_t grouped_nn_fp8(const GroupedShape& s, Fp8 dy, Fp8 transposed_w, void* dx, cudaStream_t stream);

}  // namespace moe::kernels::sm90
