// Products on CUDA: cuBLAS through ATen; groups in bf16 through core/kernels/grouped, or where that does not take them the product behind
// at::_grouped_mm. Letters as in linear.h.
#ifdef MOE_WITH_CUDA
#include "core/kernels/common/cuda_check.h"
#include "core/kernels/common/dtype.h"
#include "core/kernels/grouped/grouped.h"
#include "core/kernels/linear/grouped_sm90.h"
#include "core/kernels/linear/linear_kernels.h"
#include "core/kernels/linear/split_sm90.h"

#include <ATen/Context.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sub.h>
#include <ATen/ops/sum.h>
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

/// f(e, first row, rows) of every group that has rows: a loop over experts for the precisions that are for tests. Offsets on the device
/// are waited for.
template <class F> void each_group_on_gpu(const RowGroups& groups, F f) {
    Tensor offsets = groups.offsets_E1.to(at::kCPU, at::kLong);
    const int64_t* offset = offsets.const_data_ptr<int64_t>();
    for (int64_t e = 0; e < groups.size(); ++e)
        if (int64_t n = offset[e + 1] - offset[e]; n > 0) f(e, offset[e], n);
}

/// Whether the grouped product takes these operands: bf16, and every row a multiple of 16 bytes from a multiple of 16 bytes on.
bool fits_grouped(std::initializer_list<Tensor> tensors) {
    for (const Tensor& t : tensors)
        if (!is_bf16(t) || t.size(-1) % 8 || reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16) return false;
    return true;
}

/// Offsets as int32 on the device. A copy from the host does not wait: so small a block of pageable memory is staged before the call returns.
Tensor offsets_on_device(const RowGroups& groups, const Tensor& like) {
    if (groups.offsets_E1.is_cuda()) return groups.offsets_E1;
    const int64_t* offset = groups.offsets_E1.const_data_ptr<int64_t>();
    std::vector<int> narrow(offset, offset + groups.size() + 1);
    Tensor out = at::empty({groups.size() + 1}, like.options().dtype(at::kInt));
    MOE_CUDA_CHECK(cudaMemcpyAsync(out.mutable_data_ptr(), narrow.data(), narrow.size() * sizeof(int), cudaMemcpyHostToDevice,
                                   c10::cuda::getCurrentCUDAStream(like.device().index()).stream()));
    return out;
}
Tensor ends_on_device(const RowGroups& groups, const Tensor& like) { return offsets_on_device(groups, like).narrow(0, 1, groups.size()); }

/// What at::_grouped_mm calls on sm90, written into the caller's tensor; _grouped_mm makes its own output, and copying that
/// would cost a fifth of the product's time.
void grouped_into(const Tensor& a, const Tensor& b, const Tensor& ends_E, Tensor out) {
    at::cuda::detail::bf16bf16_grouped_mm(a, b, ends_E, std::nullopt, out);
}

void check_limits(const RowGroups& groups, const Tensor& rows) {
    MOE_CHECK(groups.size() < 1024, shape, "grouped_linear: experts on CUDA in bf16", std::to_string(groups.size()), "fewer than 1024", "shard the experts over more ranks");
    MOE_CHECK(rows.size(0) < (int64_t(1) << 31), shape, "grouped_linear: rows", std::to_string(rows.size(0)), "less than 2^31", "use a smaller micro-batch");
}
// ---- bf16 with fp32: the router's products, on the tensor cores. fp32 is three bf16 parts, so bf16 x fp32 is three exact products added in fp32.

bool is_mixed(const Tensor& narrow, const Tensor& wide) { return is_bf16(narrow) && wide.scalar_type() == at::kFloat; }

/// The parts of x [R, C] side by side: [R, n · C] bf16, the i-th the part that `which` names.
Tensor parts_beside(const Tensor& x_RC, std::initializer_list<int> which, cudaStream_t stream) {
    const int64_t R = x_RC.size(0), C = x_RC.size(1), n = int64_t(which.size());
    Tensor out = at::empty({R, n * C}, x_RC.options().dtype(at::kBFloat16));
    sm90::Split p{R, C, n * C, x_RC.const_data_ptr<float>(), {}};
    int64_t at = 0;
    for (int k : which) {
        void* to = static_cast<char*>(out.mutable_data_ptr()) + at++ * C * 2;
        if (!p.part[k]) p.part[k] = to;
        else {                                     // named twice: one more pass
            sm90::Split more{R, C, n * C, p.x, {}};
            more.part[k] = to;
            MOE_CUDA_CHECK(sm90::split(more, stream));
        }
    }
    MOE_CUDA_CHECK(sm90::split(p, stream));
    return out;
}
/// The same below one another: [n · R, C].
Tensor parts_below(const Tensor& x_RC, std::initializer_list<int> which, cudaStream_t stream) {
    const int64_t R = x_RC.size(0), C = x_RC.size(1);
    return parts_beside(x_RC.view({1, R * C}), which, stream).view({int64_t(which.size()) * R, C});
}

