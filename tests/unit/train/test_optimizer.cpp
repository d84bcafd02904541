#include "core/base/error.h"
#include "core/train/optimizer.h"
#include "tests/catch.h"

#include <ATen/ATen.h>

#include <cmath>
#include <limits>

using namespace moe;
using namespace moe::train;

TEST_CASE("learning rate: warm-up is linear, cosine ends at the minimum, constant stays", "[train]") {
    TrainingConfig c;
    c.learning_rate = 1; c.min_learning_rate = 0.1; c.lr_warmup_steps = 4; c.lr_decay_style = "cosine";
    REQUIRE(learning_rate(c, 0, 101) == Approx(0.25));
    REQUIRE(learning_rate(c, 3, 101) == Approx(1.0));
    REQUIRE(learning_rate(c, 4, 101) == Approx(1.0));
    REQUIRE(learning_rate(c, 52, 101) == Approx(0.55));           // halfway
    REQUIRE(learning_rate(c, 100, 101) == Approx(0.1));
    REQUIRE(learning_rate(c, 500, 101) == Approx(0.1));           // beyond the end
    c.lr_decay_ratio = 0.5;
    REQUIRE(learning_rate(c, 40, 101) == Approx(1.0));
    c.lr_decay_style = "constant";
    REQUIRE(learning_rate(c, 100, 101) == Approx(1.0));
    c.lr_decay_style = "linear";
    c.lr_decay_ratio.reset();
    REQUIRE(learning_rate(c, 52, 101) == Approx(0.55));
    c.lr_decay_style = "wsd";
    REQUIRE_THROWS_AS(learning_rate(c, 50, 101), Error);
}

namespace {
/// Three tensors in one store: a matrix with decay, a norm without, a frozen one.
struct Fixture {
    dist::Mesh mesh;
    ParamStore store;
    explicit Fixture(Precision precision, int moments = 2) : store(mesh, {precision, at::kCPU, 0, 3, moments, true}) {
        store.declare({"matrix", BucketKind::dense, {{"matrix", {3, 5}, 0.5}}, {3, 5}});
        store.declare({"norm", BucketKind::dense, {{"norm", {5}, 0, 1, false}}, {5}});
        store.declare({"frozen", BucketKind::dense, {{"frozen", {4}, 0.5, 0, true, true}}, {4}});
        store.build();
    }
};
}  // namespace

TEST_CASE("adamw: three steps with clipping equal the formula in plain loops, norms do not decay, frozen ones stay", "[train]") {
    Fixture f(Precision::named("fp64"));
    TrainingConfig c;
    c.weight_decay = 0.3; c.grad_clip = 0.7;
    std::map<std::string, at::Tensor> p, m, v;
    at::Tensor frozen = f.store.value("frozen").clone();
    for (auto name : {"matrix", "norm"}) { p[name] = f.store.value(name).clone(); m[name] = at::zeros_like(p[name]); v[name] = at::zeros_like(p[name]); }
    for (int step = 1; step <= 3; ++step) {
        double sum = 0;
        std::map<std::string, at::Tensor> g;
        for (auto name : {"matrix", "norm"}) {
            g[name] = at::randn(p[name].sizes(), at::kDouble);
            f.store.grad(name).copy_(g[name]);
            sum += g[name].square().sum().item<double>();
        }
        double norm = grad_norm(f.store, f.mesh.world);
        REQUIRE(norm == Approx(std::sqrt(sum)).epsilon(1e-12));
        update(f.store, c, 0.01, norm, step);
        for (auto name : {"matrix", "norm"}) {
            at::Tensor d = g[name] * std::min(1.0, 0.7 / norm);
            m[name] = 0.9 * m[name] + 0.1 * d;
            v[name] = 0.95 * v[name] + 0.05 * d * d;
            at::Tensor mh = m[name] / (1 - std::pow(0.9, step)), vh = v[name] / (1 - std::pow(0.95, step));
            p[name] = p[name] * (1 - 0.01 * (std::string(name) == "matrix" ? 0.3 : 0)) - 0.01 * mh / (vh.sqrt() + 1e-8);
            REQUIRE((f.store.value(name) - p[name]).abs().max().item<double>() < 1e-12);
            REQUIRE(f.store.grad(name).abs().max().item<double>() == 0);
        }
        REQUIRE(at::equal(f.store.value("frozen"), frozen));
    }
}

TEST_CASE("adamw: under bf16 the compute weights are the fp32 master rounded", "[train]") {
    Fixture f(Precision::named("bf16"));
    TrainingConfig c;
    f.store.grad("matrix").copy_(at::randn({3, 5}));
    update(f.store, c, 1e-3, grad_norm(f.store, f.mesh.world), 1);
    REQUIRE(f.store.value("matrix").scalar_type() == at::kBFloat16);
    REQUIRE(f.store.grad("matrix").scalar_type() == at::kFloat);
    REQUIRE(at::equal(f.store.value("matrix"), f.store.master("matrix").to(at::kBFloat16)));
}

TEST_CASE("sgd: keeps no moments and takes the plain step", "[train]") {
    Fixture f(Precision::named("fp64"), num_moments("sgd"));
    TrainingConfig c;
    c.optimizer = "sgd"; c.weight_decay = 0; c.grad_clip = 0;
    at::Tensor before = f.store.value("matrix").clone(), g = at::randn({3, 5}, at::kDouble);
    f.store.grad("matrix").copy_(g);
    update(f.store, c, 0.5, 1, 1);
    REQUIRE((f.store.value("matrix") - (before - 0.5 * g)).abs().max().item<double>() < 1e-14);
    for (auto& b : f.store.buckets()) REQUIRE(b.state.empty());
    REQUIRE_THROWS_AS(num_moments("lion"), Error);
}
