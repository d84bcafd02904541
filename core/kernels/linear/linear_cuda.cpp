// Products on CUDA: cuBLAS through ATen, and in bf16 the grouped product behind at::_grouped_mm. Letters as in linear.h.
#ifdef MOE_WITH_CUDA
#include "core/kernels/common/cuda_check.h"
#include "core/kernels/common/dtype.h"
#include "core/kernels/linear/grouped_sm90.h"
#include "core/kernels/linear/linear_kernels.h"

#include <ATen/Context.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/native/cuda/GroupMM.h>

#include <algorithm>
#include <vector>

namespace moe::kernels {
namespace {
/// Bytes of a bf16 weight gradient that exist at a time before they are added to the main gradient.
constexpr int64_t kPartBytes = int64_t(1) << 30;
/// cuBLAS may add the parts of a split sum in bf16 or fp16 unless told not to; the contract is fp32. TF32 is off by default.
void use_full_sums() {
    static const bool once = [] {
        at::globalContext().setAllowBF16ReductionCuBLAS(false);
        at::globalContext().setAllowFP16ReductionCuBLAS(false);
        return true;
    }();
    (void)once;
}

at::ScalarType wider(const Tensor& a, const Tensor& b) {
    if (a.scalar_type() == b.scalar_type()) return a.scalar_type();
    return a.scalar_type() == at::kDouble || b.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}
bool is_bf16(const Tensor& t) { return t.scalar_type() == at::kBFloat16; }
bool is_narrow(at::ScalarType t) { return t == at::kBFloat16 || t == at::kHalf; }
/// cuBLAS takes bf16 or fp16 operands and writes fp32.
bool narrow_into_fp32(at::ScalarType operands, const Tensor& out) { return is_narrow(operands) && out.scalar_type() == at::kFloat; }

/// out = a b. Operands of different dtypes are cast up first, exactly.
void multiply_on_gpu(const Tensor& a, const Tensor& b, Tensor out) {
    use_full_sums();
    if (out.numel() == 0) return;
    if (a.size(1) == 0) {
        out.zero_();
        return;
    }
    auto dtype = wider(a, b);
    Tensor left = a.to(dtype), right = b.to(dtype);
    if (out.scalar_type() == dtype) at::mm_out(out, left, right);
    else if (narrow_into_fp32(dtype, out)) at::mm_out(out, left, right, at::kFloat);
    else if (is_narrow(dtype)) out.copy_(at::mm(left, right, at::kFloat));
    else out.copy_(at::mm(left, right));
}

/// out += a b, the product of bf16 or fp16 operands added in fp32; a bf16 sum is rounded once, in cuBLAS.
void multiply_add_on_gpu(const Tensor& a, const Tensor& b, Tensor out) {
    use_full_sums();
    if (out.numel() == 0 || a.size(1) == 0) return;
    auto dtype = wider(a, b);
    Tensor left = a.to(dtype), right = b.to(dtype);
    if (out.scalar_type() == dtype) at::addmm_out(out, out, left, right);
    else if (narrow_into_fp32(dtype, out)) at::addmm_out(out, out, left, right, at::kFloat);
    else if (is_narrow(dtype)) out.add_(at::mm(left, right, at::kFloat));
    else out.add_(at::mm(left, right));
}

/// f(e, first row, rows) of every group that has rows: a loop over experts for the precisions that are for tests.
template <class F> void each_group_on_gpu(const Tensor& offsets_E1, F f) {
    const int64_t* offset = offsets_E1.const_data_ptr<int64_t>();
    for (int64_t e = 0; e + 1 < offsets_E1.numel(); ++e)
        if (int64_t n = offset[e + 1] - offset[e]; n > 0) f(e, offset[e], n);
}

/// Whether the grouped product takes these operands: bf16, and every row a multiple of 16 bytes from a multiple of 16 bytes on.
bool fits_grouped(std::initializer_list<Tensor> tensors) {
    for (const Tensor& t : tensors)
        if (!is_bf16(t) || t.size(-1) % 8 || reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16) return false;
    return true;
}

/// Ends of groups [first, first + count) relative to the rows of the first, int32 on the device. The copy does not wait: so
/// small a block of pageable memory is staged before the call returns.
Tensor group_ends(const Tensor& offsets_E1, int64_t first, int64_t count, const Tensor& like) {
    const int64_t* offset = offsets_E1.const_data_ptr<int64_t>() + first;
    std::vector<int> ends(count);
    for (int64_t e = 0; e < count; ++e) ends[e] = int(offset[e + 1] - offset[0]);
    Tensor out = at::empty({count}, like.options().dtype(at::kInt));
    MOE_CUDA_CHECK(cudaMemcpyAsync(out.mutable_data_ptr(), ends.data(), count * sizeof(int), cudaMemcpyHostToDevice,
                                   c10::cuda::getCurrentCUDAStream(like.device().index()).stream()));
    return out;
}

/// What at::_grouped_mm calls on sm90, written into the caller's tensor; _grouped_mm makes its own output, and copying that
/// would cost a fifth of the product's time.
void grouped_into(const Tensor& a, const Tensor& b, const Tensor& ends_E, Tensor out) {
    at::cuda::detail::bf16bf16_grouped_mm(a, b, ends_E, std::nullopt, out);
}

void check_groups(const Tensor& offsets_E1, const Tensor& rows) {
    MOE_CHECK(offsets_E1.numel() - 1 < 1024, shape, "grouped_linear: experts on CUDA in bf16", std::to_string(offsets_E1.numel() - 1), "fewer than 1024", "shard the experts over more ranks");
    MOE_CHECK(rows.size(0) < (int64_t(1) << 31), shape, "grouped_linear: rows", std::to_string(rows.size(0)), "less than 2^31", "use a smaller micro-batch");
}
}  // namespace

void product_nt_cuda(const Tensor& x_TI, const Tensor& w_OI, Tensor y_TO) {
    OnDevice on(x_TI);
    multiply_on_gpu(x_TI, w_OI.t(), y_TO);
}
void product_nn_cuda(const Tensor& dy_TO, const Tensor& w_OI, Tensor dx_TI) {
    OnDevice on(dy_TO);
    multiply_on_gpu(dy_TO, w_OI, dx_TI);
}
void add_product_tn_cuda(const Tensor& dy_TO, const Tensor& x_TI, Tensor dw_OI) {
    OnDevice on(dy_TO);
    multiply_add_on_gpu(dy_TO.t(), x_TI, dw_OI);
}

void grouped_product_nt_cuda(const Tensor& x_RI, const Tensor& offsets_E1, const Tensor& w_EOI, Tensor y_RO) {
    OnDevice on(x_RI);
    if (y_RO.numel() == 0) return;
    if (fits_grouped({x_RI, w_EOI, y_RO})) {
        check_groups(offsets_E1, x_RI);
        return grouped_into(x_RI, w_EOI.transpose(-2, -1), group_ends(offsets_E1, 0, w_EOI.size(0), x_RI), y_RO);
    }
    each_group_on_gpu(offsets_E1, [&](int64_t e, int64_t lo, int64_t n) { multiply_on_gpu(x_RI.narrow(0, lo, n), w_EOI[e].t(), y_RO.narrow(0, lo, n)); });
}

void grouped_product_nn_cuda(const Tensor& dy_RO, const Tensor& offsets_E1, const Tensor& w_EOI, Tensor dx_RI) {
    OnDevice on(dy_RO);
    if (dx_RI.numel() == 0) return;
    if (fits_grouped({dy_RO, w_EOI, dx_RI})) {
        check_groups(offsets_E1, dy_RO);
        return grouped_into(dy_RO, w_EOI, group_ends(offsets_E1, 0, w_EOI.size(0), dy_RO), dx_RI);
    }
    each_group_on_gpu(offsets_E1, [&](int64_t e, int64_t lo, int64_t n) { multiply_on_gpu(dy_RO.narrow(0, lo, n), w_EOI[e], dx_RI.narrow(0, lo, n)); });
}

/// In bf16 the grouped product writes bf16 parts, which are then added to the main gradient, some experts at a time so that
/// the parts stay below kPartBytes. The part of an expert without rows may be anything and is skipped.
void add_grouped_product_tn_cuda(const Tensor& dy_RO, const Tensor& x_RI, const Tensor& offsets_E1, Tensor dw_EOI) {
    OnDevice on(dy_RO);
    if (dy_RO.size(0) == 0 || dw_EOI.numel() == 0) return;
    if (!fits_grouped({dy_RO, x_RI})) {
        each_group_on_gpu(offsets_E1, [&](int64_t e, int64_t lo, int64_t n) { multiply_add_on_gpu(dy_RO.narrow(0, lo, n).t(), x_RI.narrow(0, lo, n), dw_EOI[e]); });
        return;
    }
    check_groups(offsets_E1, dy_RO);
    const int64_t E = dw_EOI.size(0), O = dw_EOI.size(1), I = dw_EOI.size(2), step = std::clamp<int64_t>(kPartBytes / (O * I * 2), 1, E);
    const int64_t* offset = offsets_E1.const_data_ptr<int64_t>();
    Tensor part_GOI = at::empty({step, O, I}, dy_RO.options());
    for (int64_t first = 0; first < E; first += step) {
        const int64_t count = std::min(step, E - first), lo = offset[first], rows = offset[first + count] - lo;
        if (rows == 0) continue;
        Tensor ends = group_ends(offsets_E1, first, count, dy_RO), part = part_GOI.narrow(0, 0, count);
        grouped_into(dy_RO.narrow(0, lo, rows).t(), x_RI.narrow(0, lo, rows), ends, part);
        sm90::AddGroups p{};
        p.groups = count, p.size = O * I, p.ends = ends.const_data_ptr<int>(), p.part = in_pointer(part);
        p.sum = static_cast<char*>(dw_EOI.mutable_data_ptr()) + first * O * I * dw_EOI.element_size(), p.sum_dtype = sm90_dtype("grouped_linear", dw_EOI);
        MOE_CUDA_CHECK(sm90::add_groups(p, on.stream));
    }
}
}  // namespace moe::kernels
#endif
