#include "core/base/error.h"
#include "core/kernels/linear/linear.h"
#include "core/kernels/quantize/quantize.h"
#include "core/train/optimizer.h"
#include "tests/catch.h"
#include "tests/muon_reference.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>

#include <cmath>
#include <limits>

using namespace moe;
using namespace moe::train;

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

TEST_CASE("update: weights that products read in E4M3 have their copies from AdamW's pass, until something else writes weights", "[train]") {
    dist::Mesh mesh;
    ParamStore store(mesh, {Precision::named("fp8"), at::kCPU, 0, 3, 2, true});
    auto declare = [&](const std::string& name, std::vector<int64_t> shape, bool frozen = false) {
        auto w = store.declare({name, BucketKind::dense, {{name, shape, 0.5, 0, shape.size() > 1, frozen}}, shape});
        w->is_fp8 = shape.size() > 1;
        return w;
    };
    std::vector<WeightPtr> weights = {declare("first", {32, 48}), declare("norm", {48}), declare("unread", {16, 48}), declare("experts", {2, 16, 32}), declare("frozen", {16, 48}, true), declare("plain", {16, 48})};
    weights.back()->is_fp8 = false;
    store.build();
    const WeightPtr &first = weights[0], &unread = weights[2], &experts = weights[3], &frozen = weights[4], &plain = weights[5];
    at::Tensor x = at::randn({4, 48}).to(at::kBFloat16), rows = at::randn({4, 32}).to(at::kBFloat16), offsets = at::tensor({0, 1, 4}, at::kLong);
    auto read = [&] {
        at::NoGradGuard no_grad;
        kernels::linear(x, first), kernels::linear(x, frozen), kernels::linear(x, plain), kernels::grouped_linear(rows, {offsets}, experts);
    };
    auto check_copies = [&](const WeightPtr& w) {
        INFO(w->name);
        REQUIRE(w->fp8.are_of(w->value));
        auto want = kernels::empty_quantized_weight(w->fp8.q.size(0), w->fp8.q.size(1), w->fp8.q.size(2), w->value);
        kernels::quantize_weight(w->value, want);
        CHECK(at::equal(w->fp8.q.view(at::kByte), want.q_EOI.view(at::kByte)));
        CHECK(at::equal(w->fp8.transposed.view(at::kByte), want.q_EIO.view(at::kByte)));
        CHECK(at::equal(w->fp8.scale, want.scale_EOI));
    };
    read();
    TrainingConfig c;
    ParamStore wide(mesh, {Precision::named("bf16"), at::kCPU, 0, 3, 2, true});                    // the same without copies
    for (auto& w : weights) wide.declare({w->name, BucketKind::dense, {store.spec(w->name)}, store.spec(w->name).shape});
    wide.build();
    for (int step = 1; step <= 3; ++step) {
        for (auto& name : store.names()) {
            store.grad(name).copy_(at::randn(store.grad(name).sizes()));
            wide.grad(name).copy_(store.grad(name));
        }
        const auto before = experts->value.clone();
        update(store, c, 1e-2, 1, step);
        update(wide, c, 1e-2, 1, step);
        for (auto& name : store.names()) CHECK(at::equal(store.master(name), wide.master(name)));
        CHECK_FALSE(at::equal(experts->value, before));
        check_copies(first);
        check_copies(experts);
        CHECK_FALSE(unread->fp8.q.defined());
        CHECK_FALSE(plain->fp8.q.defined());
        CHECK_FALSE(frozen->fp8.are_of(frozen->value));                                           // of the same values, which nobody can know: made again
        read();
        check_copies(frozen);
    }
    store.set("first", at::randn({32, 48}));
    CHECK_FALSE(first->fp8.are_of(first->value));
    read();
    check_copies(first);
    kernels::refresh_fp8(unread);
    CHECK_FALSE(unread->fp8.q.defined());
    c.optimizer = "sgd";                                                                           // writes weights without copies
    c.momentum = 0;
    update(store, c, 1e-2, 1, 4);
    CHECK_FALSE(first->fp8.are_of(first->value));
    kernels::refresh_fp8(first);
    check_copies(first);
}

