// Products on the CPU: MKL's, through ATen. Operands of another dtype are cast up first, exactly; bf16 ones only where the processor has no bf16 products.
#include "core/kernels/linear/linear_kernels.h"

#include "core/kernels/common/dtype.h"
#include "core/kernels/common/parallel.h"
#include "core/kernels/common/vector.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

/// MKL's, in LibTorch: c = a b + beta c of bf16 a and b; fp32 sums and result. Row-major is 101, as is 111, transposed 112.
extern "C" void cblas_gemm_bf16bf16f32(int layout, int transpose_a, int transpose_b, int m, int n, int k, float alpha, const void* a, int lda, const void* b, int ldb, float beta, float* c, int ldc);

namespace moe::kernels {
namespace {
constexpr int64_t kMostInt = std::numeric_limits<int>::max();

/// A matrix as BLAS wants it: rows of adjacent numbers, or columns, and their distance, which is no less than their length even where there is only one.
struct BlasMatrix {
    explicit BlasMatrix(const Tensor& t) : matrix(t) {
        if (!lies(0) && !lies(1)) matrix = t.contiguous();
        transposed = !lies(0);
        int along = transposed ? 1 : 0;
        ld = matrix.size(along) > 1 ? matrix.stride(along) : std::max<int64_t>(1, matrix.size(1 - along));
    }
    /// Whether rows (0) or columns (1) are adjacent numbers and do not overlap.
    bool lies(int along) const {
        int64_t length = matrix.size(1 - along);
        return (length <= 1 || matrix.stride(1 - along) == 1) && (matrix.size(along) <= 1 || matrix.stride(along) >= std::max<int64_t>(1, length));
    }
    Tensor matrix;
    bool transposed = false;
    int64_t ld = 1;
};

/// Whether a and b are multiplied as they are, in bf16.
bool in_bf16(const Tensor& a, const Tensor& b) { return a.scalar_type() == at::kBFloat16 && b.scalar_type() == at::kBFloat16 && has_bf16_products(); }

/// The object file that answers MKL's processor check is linked because of this reference.
[[maybe_unused]] const bool kMklSwitch = mkl_switch_active();

at::ScalarType product_dtype(const Tensor& a, const Tensor& b) {
    return a.scalar_type() == at::kDouble || b.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

/// Whether the rows of a product are the same in every step. oneDNN makes a program for each shape and keeps the last thousand: where an expert's
/// rows change from step to step that costs more than the product.
enum class RowCount { steady, changing };

/// to = from, rounded row by row.
void round_to_bf16(const Tensor& from_MN, Tensor to_MN) {
    constexpr int64_t kGrain = 1 << 15;             // numbers
    int64_t N = from_MN.size(1);
    const float* from = from_MN.const_data_ptr<float>();
    auto* to = to_MN.mutable_data_ptr<at::BFloat16>();
    at::parallel_for(0, from_MN.size(0), 1 + kGrain / std::max<int64_t>(1, N), [&, stride = to_MN.stride(0)](int64_t lo, int64_t hi) {
        for (int64_t m = lo; m < hi; ++m)
            for (int64_t n = 0; n < N; ++n) to[m * stride + n] = rounded<at::BFloat16>(from[m * N + n]);
    });
}

/// out = a b.
void multiply(const Tensor& a, const Tensor& b, Tensor out, RowCount rows) {
    bool bf16 = in_bf16(a, b), bf16_out = out.scalar_type() == at::kBFloat16;
    if (bf16 && out.scalar_type() == at::kFloat) return bf16_product(a, b, out, false);
    if (bf16 && bf16_out && rows == RowCount::changing && out.stride(1) == 1) {
        Tensor sums = at::empty(out.sizes(), out.options().dtype(at::kFloat));
        bf16_product(a, b, sums, false);
        return round_to_bf16(sums, out);
    }
    auto dtype = bf16 && bf16_out ? at::kBFloat16 : product_dtype(a, b);
    if (out.scalar_type() == dtype) at::mm_out(out, a.to(dtype), b.to(dtype));
    else out.copy_(at::mm(a.to(dtype), b.to(dtype)));
}

/// out += a b, added in the wider of the product's dtype and out's; a bf16 sum is rounded once.
void multiply_add(const Tensor& a, const Tensor& b, Tensor out) {
    if (in_bf16(a, b)) {
        Tensor sum = out.scalar_type() == at::kFloat ? out : at::empty(out.sizes(), out.options().dtype(at::kFloat));
        bf16_product(a, b, sum, sum.is_same(out));
        if (!sum.is_same(out)) out.add_(sum);
        return;
    }
    auto dtype = product_dtype(a, b);
    if (out.scalar_type() == dtype) at::addmm_out(out, out, a.to(dtype), b.to(dtype));
    else out.add_(at::mm(a.to(dtype), b.to(dtype)));
}

/// f(e, first row, rows) of every group that has rows: where there are enough of them and none has most of the rows, each on one
/// thread (MKL's own threads would meet after every product), else one after the other, each on all threads.
template <class F> void each_group(const RowGroups& groups, F f) {
    constexpr int64_t kGroupsPerThread = 4;         // fewer would leave threads idle at the end
    const int64_t *offset = groups.offsets_E1.const_data_ptr<int64_t>(), count = groups.size(), threads = at::get_num_threads();
    auto rows = [&](int64_t e) { return offset[e + 1] - offset[e]; };
    int64_t filled = 0, largest = 0;
    for (int64_t e = 0; e < count; ++e) {
        filled += rows(e) > 0;
        largest = std::max(largest, rows(e));
    }
    auto one = [&](int64_t e) {
        if (rows(e) > 0) f(e, offset[e], rows(e));
    };
    if (filled < kGroupsPerThread * threads || largest * threads > offset[count] - offset[0]) {
        for (int64_t e = 0; e < count; ++e) one(e);
        return;
    }
    std::vector<int64_t> order(static_cast<size_t>(count));       // the largest first: threads then end at about the same time
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return rows(a) > rows(b); });
    share_out(count, [&](auto take) {
        at::AutoDispatchBelowADInplaceOrView guard;  // grad mode is a thread's own, and the pool's threads have it on
        for (int64_t i; (i = take()) < count;) one(order[size_t(i)]);
    });
}
}  // namespace

