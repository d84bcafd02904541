#include "core/kernels/adamw/adamw_kernels.h"

#include "core/kernels/common/dtype.h"

#include <ATen/Parallel.h>

#include <bit>
#include <cmath>
#include <vector>

namespace moe::kernels {
namespace {
constexpr int64_t kGrain = 1 << 14;

/// Factors of one step, in the loop's dtype.
template <class T> struct Factors {
    T scale, pull, beta1, beta2, keep, rate, root, eps;
    explicit Factors(const AdamWOptions& o)
        : scale(T(o.grad_scale)), pull(T(o.decoupled ? 0 : o.weight_decay)), beta1(T(o.beta1)), beta2(T(o.beta2)), keep(T(o.decoupled ? 1 - o.lr * o.weight_decay : 1)),
          rate(T(o.lr / (1 - std::pow(o.beta1, double(o.step))))), root(T(1 / std::sqrt(1 - std::pow(o.beta2, double(o.step))))), eps(T(o.eps)) {}
};

template <class T, class G, class M> void adamw_range(T* p, const G* grad, M* m, M* v, const Factors<T>& f, int64_t n) {
    #pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        T g = T(grad[i]) * f.scale + p[i] * f.pull;
        T first = f.beta1 * T(m[i]) + (1 - f.beta1) * g;
        T second = f.beta2 * T(v[i]) + (1 - f.beta2) * g * g;
        p[i] = p[i] * f.keep - f.rate * first / (std::sqrt(second) * f.root + f.eps);
        m[i] = M(first);
        v[i] = M(second);
    }
}

template <class T> struct SgdFactors { T rate, momentum, decay, scale; };

template <class T, class G> void sgd_range(T* p, const G* grad, const SgdFactors<T>& f, int64_t n) {
    #pragma omp simd
    for (int64_t i = 0; i < n; ++i) p[i] -= f.rate * (f.scale * T(grad[i]) + f.decay * p[i]);
}
template <class T, class G, class M> void momentum_range(T* p, const G* grad, M* buffer, const SgdFactors<T>& f, int64_t n) {
    #pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        T d = f.momentum * T(buffer[i]) + (f.scale * T(grad[i]) + f.decay * p[i]);
        buffer[i] = M(d);
        p[i] -= f.rate * d;
    }
}

template <class T, class V> void copy_range(const T* from, V* to, int64_t lo, int64_t hi) {
    #pragma omp simd
    for (int64_t i = lo; i < hi; ++i) to[i] = V(from[i]);
}

constexpr int64_t kPiece = 1024;             // of split masters, joined on the stack

/// As core/tensor/master.h has it.
inline float joined(uint16_t high, int16_t rest) { return std::bit_cast<float>((uint32_t(high) << 16) + uint32_t(int32_t(rest))); }
inline uint32_t bits_of(float x) { return x != x ? 0x7FC00000u : std::bit_cast<uint32_t>(x); }

/// Calls change(masters, begin, end): elements [begin, end), masters[i - begin] for element i, in the master's dtype. Compute weights follow.
template <class Change> void over_masters(const Master& master, Change change) {
    if (master.is_split()) {
        auto* high = reinterpret_cast<uint16_t*>(mutable_data<at::BFloat16>(master.value));
        auto* rest = mutable_data<int16_t>(master.data);
        at::parallel_for(0, master.data.numel(), kGrain, [&](int64_t lo, int64_t hi) {
            float x[kPiece];
            for (int64_t begin = lo; begin < hi; begin += kPiece) {
                int64_t end = std::min(hi, begin + kPiece);
                for (int64_t i = begin; i < end; ++i) x[i - begin] = joined(high[i], rest[i]);
                change(x, begin, end);
                for (int64_t i = begin; i < end; ++i) {
                    uint32_t bits = bits_of(x[i - begin]);
                    high[i] = uint16_t((bits + 0x8000u) >> 16);
                    rest[i] = int16_t(uint16_t(bits));
                }
            }
        });
        return;
    }
    by_wide_dtype("adamw", master.data, [&](auto zero) {
        auto* x = mutable_data<decltype(zero)>(master.data);
        at::parallel_for(0, master.data.numel(), kGrain, [&](int64_t lo, int64_t hi) {
            change(x + lo, lo, hi);
            if (master.value.defined()) by_dtype("adamw", master.value, [&](auto value) { copy_range(x, mutable_data<decltype(value)>(master.value), lo, hi); });
        });
    });
}
}  // namespace

void adamw_cpu(const Master& master, const Tensor& grad, Tensor m, Tensor v, const AdamWOptions& options) {
    by_main_dtype("adamw", grad, [&](auto grad_zero) {
        auto* g = data<decltype(grad_zero)>(grad);
        by_main_dtype("adamw", m, [&](auto moment_zero) {
            using M = decltype(moment_zero);
            auto *pm = mutable_data<M>(m), *pv = mutable_data<M>(v);
            over_masters(master, [&]<class T>(T* p, int64_t lo, int64_t hi) { adamw_range(p, g + lo, pm + lo, pv + lo, Factors<T>(options), hi - lo); });
        });
    });
}

void sgd_cpu(const Master& master, const Tensor& grad, Tensor buffer, const SgdOptions& o) {
    by_main_dtype("sgd", grad, [&](auto grad_zero) {
        auto* g = data<decltype(grad_zero)>(grad);
        by_main_dtype("sgd", buffer.defined() ? buffer : grad, [&](auto buffer_zero) {
            auto* b = mutable_data<decltype(buffer_zero)>(buffer);
            over_masters(master, [&]<class T>(T* p, int64_t lo, int64_t hi) {
                SgdFactors<T> factors{T(o.lr), T(o.momentum), T(o.weight_decay), T(o.grad_scale)};
                if (b) momentum_range(p, g + lo, b + lo, factors, hi - lo);
                else sgd_range(p, g + lo, factors, hi - lo);
            });
        });
    });
}

namespace {
/// A function of its own: with the pointer captured by a lambda the compiler gathers elements one by one.
template <class T> double squares(const T* x, int64_t n) {
    double sum = 0;
    #pragma omp simd reduction(+:sum)
    for (int64_t i = 0; i < n; ++i) sum += double(Acc<T>(x[i])) * double(Acc<T>(x[i]));
    return sum;
}
}  // namespace

void sum_of_squares_cpu(const Tensor& x, Tensor out) {
    constexpr int64_t kBlock = 1 << 14;          // a constant: the sum must not depend on the number of threads
    int64_t n = x.numel(), blocks = (n + kBlock - 1) / kBlock;
    std::vector<double> partial(blocks);
    by_dtype("sum_of_squares", x, [&](auto zero) {
        using T = decltype(zero);
        auto* p = data<T>(x);
        at::parallel_for(0, blocks, 1, [&](int64_t lo, int64_t hi) {
            for (int64_t b = lo; b < hi; ++b) partial[b] = squares(p + b * kBlock, std::min(n - b * kBlock, kBlock));
        });
    });
    double total = 0;
    for (double s : partial) total += s;
    *mutable_data<double>(out) = total;
}
}  // namespace moe::kernels
