// exp, rounding and a product in registers that the compiler turns into vector code of the machine's width.
#pragma once
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>

namespace moe::kernels {
/// e^x for float within 2 ulp, x clamped to [−87, 87]; a NaN stays one. Source: Cody and Waite's reduction, Cephes' polynomial
/// (Moshier). The clamp and the NaN go through the bits: comparisons of floats become branches that the compiler follows to
/// the end of a loop's body, and the vector code then computes every way and blends.
inline float vexp(float x) {
    constexpr int kSign = int(0x80000000), k87 = 0x42ae0000, kInf = 0x7f800000;
    int bits = std::bit_cast<int>(x), size = bits & ~kSign, nan = -int(size > kInf);
    x = std::bit_cast<float>((bits & kSign) | std::min(size, k87));
    float n = std::floor(x * 1.44269504f + 0.5f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return std::bit_cast<float>(nan | std::bit_cast<int>(p * std::bit_cast<float>((int(n) + 127) << 23)));
}
inline double vexp(double x) { return std::exp(x); }

/// x in T. For bf16 to nearest, ties to even, as c10 does, but without the branch for NaN that keeps a loop out of vector code.
template <class T, class A> T rounded(A x) {
    if constexpr (std::is_same_v<T, c10::BFloat16>) {
        auto bits = std::bit_cast<uint32_t>(float(x));
        uint32_t nan = -uint32_t((bits & 0x7fffffff) > 0x7f800000), nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        return T(uint16_t((nearest & ~nan) | (0x7fc0 & nan)), T::from_bits());
    } else {
        return T(x);
    }
}

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
/// A tile holds kTileRows x kTileVectors accumulators: 6 x 4 of AVX-512's 32 registers, 6 x 2 of the 16 of older ones.
constexpr int kTileRows = 6, kTileVectors = kVectorBytes == 64 ? 4 : 2;

template <class T> struct VectorOf { typedef T type __attribute__((vector_size(kVectorBytes), aligned(4), may_alias)); };
template <class T> constexpr int64_t kLanes = kVectorBytes / int64_t(sizeof(T));

/// The largest of x[0 … n), n > 0. A reduction over max is left in scalars by the compiler, which may not reorder NaNs.
template <class T> T largest(const T* x, int64_t n) {
    using V = typename VectorOf<T>::type;
    constexpr int64_t W = kLanes<T>;
    T top = x[0];
    int64_t j = 0;
    if (n >= W) {
        V tops = *reinterpret_cast<const V*>(x);
        for (j = W; j + W <= n; j += W) {
            V next = *reinterpret_cast<const V*>(x + j);
            tops = next > tops ? next : tops;
        }
        for (int64_t i = 0; i < W; ++i) top = std::max(top, T(tops[i]));
    }
    for (; j < n; ++j) top = std::max(top, x[j]);
    return top;
}

/// C [MR, NR vectors] (+)= A [MR, K] B [K, NR vectors], all of C in registers.
template <class T, int MR, int NR> void tile(int64_t K, const T* A, int64_t am, int64_t ak, const T* B, int64_t ldb, T* C, int64_t ldc, bool add) {
    using V = typename VectorOf<T>::type;
    constexpr int64_t W = kLanes<T>;
    V c[MR][NR];
    for (int m = 0; m < MR; ++m)
        for (int n = 0; n < NR; ++n) c[m][n] = add ? *reinterpret_cast<const V*>(C + m * ldc + n * W) : V{};
    for (int64_t k = 0; k < K; ++k) {
        V b[NR];
        for (int n = 0; n < NR; ++n) b[n] = *reinterpret_cast<const V*>(B + k * ldb + n * W);
        for (int m = 0; m < MR; ++m) {
            T a = A[m * am + k * ak];
            for (int n = 0; n < NR; ++n) c[m][n] += a * b[n];
        }
    }
    for (int m = 0; m < MR; ++m)
        for (int n = 0; n < NR; ++n) *reinterpret_cast<V*>(C + m * ldc + n * W) = c[m][n];
}

/// One column strip of NR vectors, all rows.
template <class T, int NR> void strip(int64_t M, int64_t K, const T* A, int64_t am, int64_t ak, const T* B, int64_t ldb, T* C, int64_t ldc, bool add) {
    int64_t m = 0;
    for (; m + kTileRows <= M; m += kTileRows) tile<T, kTileRows, NR>(K, A + m * am, am, ak, B, ldb, C + m * ldc, ldc, add);
    for (; m + 4 <= M; m += 4) tile<T, 4, NR>(K, A + m * am, am, ak, B, ldb, C + m * ldc, ldc, add);
    for (; m + 2 <= M; m += 2) tile<T, 2, NR>(K, A + m * am, am, ak, B, ldb, C + m * ldc, ldc, add);
    for (; m < M; ++m) tile<T, 1, NR>(K, A + m * am, am, ak, B, ldb, C + m * ldc, ldc, add);
}

/// The last columns, fewer than a vector: through padded copies.
template <class T> void last_columns(int64_t M, int64_t left, int64_t K, const T* A, int64_t am, int64_t ak, const T* B, int64_t ldb, T* C, int64_t ldc, bool add) {
    constexpr int64_t W = kLanes<T>, kDepth = 64, kHeight = 96;
    alignas(64) T b[kDepth * W] = {}, c[kHeight * W];
    for (int64_t k = 0; k < K; k += kDepth) {
        int64_t depth = std::min(kDepth, K - k);
        for (int64_t i = 0; i < depth; ++i) std::copy_n(B + (k + i) * ldb, left, b + i * W);
        for (int64_t m = 0; m < M; m += kHeight) {
            int64_t height = std::min(kHeight, M - m);
            strip<T, 1>(height, depth, A + m * am + k * ak, am, ak, b, W, c, W, false);
            for (int64_t i = 0; i < height; ++i)
                for (int64_t j = 0; j < left; ++j) {
                    T& to = C[(m + i) * ldc + j];
                    to = c[i * W + j] + (add || k > 0 ? to : T(0));
                }
        }
    }
}

/// C [M, N] (+)= A [M, K] B [K, N] on one thread: A[m, k] at A + m·am + k·ak, rows of B and C contiguous, ldb and ldc apart.
/// K must be above 0. For operands that fit the cache.
template <class T> void product(int64_t M, int64_t N, int64_t K, const T* A, int64_t am, int64_t ak, const T* B, int64_t ldb, T* C, int64_t ldc, bool add) {
    constexpr int64_t W = kLanes<T>;
    int64_t n = 0;
    if constexpr (kTileVectors == 4) {
        for (; n + 4 * W <= N; n += 4 * W) strip<T, 4>(M, K, A, am, ak, B + n, ldb, C + n, ldc, add);
        for (; n + 3 * W <= N; n += 3 * W) strip<T, 3>(M, K, A, am, ak, B + n, ldb, C + n, ldc, add);
    }
    for (; n + 2 * W <= N; n += 2 * W) strip<T, 2>(M, K, A, am, ak, B + n, ldb, C + n, ldc, add);
    for (; n + W <= N; n += W) strip<T, 1>(M, K, A, am, ak, B + n, ldb, C + n, ldc, add);
    if (n < N) last_columns(M, N - n, K, A, am, ak, B + n, ldb, C + n, ldc, add);
}
}  // namespace moe::kernels
