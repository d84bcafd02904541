#include "core/kernels/mla_decode/mla_decode.h"

#include "core/kernels/common/dispatch.h"
#include "core/kernels/common/dtype.h"
#include "core/kernels/mla_decode/mla_decode_kernels.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <cmath>

namespace moe::kernels {
namespace {
void check_widths(std::string_view op, LatentCache::Format format, int64_t latent, int64_t rope) {
    const bool fp8 = format == LatentCache::Format::fp8;
    MOE_CHECK(latent > 0 && rope >= 0, shape, fmt::format("{}: cache widths", op), fmt::format("latent {}, rope {}", latent, rope), "latent above 0, rope 0 or more", "");
    MOE_CHECK(!fp8 || latent % 128 == 0, shape, fmt::format("{}: latent width of an fp8 cache", op), std::to_string(latent), "a multiple of 128", "128 values share a scale");
}

/// The cache's own tensors, and that they lie on x's device.
void check_cache(std::string_view op, const LatentCache& cache, Named x) {
    const bool fp8 = cache.format == LatentCache::Format::fp8;
    check_widths(op, cache.format, cache.latent, cache.rope);
    Named rows{"cache.rows", cache.rows}, table{"cache.block_table", cache.block_table};
    check_shape(op, rows, {-1, kCacheBlock, fp8 ? cache_row_bytes(cache.latent, cache.rope) : cache.latent + cache.rope});
    check_contiguous(op, rows);
    if (fp8) check_dtype(op, rows, {at::kByte});
    else check_float(op, rows);
    check_dims(op, table, 2);
    check_dtype(op, table, {at::kInt});
    check_contiguous(op, table);
    check_same_device(op, x, rows);
    check_same_device(op, x, table);
}

/// int32 [n], contiguous, on x's device.
void check_ints(std::string_view op, Named t, int64_t n, Named x) {
    check_shape(op, t, {n});
    check_dtype(op, t, {at::kInt});
    check_contiguous(op, t);
    check_same_device(op, x, t);
}

/// x with a contiguous last dim.
Tensor with_rows(const Tensor& x) { return x.numel() == 0 || x.stride(-1) == 1 || x.size(-1) == 1 ? x : x.contiguous(); }
}  // namespace

int64_t cache_row_bytes(int64_t latent, int64_t rope) { return latent + latent / 128 * 4 + rope * 2; }

Tensor make_cache_rows(LatentCache::Format format, int64_t num_blocks, int64_t latent, int64_t rope, at::ScalarType dtype, at::Device device) {
    check_widths("make_cache_rows", format, latent, rope);
    MOE_CHECK(num_blocks >= 0, shape, "make_cache_rows: num_blocks", std::to_string(num_blocks), "0 or more", "");
    const bool fp8 = format == LatentCache::Format::fp8;
    return at::zeros({num_blocks, kCacheBlock, fp8 ? cache_row_bytes(latent, rope) : latent + rope}, at::TensorOptions().dtype(fp8 ? at::kByte : dtype).device(device));
}

MlaDecoded mla_decode(const Tensor& q_latent, const Tensor& q_rope, const LatentCache& cache, const Tensor& lengths, double scale) {
    constexpr const char* op = "mla_decode";
    Named q{"q_latent", q_latent};
    check_dims(op, q, 4);
    check_float(op, q);
    const int64_t B = q_latent.size(0), Q = q_latent.size(1), H = q_latent.size(2), L = q_latent.size(3);
    check_cache(op, cache, q);
    check_shape(op, q, {B, Q, H, cache.latent});
    check_shape(op, {"q_rope", q_rope}, {B, Q, H, cache.rope});
    check_same_dtype(op, q, {"q_rope", q_rope});
    check_same_device(op, q, {"q_rope", q_rope});
    if (cache.format == LatentCache::Format::plain) check_same_dtype(op, q, {"cache.rows", cache.rows});
    check_shape(op, {"cache.block_table", cache.block_table}, {B, -1});
    check_ints(op, {"lengths", lengths}, B, q);
    MOE_CHECK(std::isfinite(scale) && scale > 0, usage, "mla_decode: scale", fmt::format("{}", scale), "above 0 and finite", "(nope + rope)^-0.5, times YaRN's correction");

    at::NoGradGuard no_grad;
    MlaDecoded result{at::empty({B, Q, H, L}, q_latent.options()), at::empty({B, Q, H}, q_latent.options().dtype(wide_dtype(q_latent)))};
    if (B * Q * H == 0) return result;
    Tensor latent = with_rows(q_latent).reshape({B * Q, H, L}), rope = with_rows(q_rope).reshape({B * Q, H, cache.rope});
    MOE_BY_DEVICE(op, q_latent, mla_decode, latent, rope, cache, lengths, scale, result.out, result.lse);
    return result;
}

void append_latent(const LatentCache& cache, const Tensor& latent_TL, const Tensor& rope_TR, const Tensor& sequence_T, const Tensor& position_T) {
    constexpr const char* op = "append_latent";
    Named latent{"latent", latent_TL};
    check_dims(op, latent, 2);
    check_float(op, latent);
    check_cache(op, cache, latent);
    const int64_t T = latent_TL.size(0);
    check_shape(op, latent, {T, cache.latent});
    check_shape(op, {"rope", rope_TR}, {T, cache.rope});
    check_same_dtype(op, latent, {"rope", rope_TR});
    check_same_device(op, latent, {"rope", rope_TR});
    if (cache.format == LatentCache::Format::plain) check_same_dtype(op, latent, {"cache.rows", cache.rows});
    check_ints(op, {"sequence", sequence_T}, T, latent);
    check_ints(op, {"position", position_T}, T, latent);
    if (T == 0) return;
    at::NoGradGuard no_grad;
    MOE_BY_DEVICE(op, latent_TL, append_latent, cache, with_rows(latent_TL), with_rows(rope_TR), sequence_T, position_T);
}
}  // namespace moe::kernels