TEST_CASE("sgd: without momentum it keeps no moments and takes the plain step", "[train]") {
    TrainingConfig c;
    c.optimizer = "sgd"; c.momentum = 0; c.weight_decay = 0; c.grad_clip = 0;
    Fixture f(Precision::named("fp64"), num_moments(c));
    at::Tensor before = f.store.value("matrix").clone(), g = at::randn({3, 5}, at::kDouble);
    f.store.grad("matrix").copy_(g);
    update(f.store, c, 0.5, 1, 1);
    REQUIRE((f.store.value("matrix") - (before - 0.5 * g)).abs().max().item<double>() < 1e-14);
    for (auto& b : f.store.buckets()) REQUIRE(b.state.empty());
    c.optimizer = "lion";
    REQUIRE_THROWS_WITH(num_moments(c), Catch::Contains("lion"));
}

namespace {
using test::PlainMatrix;
using test::PlainMuon;

std::vector<double> doubles(const at::Tensor& t) {
    at::Tensor flat = t.detach().to(at::kDouble).contiguous();
    return {flat.const_data_ptr<double>(), flat.const_data_ptr<double>() + flat.numel()};
}
double worst(const at::Tensor& got, const std::vector<double>& want) {
    auto x = doubles(got);
    REQUIRE(x.size() == want.size());
    double most = 0;
    for (size_t i = 0; i < x.size(); ++i) most = std::max(most, std::abs(x[i] - want[i]));
    return std::isfinite(most) ? most : INFINITY;
}

/// AdamW, Adam or SGD of one parameter in plain loops over float64; `update` is the formula.
struct PlainState {
    std::vector<double> p, m, v;
    explicit PlainState(std::vector<double> start) : p(std::move(start)), m(p.size()), v(p.size()) {}
    void adam(const std::vector<double>& grad, const TrainingConfig& c, double lr, double scale, double decay, int step, bool decoupled) {
        for (size_t i = 0; i < p.size(); ++i) {
            double d = scale * grad[i] + (decoupled ? 0 : decay * p[i]);
            m[i] = c.adam_beta1 * m[i] + (1 - c.adam_beta1) * d;
            v[i] = c.adam_beta2 * v[i] + (1 - c.adam_beta2) * d * d;
            double mean = m[i] / (1 - std::pow(c.adam_beta1, step)), square = v[i] / (1 - std::pow(c.adam_beta2, step));
            p[i] -= lr * (mean / (std::sqrt(square) + c.adam_eps) + (decoupled ? decay * p[i] : 0));
        }
    }
    void sgd(const std::vector<double>& grad, double momentum, double lr, double scale, double decay, int step) {
        for (size_t i = 0; i < p.size(); ++i) {
            double d = scale * grad[i] + decay * p[i];
            m[i] = step == 1 ? d : momentum * m[i] + d;
            p[i] -= lr * m[i];
        }
    }
};

/// Every kind of parameter that a model has, by the model's names, in handles as the model makes them.
struct Mixed {
    dist::Mesh mesh;
    ParamStore store;
    explicit Mixed(Precision precision, const TrainingConfig& c) : store(mesh, {precision, at::kCPU, 0, 3, num_moments(c), true}) {
        store.declare({"embed", BucketKind::dense, {{"model.embed_tokens.weight", {7, 5}, 0.5}}, {7, 5}});
        store.declare({"norm", BucketKind::dense, {{"model.layers.0.input_layernorm.weight", {5}, 0, 1, false}}, {5}});
        store.declare({"gate_up", BucketKind::dense, {{"model.layers.0.mlp.gate_proj.weight", {4, 5}, 0.5}, {"model.layers.0.mlp.up_proj.weight", {4, 5}, 0.5}}, {8, 5}});
        store.declare({"o", BucketKind::dense, {{"model.layers.0.self_attn.o_proj.weight", {9, 5}, 0.5}}, {9, 5}});
        store.declare({"frozen", BucketKind::dense, {{"model.layers.0.self_attn.q_proj.weight", {3, 5}, 0.5, 0, true, true}}, {3, 5}});
        store.declare({"gate", BucketKind::router, {{"model.layers.1.mlp.gate.weight", {3, 5}, 0.5}}, {3, 5}});
        WeightSpec up{"up", BucketKind::expert, {}, {3, 8, 5}}, down{"down", BucketKind::expert, {}, {3, 5, 4}};
        for (int e = 0; e < 3; ++e) {
            std::string x = "model.layers.1.mlp.experts." + std::to_string(e);
            up.tensors.push_back({x + ".gate_proj.weight", {4, 5}, 0.5});
            up.tensors.push_back({x + ".up_proj.weight", {4, 5}, 0.5});
            down.tensors.push_back({x + ".down_proj.weight", {5, 4}, 0.5});
        }
        store.declare(up);
        store.declare(down);
        store.declare({"head", BucketKind::dense, {{"lm_head.weight", {7, 5}, 0.5}}, {7, 5}});
        store.build();
    }
    /// Gradients of a step, all different; expert 2 has none. Returns them by name.
    std::map<std::string, std::vector<double>> fill_gradients(int step) {
        std::map<std::string, std::vector<double>> out;
        for (auto& name : store.names()) {
            at::Tensor g = at::randn(store.spec(name).shape, at::make_generator<at::CPUGeneratorImpl>(uint64_t(100 * step) + name.size() + out.size()), at::TensorOptions().dtype(at::kDouble));
            if (name.find("experts.2.") != std::string::npos || store.spec(name).frozen) g.zero_();
            store.grad(name).copy_(g);
            out[name] = doubles(store.grad(name));
        }
        return out;
    }
};
TrainingConfig settings(const std::string& optimizer) {
    TrainingConfig c;
    c.optimizer = optimizer;
    c.weight_decay = 0.3; c.grad_clip = 2; c.momentum = 0.8;
    return c;
}
bool is_muon_name(const std::string& name) { return name.find("proj") != std::string::npos && name.find("q_proj") == std::string::npos; }
}  // namespace

