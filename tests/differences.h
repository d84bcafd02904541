// Derivatives of plain references, to about twelve digits: what gradients are held against where 1e-8 is wanted.
#pragma once
#include <functional>
#include <vector>

namespace moe::test {

/// df/dt at t = 0 by the five-point rule; its error is of the order h⁴. Source: Abramowitz and Stegun, 25.3.6.
template <class F> double derivative(F f, double h = 1e-3) { return (8 * (f(h) - f(-h)) - (f(2 * h) - f(-2 * h))) / (12 * h); }

/// Partial derivatives of f() with respect to every element of x, which is changed in place and put back.
inline std::vector<double> gradient(std::vector<double>& x, const std::function<double()>& f, double h = 1e-3) {
    std::vector<double> out;
    for (double& element : x) {
        double before = element;
        out.push_back(derivative([&](double t) { element = before + t; return f(); }, h));
        element = before;
    }
    return out;
}

}  // namespace moe::test