/// y [T, O] fp32 = x bf16 [T, I] w fp32 [O, I]ᵀ.
void mixed_nt(const Tensor& x_TI, const Tensor& w_OI, Tensor y_TO, cudaStream_t stream) {
    Tensor parts_3OI = parts_below(w_OI, {0, 1, 2}, stream), y_T3O = at::empty({x_TI.size(0), parts_3OI.size(0)}, y_TO.options());
    multiply_on_gpu(x_TI, parts_3OI.t(), y_T3O);
    at::sum_out(y_TO, y_T3O.view({x_TI.size(0), 3, w_OI.size(0)}), {1});
}
/// dx [T, I] bf16 = dy fp32 [T, O] w fp32 [O, I]: the largest three of the nine products of parts leave an error of 2^-16, and dx has 2^-9.
void mixed_nn(const Tensor& dy_TO, const Tensor& w_OI, Tensor dx_TI, cudaStream_t stream) {
    multiply_on_gpu(parts_beside(dy_TO, {0, 0, 1}, stream), parts_below(w_OI, {0, 1, 0}, stream), dx_TI);
}
/// dw [O, I] fp32 += dy fp32 [T, O]ᵀ x bf16 [T, I], or = it.
void mixed_tn(const Tensor& dy_TO, const Tensor& x_TI, Tensor dw_OI, bool overwrite, cudaStream_t stream) {
    Tensor dw_3OI = at::empty({3 * dw_OI.size(0), dw_OI.size(1)}, dw_OI.options());
    multiply_on_gpu(parts_beside(dy_TO, {0, 1, 2}, stream).t(), x_TI, dw_3OI);
    Tensor parts = dw_3OI.view({3, dw_OI.size(0), dw_OI.size(1)});
    if (overwrite) at::sum_out(dw_OI, parts, {0});
    else dw_OI.add_(parts.sum(0));
}
}  // namespace

void product_nt_cuda(const Tensor& x_TI, const Tensor& w_OI, Tensor y_TO) {
    OnDevice on(x_TI);
    if (is_mixed(x_TI, w_OI) && y_TO.scalar_type() == at::kFloat && y_TO.numel() > 0) return mixed_nt(x_TI, w_OI, y_TO, on.stream);
    multiply_on_gpu(x_TI, w_OI.t(), y_TO);
}
void product_nn_cuda(const Tensor& dy_TO, const Tensor& w_OI, Tensor dx_TI) {
    OnDevice on(dy_TO);
    if (is_mixed(dx_TI, w_OI) && dy_TO.scalar_type() == at::kFloat && dx_TI.numel() > 0) return mixed_nn(dy_TO, w_OI, dx_TI, on.stream);
    multiply_on_gpu(dy_TO, w_OI, dx_TI);
}
void add_product_nn_cuda(const Tensor& dy_TO, const Tensor& w_OI, Tensor dx_TI) {
    OnDevice on(dy_TO);
    multiply_add_on_gpu(dy_TO, w_OI, dx_TI);
}
void add_product_tn_cuda(const Tensor& dy_TO, const Tensor& x_TI, Tensor dw_OI, bool overwrite) {
    OnDevice on(dy_TO);
    if (is_mixed(x_TI, dy_TO) && dw_OI.scalar_type() == at::kFloat && dw_OI.numel() > 0 && dy_TO.size(0) > 0) return mixed_tn(dy_TO, x_TI, dw_OI, overwrite, on.stream);
    (overwrite ? multiply_on_gpu : multiply_add_on_gpu)(dy_TO.t(), x_TI, dw_OI);
}

/// Whether the products of core/kernels/grouped take these: they want groups that start at whole tiles, and offsets on the device.
bool takes_tiles(const RowGroups& groups, const Tensor& w_EOI, const Tensor& dw_EOI = {}) {
    return groups.align % kGroupAlign == 0 && groups.offsets_E1.is_cuda() && grouped_fits(w_EOI, dw_EOI);
}

void grouped_product_nt_cuda(const Tensor& x_RI, const RowGroups& groups, const Tensor& w_EOI, Tensor y_RO) {
    OnDevice on(x_RI);
    if (y_RO.numel() == 0) return;
    if (is_bf16(x_RI) && takes_tiles(groups, w_EOI)) return grouped_nt(x_RI, groups.offsets_E1, w_EOI, y_RO);
    if (fits_grouped({x_RI, w_EOI, y_RO})) {
        check_limits(groups, x_RI);
        return grouped_into(x_RI, w_EOI.transpose(-2, -1), ends_on_device(groups, x_RI), y_RO);
    }
    each_group_on_gpu(groups, [&](int64_t e, int64_t lo, int64_t n) { multiply_on_gpu(x_RI.narrow(0, lo, n), w_EOI[e].t(), y_RO.narrow(0, lo, n)); });
}

