// Muon by plain loops in float64, one matrix at a time: no LibTorch, no products but these.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace moe::test {

struct PlainMatrix {
    int64_t rows = 0, cols = 0;
    std::vector<double> at;
    PlainMatrix(int64_t r, int64_t c) : rows(r), cols(c), at(size_t(r * c)) {}
    PlainMatrix(int64_t r, int64_t c, std::vector<double> values) : rows(r), cols(c), at(std::move(values)) {}
    double& operator()(int64_t r, int64_t c) { return at[size_t(r * cols + c)]; }
    double operator()(int64_t r, int64_t c) const { return at[size_t(r * cols + c)]; }
};
inline PlainMatrix transposed(const PlainMatrix& a) {
    PlainMatrix t(a.cols, a.rows);
    for (int64_t r = 0; r < a.rows; ++r)
        for (int64_t c = 0; c < a.cols; ++c) t(c, r) = a(r, c);
    return t;
}
inline PlainMatrix times(const PlainMatrix& a, const PlainMatrix& b) {
    PlainMatrix out(a.rows, b.cols);
    for (int64_t r = 0; r < a.rows; ++r)
        for (int64_t c = 0; c < b.cols; ++c)
            for (int64_t k = 0; k < a.cols; ++k) out(r, c) += a(r, k) * b(k, c);
    return out;
}
/// p·a + q·b.
inline PlainMatrix mixed(double p, const PlainMatrix& a, double q, const PlainMatrix& b) {
    PlainMatrix out(a.rows, a.cols);
    for (size_t i = 0; i < out.at.size(); ++i) out.at[i] = p * a.at[i] + q * b.at[i];
    return out;
}

inline PlainMatrix plain_newton_schulz(const PlainMatrix& g) {
    if (g.rows > g.cols) return transposed(plain_newton_schulz(transposed(g)));
    double squares = 0;
    for (double v : g.at) squares += v * v;
    PlainMatrix x = mixed(1 / std::max(std::sqrt(squares), 1e-7), g, 0, g);
    for (int i = 0; i < 5; ++i) {
        PlainMatrix a = times(x, transposed(x));
        x = mixed(3.4445, x, 1, times(mixed(-4.7750, a, 2.0315, times(a, a)), x));
    }
    return x;
}

/// A parameter and its momentum.
struct PlainMuon {
    PlainMatrix weight, buffer;
    explicit PlainMuon(PlainMatrix w) : weight(std::move(w)), buffer(weight.rows, weight.cols) {}
    void step(const PlainMatrix& gradient, double lr, double momentum, double decay, double scale = 1) {
        buffer = mixed(momentum, buffer, scale, gradient);
        PlainMatrix u = plain_newton_schulz(mixed(scale, gradient, momentum, buffer));
        weight = mixed(1 - lr * decay, weight, -lr * 0.2 * std::sqrt(double(std::max(weight.rows, weight.cols))), u);
    }
};

}  // namespace moe::test
