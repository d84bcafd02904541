// One element of a step, for both passes: they must give the same bits.
#pragma once
#include "core/kernels/adamw/adamw_sm90.h"
#include "core/kernels/common/device_sm90.cuh"

namespace moe::kernels::sm90 {
/// AdamWRule in the master's dtype.
template <class T> struct AdamWFactors {
    T scale, pull, beta1, rest1, beta2, rest2, keep, rate, root, eps;
    explicit AdamWFactors(const AdamWRule& r)
        : scale(T(r.scale)), pull(T(r.pull)), beta1(T(r.beta1)), rest1(1 - T(r.beta1)), beta2(T(r.beta2)), rest2(1 - T(r.beta2)), keep(T(r.keep)), rate(T(r.rate)), root(T(r.root)), eps(T(r.eps)) {}
};

__device__ inline float root_of(float x) { return sqrtf(x); }
__device__ inline double root_of(double x) { return sqrt(x); }

template <class T> __device__ inline void adamw_step(const AdamWFactors<T>& f, T g, T& w, T& m, T& v) {
    const T grad = g * f.scale + w * f.pull;
    m = f.beta1 * m + f.rest1 * grad;
    v = f.beta2 * v + f.rest2 * grad * grad;
    w = w * f.keep - f.rate * m / (root_of(v) * f.root + f.eps);
}

/// As core/tensor/master.h joins and rounds.
__device__ inline float joined_master(unsigned short high, short rest) { return __uint_as_float((unsigned(high) << 16) + unsigned(int(rest))); }
__device__ inline void split_master(float x, unsigned short& high, short& rest) {
    const unsigned bits = isnan(x) ? 0x7FC00000u : __float_as_uint(x);
    high = (unsigned short)((bits + 0x8000u) >> 16);
    rest = short(bits & 0xFFFFu);
}
}  // namespace moe::kernels::sm90