void grouped_product_nn_cuda(const Tensor& dy_RO, const RowGroups& groups, const Tensor& w_EOI, Tensor dx_RI) {
    OnDevice on(dy_RO);
    if (dx_RI.numel() == 0) return;
    if (is_bf16(dy_RO) && takes_tiles(groups, w_EOI)) return grouped_nn(dy_RO, groups.offsets_E1, w_EOI, dx_RI);
    if (fits_grouped({dy_RO, w_EOI, dx_RI})) {
        check_limits(groups, dy_RO);
        return grouped_into(dy_RO, w_EOI, ends_on_device(groups, dy_RO), dx_RI);
    }
    each_group_on_gpu(groups, [&](int64_t e, int64_t lo, int64_t n) { multiply_on_gpu(dy_RO.narrow(0, lo, n), w_EOI[e], dx_RI.narrow(0, lo, n)); });
}

/// The library's grouped product writes bf16 parts, which are then added to the main gradient: all experts at once while the parts stay
/// below kPartBytes, else some at a time, for which the host must know their rows. The part of an expert without rows may be anything and
/// is skipped.
namespace {
void add_by_library(const Tensor& dy_RO, const Tensor& x_RI, const RowGroups& groups, Tensor dw_EOI, cudaStream_t stream) {
    if (!fits_grouped({dy_RO, x_RI})) {
        each_group_on_gpu(groups, [&](int64_t e, int64_t lo, int64_t n) { multiply_add_on_gpu(dy_RO.narrow(0, lo, n).t(), x_RI.narrow(0, lo, n), dw_EOI[e]); });
        return;
    }
    check_limits(groups, dy_RO);
    const int64_t E = dw_EOI.size(0), O = dw_EOI.size(1), I = dw_EOI.size(2), step = std::clamp<int64_t>(kPartBytes / (O * I * 2), 1, E);
    Tensor offsets = offsets_on_device(groups, dy_RO), on_host = step < E ? groups.offsets_E1.to(at::kCPU, at::kLong) : Tensor(), part_GOI = at::empty({step, O, I}, dy_RO.options());
    for (int64_t first = 0; first < E; first += step) {
        const int64_t count = std::min(step, E - first);
        const int64_t lo = step < E ? on_host.const_data_ptr<int64_t>()[first] : 0, rows = step < E ? on_host.const_data_ptr<int64_t>()[first + count] - lo : dy_RO.size(0);
        if (rows == 0) continue;
        Tensor ends = offsets.narrow(0, first + 1, count), part = part_GOI.narrow(0, 0, count);
        if (lo > 0) ends = at::sub(ends, lo);
        grouped_into(dy_RO.narrow(0, lo, rows).t(), x_RI.narrow(0, lo, rows), ends, part);
        sm90::AddGroups p{};
        p.groups = count, p.size = O * I, p.ends = ends.const_data_ptr<int>(), p.part = in_pointer(part);
        p.sum = static_cast<char*>(dw_EOI.mutable_data_ptr()) + first * O * I * dw_EOI.element_size(), p.sum_dtype = sm90_dtype("grouped_linear", dw_EOI);
        MOE_CUDA_CHECK(sm90::add_groups(p, stream));
    }
}
}  // namespace

Tensor add_grouped_product_tn_cuda(const Tensor& dy_RO, const Tensor& x_RI, const RowGroups& groups, Tensor dw_EOI, bool overwrite) {
    OnDevice on(dy_RO);
    if (dw_EOI.numel() == 0) return {};
    const bool tiles = dy_RO.size(0) > 0 && is_bf16(dy_RO) && is_bf16(x_RI) && takes_tiles(groups, {}, dw_EOI);
    if (tiles && overwrite) return grouped_tn(dy_RO, x_RI, groups.offsets_E1, dw_EOI);
    if (overwrite) dw_EOI.zero_();
    if (tiles) add_grouped_tn(dy_RO, x_RI, groups.offsets_E1, dw_EOI);
    else if (dy_RO.size(0) > 0) add_by_library(dy_RO, x_RI, groups, dw_EOI, on.stream);
    return {};
}

namespace {
/// Offsets on the device, undefined where there are none.
Tensor tile_offsets(const RowGroups& groups, const Tensor& like) {
    if (!groups.offsets_E1.defined()) return {};
    MOE_CHECK(groups.align % kGroupAlign == 0, shape, "grouped_linear: align", std::to_string(groups.align), fmt::format("a multiple of {} for products in fp8", kGroupAlign), "sort_by_expert makes such groups");
    return offsets_on_device(groups, like);
}
}  // namespace

void fp8_product_nt_cuda(const QuantizedRows& x_RI, const RowGroups& groups, const QuantizedWeight& w_EOI, Tensor y_RO) {
    OnDevice on(y_RO);
    if (y_RO.numel() > 0) grouped_nt_fp8(x_RI, tile_offsets(groups, y_RO), w_EOI, y_RO);
}
void fp8_product_nn_cuda(const QuantizedRows& dy_RO, const RowGroups& groups, const QuantizedWeight& w_EOI, Tensor dx_RI) {
    OnDevice on(dx_RI);
    if (dx_RI.numel() > 0) grouped_nn_fp8(dy_RO, tile_offsets(groups, dx_RI), w_EOI, dx_RI);
}
}  // namespace moe::kernels
#endif
