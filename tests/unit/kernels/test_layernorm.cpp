#include "core/kernels/norm/layernorm.h"
#include "tests/unit/kernels/reference.h"

using namespace moe;
using namespace moe::kernels;
using namespace moe::kernels::test;

namespace {
/// Row by row: y, and by the chain rule written out the gradients of x, gamma and beta.
struct Plain { std::vector<double> y, dx, dgamma, dbeta; };
Plain plain_layernorm(const Tensor& x_TD, const Tensor& gamma_D, const Tensor& beta_D, const Tensor& dy_TD, double eps) {
    auto x = values(x_TD), gamma = values(gamma_D), beta = values(beta_D), dy = values(dy_TD);
    size_t D = gamma.size(), T = x.size() / D;
    Plain p{std::vector<double>(x.size()), std::vector<double>(x.size()), std::vector<double>(D), std::vector<double>(D)};
    for (size_t t = 0; t < T; ++t) {
        const double *row = &x[t * D], *up = &dy[t * D];
        double mean = 0, variance = 0, mean_g = 0, mean_gz = 0;
        for (size_t d = 0; d < D; ++d) mean += row[d] / double(D);
        for (size_t d = 0; d < D; ++d) variance += (row[d] - mean) * (row[d] - mean) / double(D);
        double r = 1 / std::sqrt(variance + eps);
        for (size_t d = 0; d < D; ++d) {
            double z = (row[d] - mean) * r;
            p.y[t * D + d] = z * gamma[d] + beta[d];
            p.dgamma[d] += up[d] * z;
            p.dbeta[d] += up[d];
            mean_g += up[d] * gamma[d] / double(D);
            mean_gz += up[d] * gamma[d] * z / double(D);
        }
        for (size_t d = 0; d < D; ++d) p.dx[t * D + d] = r * (up[d] * gamma[d] - mean_g - (row[d] - mean) * r * mean_gz);
    }
    return p;
}
constexpr int64_t T = 7, D = 13;
constexpr double kEps = 1e-3;
}  // namespace

TEST_CASE("layernorm: forward and gradients equal plain loops in every dtype", "[kernels][norm]") {
    auto [dtype, tolerance] = GENERATE(table<at::ScalarType, double>({{at::kDouble, 1e-13}, {at::kFloat, 2e-6}, {at::kBFloat16, 4e-3}}));
    Tensor x0 = randn("x", {T, D}).mul(2).add(0.7).to(dtype), g0 = randn("gamma", {D}).to(dtype), b0 = randn("beta", {D}).to(dtype), dy = randn("dy", {T, D}).to(dtype);
    auto gamma = weight(g0, dtype), beta = weight(b0, dtype);
    gamma->grad.fill_(1);                                 // main gradients are added to
    beta->grad.fill_(2);
    Tensor x = leaf(x0, dtype), y = layernorm(x, gamma, beta, kEps);
    REQUIRE(y.scalar_type() == dtype);
    Plain want = plain_layernorm(x0, g0, b0, dy, kEps);
    for (double& v : want.dgamma) v += 1;
    for (double& v : want.dbeta) v += 2;
    Tensor dx = backward(y, {x}, dy)[0];
    require_close(y, want.y, tolerance);
    require_close(dx, want.dx, tolerance);
    require_close(gamma->grad, want.dgamma, std::min(tolerance, 2e-6));  // never rounded to bf16
    require_close(beta->grad, want.dbeta, std::min(tolerance, 2e-6));
    require_close(layernorm(x0, gamma, beta, kEps), want.y, tolerance);
}

TEST_CASE("layernorm: gradients equal finite differences", "[kernels][norm]") {
    auto gamma = weight(randn("gamma", {5})), beta = weight(randn("beta", {5}));
    Tensor x = leaf(randn("x", {3, 5})), dy = randn("dy", {3, 5});
    auto dx = backward(layernorm(x, gamma, beta, kEps), {x}, dy)[0];
    auto f = [&] { return sum_of_products(layernorm(x, gamma, beta, kEps), dy); };
    require_close(dx, differences(x, f), 1e-8);
    require_close(gamma->grad, differences(gamma->value, f), 1e-8);
    require_close(beta->grad, differences(beta->value, f), 1e-8);
}

TEST_CASE("layernorm: a constant row is beta, a frozen weight gets no gradient, no rows work", "[kernels][norm]") {
    auto gamma = weight(randn("gamma", {D})), beta = weight(randn("beta", {D}));
    require_close(layernorm(at::full({1, D}, 3.0, at::kDouble), gamma, beta, kEps), values(beta->value), 1e-13);
    gamma->grad = Tensor();
    Tensor x = leaf(randn("x", {T, D})), dy = randn("dy", {T, D});
    auto dx = backward(layernorm(x, gamma, beta, kEps), {x}, dy)[0];
    require_close(dx, plain_layernorm(x, gamma->value, beta->value, dy, kEps).dx, 1e-13);
    CHECK_FALSE(gamma->grad.defined());
    beta->grad.zero_();
    Tensor none = leaf(at::zeros({0, D}, at::kDouble)), y = layernorm(none, gamma, beta, kEps);
    CHECK(y.sizes() == at::IntArrayRef({0, D}));
    CHECK(backward(y, {none}, at::zeros({0, D}, at::kDouble))[0].sizes() == at::IntArrayRef({0, D}));
    CHECK(beta->grad.abs().sum().item<double>() == 0);
}

TEST_CASE("layernorm: wrong operands are named with their values", "[kernels][norm]") {
    auto gamma = weight(randn("gamma", {5})), beta = weight(randn("beta", {4}));
    require_error(ErrorKind::shape, "got [4], want [5]", [&] { layernorm(randn("x", {3, 5}), gamma, beta, kEps); });
    require_error(ErrorKind::dtype, "float32", [&] { layernorm(randn("x", {3, 5}).to(at::kFloat), gamma, gamma, kEps); });
    require_error(ErrorKind::state, "no weight", [&] { layernorm(randn("x", {3, 5}), gamma, {}, kEps); });
}