TEST_CASE("muon: hidden matrices are chosen by what they are", "[train]") {
    Mixed f(Precision::named("fp64"), settings("muon"));
    for (auto& name : f.store.names()) {
        INFO(name);
        CHECK(is_hidden_matrix(f.store, name) == is_muon_name(name));
    }
}

TEST_CASE("muon: five steps of hidden matrices, and AdamW for the rest, equal plain loops in float64", "[train]") {
    TrainingConfig c = settings("muon");
    Mixed f(Precision::named("fp64"), c);
    std::map<std::string, PlainMuon> matrices;
    std::map<std::string, PlainState> others;
    for (auto& name : f.store.names()) {
        auto& shape = f.store.spec(name).shape;
        if (is_muon_name(name)) matrices.emplace(name, PlainMuon(PlainMatrix(shape[0], shape[1], doubles(f.store.value(name)))));
        else others.emplace(name, PlainState(doubles(f.store.value(name))));
    }
    for (int step = 1; step <= 5; ++step) {
        auto grads = f.fill_gradients(step);
        double norm = grad_norm(f.store, f.mesh.world), scale = 2 / norm, lr = 0.02 / step;
        REQUIRE(norm > 2);
        update(f.store, c, lr, norm, step);
        for (auto& [name, m] : matrices) m.step(PlainMatrix(m.weight.rows, m.weight.cols, grads[name]), lr, 0.8, 0.3, scale);
        for (auto& [name, s] : others)
            if (!f.store.spec(name).frozen) s.adam(grads[name], c, lr, scale, f.store.spec(name).decay ? 0.3 : 0, step, true);
    }
    for (auto& [name, m] : matrices) { INFO(name); CHECK(worst(f.store.value(name), m.weight.at) < 1e-10); }
    for (auto& [name, s] : others) { INFO(name); CHECK(worst(f.store.value(name), s.p) < 1e-12); }
}

