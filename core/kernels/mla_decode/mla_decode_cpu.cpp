// On the CPU: a task is a sequence and up to eight of its query rows, blocks of the cache one after another, with a running maximum. Rows do not share sums, so
// results do not depend on the number of threads. D = L + R.
#include "core/kernels/mla_decode/mla_decode_kernels.h"

#include "core/kernels/common/dtype.h"
#include "core/kernels/common/parallel.h"
#include "core/kernels/common/vector.h"

#include <c10/util/Float8_e4m3fn.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

namespace moe::kernels {
namespace {
constexpr int64_t kScaleGroup = 128, kRowsTogether = 8;
constexpr float kLargestE4m3 = 448;

/// Where the rows of one sequence lie; checks what the device version cannot.
struct LatentRows {
    const LatentCache& cache;
    int64_t b;

    int64_t blocks() const { return cache.block_table.size(1); }
    /// Row of the whole cache that holds token t.
    int64_t at(int64_t t) const {
        const int64_t block = data<int32_t>(cache.block_table)[b * blocks() + t / kCacheBlock];
        MOE_CHECK(block >= 0 && block < cache.rows.size(0), shape, fmt::format("latent cache: block_table[{}][{}]", b, t / kCacheBlock), std::to_string(block),
                  fmt::format("in [0, {})", cache.rows.size(0)), "");
        return block * kCacheBlock + t % kCacheBlock;
    }
};

/// Tokens t0 … t0 + n of one block as numbers: the cache itself where it holds them, else a copy in `buffer` [64, D].
template <class T, class A> const A* numbers(const LatentRows& rows, int64_t t0, int64_t n, std::vector<A>& buffer) {
    const LatentCache& cache = rows.cache;
    const int64_t L = cache.latent, R = cache.rope, D = L + R, row = rows.at(t0);
    if (cache.format == LatentCache::Format::plain) {
        const T* x = data<T>(cache.rows) + row * D;
        if constexpr (std::is_same_v<T, A>) return x;
        buffer.resize(kCacheBlock * D);
        for (int64_t i = 0; i < n * D; ++i) buffer[i] = A(x[i]);
        return buffer.data();
    }
    buffer.resize(kCacheBlock * D);
    const int64_t bytes = cache_row_bytes(L, R);
    const uint8_t* x = data<uint8_t>(cache.rows) + row * bytes;
    for (int64_t t = 0; t < n; ++t, x += bytes) {
        A* y = buffer.data() + t * D;
        for (int64_t d = 0; d < L; ++d) {
            float scale;
            std::memcpy(&scale, x + L + d / kScaleGroup * 4, 4);
            y[d] = A(float(c10::Float8_e4m3fn(x[d], c10::Float8_e4m3fn::from_bits()))) * A(scale);
        }
        for (int64_t d = 0; d < R; ++d) {
            at::BFloat16 r;
            std::memcpy(&r, x + L + L / kScaleGroup * 4 + 2 * d, 2);
            y[L + d] = A(float(r));
        }
    }
    return buffer.data();
}

template <class T> struct Task {
    using A = Acc<T>;
    const Tensor &q_latent, &q_rope;
    const LatentCache& cache;
    double scale;
    int64_t Q, H, L, D, b, r0, n, length;           ///< query rows r0 … r0 + n of sequence b

    /// [D, n], scaled.
    std::vector<A> queries() const {
        std::vector<A> q(D * n);
        for (int64_t i = 0; i < n; ++i) {
            const int64_t token = b * Q + (r0 + i) / H, head = (r0 + i) % H;
            const T* latent = data<T>(q_latent) + token * q_latent.stride(0) + head * q_latent.stride(1);
            const T* rope = D > L ? data<T>(q_rope) + token * q_rope.stride(0) + head * q_rope.stride(1) : nullptr;
            for (int64_t d = 0; d < D; ++d) q[d * n + i] = A(d < L ? latent[d] : rope[d - L]) * A(scale);
        }
        return q;
    }
    /// The row's scores s [count, n] (column i) become e^(score − maximum); a new maximum scales what was added up before.
    void weights(int64_t i, int64_t count, A* s, A& top, A& sum, A* o) const {
        A above = top;
        for (int64_t t = 0; t < count; ++t) above = std::max(above, s[t * n + i]);
        if (above > top) {
            const A keep = top == -std::numeric_limits<A>::infinity() ? A(0) : std::exp(top - above);
            for (int64_t d = 0; d < L; ++d) o[d] *= keep;
            sum *= keep;
            top = above;
        }
        for (int64_t t = 0; t < count; ++t) sum += s[t * n + i] = std::exp(s[t * n + i] - top);
    }
    void run(T* out, A* lse) const {
        const std::vector<A> q = queries();
        std::vector<A> buffer, s(kCacheBlock * n), o(n * L), top(n, -std::numeric_limits<A>::infinity()), sum(n);
        for (int64_t t0 = 0; t0 < length; t0 += kCacheBlock) {
            const int64_t tokens = std::min(kCacheBlock, length - t0);
            const A* rows = numbers<T>(LatentRows{cache, b}, t0, tokens, buffer);
            product(tokens, n, D, rows, D, int64_t(1), q.data(), n, s.data(), n, false);
            for (int64_t i = 0; i < n; ++i) {
                const int64_t seen = std::clamp<int64_t>(length - Q + 1 + (r0 + i) / H - t0, 0, tokens);
                weights(i, seen, s.data(), top[i], sum[i], o.data() + i * L);
                for (int64_t t = seen; t < tokens; ++t) s[t * n + i] = 0;
            }
            product(n, L, tokens, s.data(), int64_t(1), n, rows, D, o.data(), L, true);
        }
        for (int64_t i = 0; i < n; ++i) {
            const int64_t row = b * Q * H + r0 + i;
            const bool nothing = sum[i] == 0;           // a NaN is something
            for (int64_t d = 0; d < L; ++d) out[row * L + d] = T(nothing ? A(0) : o[i * L + d] / sum[i]);
            lse[row] = nothing ? -std::numeric_limits<A>::infinity() : top[i] + std::log(sum[i]);
        }
    }
};

/// One token's row of an fp8 cache.
template <class T> void write_fp8(const T* latent, const T* rope, int64_t L, int64_t R, uint8_t* to) {
    for (int64_t d0 = 0; d0 < L; d0 += kScaleGroup) {
        float top = 0;
        for (int64_t d = d0; d < d0 + kScaleGroup; ++d) top = std::max(top, std::abs(float(latent[d])));
        const float scale = std::max(top / kLargestE4m3, std::numeric_limits<float>::min());
        for (int64_t d = d0; d < d0 + kScaleGroup; ++d) to[d] = c10::Float8_e4m3fn(float(latent[d]) / scale).x;
        std::memcpy(to + L + d0 / kScaleGroup * 4, &scale, 4);
    }
    for (int64_t d = 0; d < R; ++d) {
        const at::BFloat16 r = float(rope[d]);
        std::memcpy(to + L + L / kScaleGroup * 4 + 2 * d, &r, 2);
    }
}
}  // namespace

void mla_decode_cpu(const Tensor& q_latent, const Tensor& q_rope, const LatentCache& cache, const Tensor& lengths, double scale, Tensor out, Tensor lse) {
    const int64_t B = lengths.size(0), Q = q_latent.size(0) / B, H = q_latent.size(1), L = cache.latent, most = cache.block_table.size(1) * kCacheBlock;
    auto* length = data<int32_t>(lengths);
    for (int64_t b = 0; b < B; ++b) {
        MOE_CHECK(length[b] >= 0 && length[b] <= most, shape, fmt::format("mla_decode: lengths[{}]", b), std::to_string(length[b]), fmt::format("in [0, {}]", most),
                  "block_table has an entry for 64 tokens");
        for (int64_t t = 0; t < length[b]; t += kCacheBlock) LatentRows{cache, b}.at(t);        // here, not on a pool's thread
    }
    const int64_t groups = (Q * H + kRowsTogether - 1) / kRowsTogether;
    by_dtype("mla_decode", q_latent, [&](auto zero) {
        using T = decltype(zero);
        auto* o = mutable_data<T>(out);
        auto* l = mutable_data<Acc<T>>(lse);
        share_out(B * groups, [&](auto take) {
            for (int64_t i = take(); i < B * groups; i = take()) {
                const int64_t b = i / groups, r0 = i % groups * kRowsTogether;
                Task<T>{q_latent, q_rope, cache, scale, Q, H, L, L + cache.rope, b, r0, std::min(kRowsTogether, Q * H - r0), length[b]}.run(o, l);
            }
        });
    });
}

void append_latent_cpu(const LatentCache& cache, const Tensor& latent_TL, const Tensor& rope_TR, const Tensor& sequence_T, const Tensor& position_T) {
    const int64_t L = cache.latent, R = cache.rope, B = cache.block_table.size(0), most = cache.block_table.size(1) * kCacheBlock;
    auto *sequence = data<int32_t>(sequence_T), *position = data<int32_t>(position_T);
    by_dtype("append_latent", latent_TL, [&](auto zero) {
        using T = decltype(zero);
        for (int64_t t = 0; t < latent_TL.size(0); ++t) {
            if (sequence[t] < 0 || position[t] < 0) continue;
            MOE_CHECK(sequence[t] < B && position[t] < most, shape, fmt::format("append_latent: token {}", t), fmt::format("sequence {}, position {}", sequence[t], position[t]),
                      fmt::format("a sequence in [0, {}), a position in [0, {})", B, most), "");
            const int64_t row = LatentRows{cache, sequence[t]}.at(position[t]);
            const T *latent = data<T>(latent_TL) + t * latent_TL.stride(0), *rope = R ? data<T>(rope_TR) + t * rope_TR.stride(0) : nullptr;
            if (cache.format == LatentCache::Format::fp8) {
                write_fp8(latent, rope, L, R, static_cast<uint8_t*>(cache.rows.mutable_data_ptr()) + row * cache_row_bytes(L, R));
            } else {
                T* to = static_cast<T*>(cache.rows.mutable_data_ptr()) + row * (L + R);
                std::copy_n(latent, L, to);
                std::copy_n(rope, R, to + L);
            }
        }
    });
}
}  // namespace moe::kernels