bool has_bf16_products() {
    static const bool has = __builtin_cpu_supports("avx512bf16");
    return has;
}

void bf16_product(const Tensor& a_MK, const Tensor& b_KN, Tensor out_MN, bool add) {
    int64_t M = a_MK.size(0), K = a_MK.size(1), N = b_KN.size(1);
    BlasMatrix a(a_MK), b(b_KN), out(out_MN);
    bool fits = out.matrix.is_same(out_MN) && !out.transposed && std::max({M, N, K, a.ld, b.ld, out.ld}) <= kMostInt;
    if (!fits || M * N * K == 0) {
        Tensor product = at::mm(a_MK.to(at::kFloat), b_KN.to(at::kFloat));
        add ? out_MN.add_(product) : out_MN.copy_(product);
        return;
    }
    constexpr int kRows = 101, kAsIs = 111, kTransposed = 112;
    cblas_gemm_bf16bf16f32(kRows, a.transposed ? kTransposed : kAsIs, b.transposed ? kTransposed : kAsIs, int(M), int(N), int(K), 1, a.matrix.const_data_ptr(), int(a.ld), b.matrix.const_data_ptr(), int(b.ld),
                           add ? 1.0f : 0.0f, out_MN.mutable_data_ptr<float>(), int(out.ld));
}

void product_nt_cpu(const Tensor& x_TI, const Tensor& w_OI, Tensor y_TO) { multiply(x_TI, w_OI.t(), y_TO, RowCount::steady); }
void product_nn_cpu(const Tensor& dy_TO, const Tensor& w_OI, Tensor dx_TI) { multiply(dy_TO, w_OI, dx_TI, RowCount::steady); }
void add_product_nn_cpu(const Tensor& dy_TO, const Tensor& w_OI, Tensor dx_TI) { multiply_add(dy_TO, w_OI, dx_TI); }
void add_product_tn_cpu(const Tensor& dy_TO, const Tensor& x_TI, Tensor dw_OI, bool overwrite) {
    overwrite ? multiply(dy_TO.t(), x_TI, dw_OI, RowCount::steady) : multiply_add(dy_TO.t(), x_TI, dw_OI);
}

void grouped_product_nt_cpu(const Tensor& x_RI, const RowGroups& groups, const Tensor& w_EOI, Tensor y_RO) {
    each_group(groups, [&](int64_t e, int64_t lo, int64_t n) { multiply(x_RI.narrow(0, lo, n), w_EOI.select(0, e).t(), y_RO.narrow(0, lo, n), RowCount::changing); });
}
void grouped_product_nn_cpu(const Tensor& dy_RO, const RowGroups& groups, const Tensor& w_EOI, Tensor dx_RI) {
    each_group(groups, [&](int64_t e, int64_t lo, int64_t n) { multiply(dy_RO.narrow(0, lo, n), w_EOI.select(0, e), dx_RI.narrow(0, lo, n), RowCount::changing); });
}
Tensor add_grouped_product_tn_cpu(const Tensor& dy_RO, const Tensor& x_RI, const RowGroups& groups, Tensor dw_EOI, bool overwrite) {
    const int64_t* offset = groups.offsets_E1.const_data_ptr<int64_t>();
    for (int64_t e = 0; overwrite && e < groups.size(); ++e)
        if (offset[e] == offset[e + 1]) dw_EOI.select(0, e).zero_();
    each_group(groups, [&](int64_t e, int64_t lo, int64_t n) {
        Tensor dy = dy_RO.narrow(0, lo, n).t(), x = x_RI.narrow(0, lo, n), dw = dw_EOI.select(0, e);
        overwrite ? multiply(dy, x, dw, RowCount::changing) : multiply_add(dy, x, dw);
    });
    return {};
}

void fp8_product_nt_cpu(const QuantizedRows& x_RI, const RowGroups& groups, const QuantizedWeight& w_EOI, Tensor y_RO) {
    Tensor x = dequantize_rows(x_RI), w = dequantize_weight(w_EOI);
    groups.offsets_E1.defined() ? grouped_product_nt_cpu(x, groups, w, y_RO) : product_nt_cpu(x, w.select(0, 0), y_RO);
}
void fp8_product_nn_cpu(const QuantizedRows& dy_RO, const RowGroups& groups, const QuantizedWeight& w_EOI, Tensor dx_RI) {
    Tensor dy = dequantize_rows(dy_RO), w = dequantize_weight(w_EOI);
    groups.offsets_E1.defined() ? grouped_product_nn_cpu(dy, groups, w, dx_RI) : product_nn_cpu(dy, w.select(0, 0), dx_RI);
}
}  // namespace moe::kernels