TEST_CASE("adam, adamw and sgd with momentum: five clipped steps equal plain loops in float64", "[train]") {
    auto optimizer = GENERATE(std::string("adam"), std::string("adamw"), std::string("sgd"));
    TrainingConfig c = settings(optimizer);
    Mixed f(Precision::named("fp64"), c);
    REQUIRE(f.store.buckets()[0].state.size() == (optimizer == "sgd" ? 1u : 2u));
    std::map<std::string, PlainState> want;
    for (auto& name : f.store.names()) want.emplace(name, PlainState(doubles(f.store.value(name))));
    for (int step = 1; step <= 5; ++step) {
        auto grads = f.fill_gradients(step);
        double norm = grad_norm(f.store, f.mesh.world), scale = 2 / norm;
        update(f.store, c, 0.02, norm, step);
        for (auto& [name, s] : want) {
            if (f.store.spec(name).frozen) continue;
            double decay = f.store.spec(name).decay ? 0.3 : 0;
            if (optimizer == "sgd") s.sgd(grads[name], 0.8, 0.02, scale, decay, step);
            else s.adam(grads[name], c, 0.02, scale, decay, step, optimizer == "adamw");
        }
    }
    for (auto& [name, s] : want) { INFO(name); CHECK(worst(f.store.value(name), s.p) < 1e-12); }
}

TEST_CASE("update: gradients of a scaled loss give the same step", "[train]") {
    auto optimizer = GENERATE(std::string("adamw"), std::string("sgd"), std::string("muon"));
    TrainingConfig c = settings(optimizer);
    Mixed plain(Precision::named("fp64"), c), scaled(Precision::named("fp64"), c);
    for (int step = 1; step <= 3; ++step) {
        plain.fill_gradients(step);
        scaled.fill_gradients(step);
        for (auto& b : scaled.store.buckets()) b.grad.mul_(1024);
        double norm = grad_norm(plain.store, plain.mesh.world);
        update(plain.store, c, 0.02, norm, step);
        update(scaled.store, c, 0.02, grad_norm(scaled.store, scaled.mesh.world) / 1024, step, 1024);
    }
    for (auto& name : plain.store.names()) CHECK(worst(scaled.store.value(name), doubles(plain.store.value(name))) < 1e-12);
}

TEST_CASE("update: moments and gradients in bf16 keep bf16 state and stay near fp32", "[train]") {
    auto optimizer = GENERATE(std::string("adamw"), std::string("sgd"), std::string("muon"));
    TrainingConfig c = settings(optimizer), narrow = c;
    narrow.moments_dtype = narrow.grads_dtype = "bf16";
    Precision p = precision_of(narrow);
    REQUIRE((p == Precision{at::kFloat, at::kFloat, at::kBFloat16, at::kBFloat16}));
    Mixed wide(precision_of(c), c), small(p, narrow);
    std::map<std::string, at::Tensor> start;
    for (auto& name : wide.store.names()) start[name] = wide.store.value(name).clone();
    for (int step = 1; step <= 5; ++step) {
        wide.fill_gradients(step);
        small.fill_gradients(step);
        update(wide.store, c, 0.02, grad_norm(wide.store, wide.mesh.world), step);
        update(small.store, narrow, 0.02, grad_norm(small.store, small.mesh.world), step);
    }
    double error = 0, size = 0;
    for (auto& name : wide.store.names()) {
        at::Tensor moved = wide.store.value(name) - start[name];
        error += (small.store.value(name) - wide.store.value(name)).square().sum().item<double>();
        size += moved.square().sum().item<double>();
    }
    CHECK(std::sqrt(error) < 0.02 * std::sqrt(size));
    CHECK(error > 0);
    for (auto& b : small.store.buckets()) {
        REQUIRE(b.grad.scalar_type() == at::kBFloat16);
        for (auto& s : b.state) CHECK(s.scalar_type() == at::kBFloat16);
        CHECK(b.master_of(b.own_begin, b.own_end).dtype() == at::kFloat);
    }
}

TEST_CASE("precision: the recipe's words give the types of a run", "[train]") {
    TrainingConfig c;
    c.use_fp16 = true;
    REQUIRE((precision_of(c) == Precision{at::kHalf, at::kFloat, at::kFloat, at::kFloat}));
    c.use_fp16 = false;
    c.use_fp8 = true;
    REQUIRE(precision_of(c).fp8);
    REQUIRE(precision_of(c).compute == at::kBFloat16);
}
