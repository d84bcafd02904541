#include "core/param/param_store.h"

#include "core/base/random.h"

#include <ATen/ATen.h>

#include <cmath>

#include "tests/error_of.h"      // last: a LibTorch header defines a CHECK of its own

using namespace moe;
using moe::test::error_of;

namespace {
StoreOptions options(const std::string& precision, int zero = 0) {
    StoreOptions o;
    o.precision = Precision::named(precision);
    o.zero_stage = zero;
    o.seed = 7;
    return o;
}

TensorSpec matrix(std::string name, std::vector<int64_t> shape, double std = 0.02) { return {std::move(name), std::move(shape), std, 0, true, false}; }
TensorSpec norm(std::string name, int64_t n) { return {std::move(name), {n}, 0, 1, false, false}; }

/// One handle of each kind of shape: a norm of odd size, a packed projection of two tensors, three experts, a router.
struct Model {
    ParamStore store;
    WeightPtr gamma, packed, experts, router;
    explicit Model(StoreOptions o) : store(dist::Mesh{}, std::move(o)) {
        gamma = store.declare({"gamma", BucketKind::dense, {norm("norm.weight", 7)}, {7}});
        packed = store.declare({"qkv", BucketKind::dense, {matrix("q.weight", {5, 7}), matrix("kv.weight", {3, 7})}, {8, 7}});
        experts = store.declare({"up", BucketKind::expert, {matrix("e.0", {5, 7}), matrix("e.1", {5, 7}), matrix("e.2", {5, 7})}, {3, 5, 7}});
        router = store.declare({"gate", BucketKind::router, {matrix("gate.weight", {3, 7}, 0.5)}, {3, 7}});
        store.build();
    }
};

}  // namespace

TEST_CASE("param: handles are aligned views of their bucket and tensors inside one are contiguous", "[param]") {
    Model m(options("fp32"));
    auto& dense = m.store.buckets()[int(BucketKind::dense)];
    CHECK(m.gamma->value.data_ptr() == dense.value.data_ptr());
    CHECK(m.packed->value.storage_offset() == 16);                    // 7 elements, padded
    CHECK(m.packed->value.sizes() == at::IntArrayRef({8, 7}));
    CHECK(m.store.value("q.weight").storage_offset() == 16);
    CHECK(m.store.value("kv.weight").storage_offset() == 16 + 35);    // no padding inside a handle
    CHECK(dense.value.numel() == 16 + 64);
    CHECK(m.store.value("e.2").data_ptr() == m.experts->value[2].data_ptr());
    CHECK(m.store.grad("kv.weight").data_ptr() == m.packed->grad[5].data_ptr());
    CHECK(m.packed->sink == &m.store.sink());
    CHECK(m.store.num_parameters() == 7 + 56 + 105 + 21);
    CHECK(m.store.names() == std::vector<std::string>{"norm.weight", "q.weight", "kv.weight", "e.0", "e.1", "e.2", "gate.weight"});
    CHECK(m.store.bucket_of("e.1") == BucketKind::expert);
}

TEST_CASE("param: initial values are those of (seed, name, element), whatever the bucket's type", "[param]") {
    for (const char* precision : {"fp64", "fp32", "bf16"}) {
        Model m(options(precision));
        for (const char* name : {"q.weight", "kv.weight", "e.1", "gate.weight"}) {
            const TensorSpec& spec = m.store.spec(name);
            Tensor want = at::empty(spec.shape, at::kDouble);
            normal(7, name, 0, want.numel(), want.data_ptr<double>());
            want.mul_(spec.init_std);
            Tensor master = want.to(m.store.options().precision.master);
            CHECK(at::equal(m.store.master(name), master));
            CHECK(at::equal(m.store.value(name), master.to(m.store.value(name).scalar_type())));
            CHECK(want.abs().max().item<double>() > 0);
        }
        CHECK((m.store.value("norm.weight").to(at::kDouble) == 1).all().item<bool>());
        CHECK(m.store.buckets()[0].value.narrow(0, 7, 9).count_nonzero().item<int64_t>() == 0);      // padding
    }
}

TEST_CASE("param: initial values are as deviated as asked", "[param]") {
    ParamStore store(dist::Mesh{}, options("fp64"));
    store.declare({"w", BucketKind::dense, {matrix("w", {301, 257}, 0.006)}, {301, 257}});
    store.build();
    Tensor w = store.value("w");
    CHECK(w.isfinite().all().item<bool>());
    CHECK(std::abs(w.mean().item<double>()) < 4 * 0.006 / std::sqrt(301 * 257));
    CHECK(w.std().item<double>() == Approx(0.006).epsilon(0.02));
}

TEST_CASE("param: types of value, master, moments and gradients follow the precision; the router computes in the master type", "[param]") {
    Model m(options("bf16"));
    auto& dense = m.store.buckets()[int(BucketKind::dense)];
    auto& router = m.store.buckets()[int(BucketKind::router)];
    CHECK(dense.value.scalar_type() == at::kBFloat16);
    CHECK(dense.master.scalar_type() == at::kShort);                  // fp32, but for what is in value
    CHECK(dense.master_of(0, 7).read().scalar_type() == at::kFloat);
    CHECK(dense.grad.scalar_type() == at::kFloat);
    CHECK(dense.state.size() == 2);
    CHECK(dense.state[0].scalar_type() == at::kFloat);
    CHECK(router.value.scalar_type() == at::kFloat);
    CHECK(router.master.data_ptr() == router.value.data_ptr());
    Model same(options("fp32"));
    CHECK(same.store.buckets()[0].master.data_ptr() == same.store.buckets()[0].value.data_ptr());
}

TEST_CASE("param: set writes master and the rounded compute weights", "[param]") {
    Model m(options("bf16"));
    Tensor from = at::randn({5, 7}, at::kDouble);
    Tensor before = m.store.master("e.0"), after = m.store.master("e.2");
    m.store.set("e.1", from);
    CHECK(at::equal(m.store.master("e.1"), from.to(at::kFloat)));
    CHECK(at::equal(m.experts->value[1], rounded(from, at::kBFloat16)));
    CHECK(at::equal(m.store.master("e.0"), before));
    CHECK(at::equal(m.store.master("e.2"), after));
    m.store.set("q.weight", from.t().contiguous().t());               // strides do not matter
    CHECK(at::equal(m.store.master("q.weight"), from.to(at::kFloat)));
    CHECK(error_of([&] { m.store.set("e.1", at::zeros({7, 5})); }).kind() == ErrorKind::shape);
    CHECK(error_of([&] { m.store.set("e.1", at::zeros({5, 7}, at::kLong)); }).kind() == ErrorKind::dtype);
}

TEST_CASE("param: master is a copy, value and grad are views", "[param]") {
    Model m(options("fp32"));
    m.store.master("q.weight").zero_();
    CHECK(m.store.value("q.weight").count_nonzero().item<int64_t>() == 35);
    m.store.grad("q.weight").fill_(2);
    CHECK(m.packed->grad[0][0].item<float>() == 2);
    m.store.zero_grads();
    CHECK(m.packed->grad.count_nonzero().item<int64_t>() == 0);
}

TEST_CASE("param: ranges say decay and frozen, are merged and cover the own part", "[param]") {
    ParamStore store(dist::Mesh{}, options("fp32"));
    auto frozen = matrix("c", {4, 4});
    frozen.frozen = true;
    store.declare({"a", BucketKind::dense, {matrix("a", {4, 4})}, {4, 4}});
    store.declare({"b", BucketKind::dense, {matrix("b", {3, 3})}, {9}});
    store.declare({"n", BucketKind::dense, {norm("n", 5)}, {5}});
    auto c = store.declare({"c", BucketKind::dense, {frozen}, {4, 4}});
    store.build();
    auto& ranges = store.buckets()[0].ranges;
    REQUIRE(ranges.size() == 3);
    CHECK((ranges[0].begin == 0 && ranges[0].end == 32 && ranges[0].decay && !ranges[0].frozen));
    CHECK((ranges[1].begin == 32 && ranges[1].end == 48 && !ranges[1].decay));
    CHECK((ranges[2].begin == 48 && ranges[2].end == 64 && ranges[2].frozen));
    CHECK(!c->grad.defined());
    CHECK(store.buckets()[0].norm_begin == 0);
    CHECK(store.buckets()[0].norm_end == 64);
}

TEST_CASE("param: the gradient of a frozen expert beside trained ones does not count", "[param]") {
    ParamStore store(dist::Mesh{}, options("fp64"));
    auto frozen = matrix("e.1", {2, 3});
    frozen.frozen = true;
    auto w = store.declare({"up", BucketKind::expert, {matrix("e.0", {2, 3}), frozen}, {2, 2, 3}});
    store.build();
    REQUIRE(w->grad.defined());
    w->grad.fill_(1);
    store.reduce_grads();
    CHECK(store.grad("e.0").sum().item<double>() == 6);
    CHECK(store.grad("e.1").sum().item<double>() == 0);
}

TEST_CASE("param: moments and main gradients have their own types, offsets are those in the bucket", "[param]") {
    StoreOptions o = options("fp16");
    o.precision.moments = o.precision.grad = at::kBFloat16;
    Model m(o);
    auto& dense = m.store.buckets()[0];
    CHECK(dense.value.scalar_type() == at::kHalf);
    CHECK(dense.master.scalar_type() == at::kFloat);
    CHECK(dense.grad.scalar_type() == at::kBFloat16);
    REQUIRE(dense.state.size() == 2);
    CHECK(dense.state[1].scalar_type() == at::kBFloat16);
    CHECK(m.store.buckets()[int(BucketKind::router)].value.scalar_type() == at::kFloat);
    CHECK(m.store.offset_of("kv.weight") == m.store.value("kv.weight").storage_offset());
    CHECK(m.store.offset_of("kv.weight") == 16 + 35);
}

TEST_CASE("param: without training there are no gradients, no state and no second copy of the weights", "[param]") {
    StoreOptions o = options("bf16");
    o.training = false;
    Model m(o);
    auto& dense = m.store.buckets()[0];
    CHECK(!dense.grad.defined());
    CHECK(!m.packed->grad.defined());
    CHECK(!dense.master.defined());
    CHECK(dense.state.empty());
    CHECK(at::equal(m.store.master("q.weight"), m.store.value("q.weight").to(at::kFloat)));
    CHECK(error_of([&] { m.store.grad("q.weight"); }).kind() == ErrorKind::state);
    m.store.reduce_grads();
    m.store.zero_grads();
    CHECK(m.store.first_non_finite().empty());
}

TEST_CASE("param: rectangles list every tensor whole on one rank, ZeRO 0 and 1, in bucket order", "[param]") {
    for (int zero : {0, 1}) {
        Model m(options("bf16", zero));
        auto list = m.store.rectangles();
        REQUIRE(list.size() == 7);
        CHECK(list[1] == Rectangle{"q.weight", {0, 0}, {5, 7}});
        CHECK(list[5] == Rectangle{"e.2", {0, 0}, {5, 7}});
        CHECK(at::equal(m.store.master("q.weight").to(at::kBFloat16), m.store.value("q.weight")));
        m.store.reduce_grads();
        m.store.gather_values();
    }
}

TEST_CASE("param: squares that came with a gradient count for the norm until the gradient changes", "[param]") {
    Model m(options("fp32"));
    auto total = [&] {
        GradNormParts p = m.store.grad_norm_parts();
        double sum = 0;
        for (auto& x : p.known) sum += x.sum().item<double>();
        for (auto& x : p.rest) sum += x.to(at::kDouble).square().sum().item<double>();
        return std::pair(p.known.size(), sum);
    };
    for (auto& name : m.store.names()) m.store.grad(name).fill_(2);
    const double all = 4 * double(m.store.num_parameters()), experts = 4 * 3 * 35;
    CHECK(total() == std::pair(size_t(0), all));
    m.experts->grad_squares = {at::full({3}, experts / 3 + 1, at::kDouble), int64_t(m.experts->grad._version())};
    CHECK(total() == std::pair(size_t(1), all + 3));                  // what was said, not what is there
    m.store.grad("e.1")[0][0] = 5;
    CHECK(total() == std::pair(size_t(0), all + 21));
    m.experts->grad_squares = {at::full({1}, experts, at::kDouble), int64_t(m.experts->grad._version())};
    m.store.zero_grads();
    CHECK(total() == std::pair(size_t(0), 0.0));
}

TEST_CASE("param: the first parameter with a bad gradient is named", "[param]") {
    Model m(options("fp32"));
    CHECK(m.store.first_non_finite().empty());
    m.store.grad("e.2")[0][0] = std::nan("");
    CHECK(m.store.first_non_finite() == "e.2");
    m.store.grad("kv.weight")[1][1] = INFINITY;
    CHECK(m.store.first_non_finite() == "kv.weight");
}

TEST_CASE("param: gradients of matrices count as zero from begin_grads on, whatever they hold until they are written or settled", "[param]") {
    Model m(options("fp32"));
    auto& store = m.store;
    auto fill = [&] {
        for (auto& b : store.buckets()) b.grad.fill_(3);
    };
    fill();
    store.begin_grads();
    CHECK(m.experts->is_grad_stale);
    CHECK(m.packed->is_grad_stale);
    CHECK_FALSE(m.gamma->is_grad_stale);                                  // its kernel adds
    CHECK(m.gamma->grad.abs().sum().item<double>() == 0);
    CHECK(store.grad("e.1").abs().sum().item<double>() == 0);             // whoever looks sees zeros
    fill();
    store.begin_grads();
    m.experts->grad.fill_(2);                                             // a kernel overwrites it
    m.experts->is_grad_stale = false;
    store.reduce_grads();
    CHECK((store.grad("e.1") == 2).all().item<bool>());
    store.begin_grads();
    store.reduce_grads();                                                 // nobody wrote it
    CHECK(m.experts->grad.abs().sum().item<double>() == 0);
    store.begin_grads();
    m.experts->grad.fill_(2);
    store.mark_grads_written();
    store.reduce_grads();
    CHECK((store.grad("e.1") == 2).all().item<bool>());
    fill();
    store.begin_grads();
    store.zero_grads();
    CHECK_FALSE(m.experts->is_grad_stale);
    CHECK(m.experts->grad.abs().sum().item<double>() == 0);
}

TEST_CASE("param: wrong use is a clear error", "[param]") {
    Model m(options("fp32"));
    auto unknown = error_of([&] { m.store.value("q.weigth"); });
    CHECK(unknown.kind() == ErrorKind::config);
    CHECK(std::string(unknown.what()).find("q.weight") != std::string::npos);
    CHECK(error_of([&] { m.store.declare({"x", BucketKind::dense, {matrix("x", {2, 2})}, {2, 2}}); }).kind() == ErrorKind::state);
    ParamStore store(dist::Mesh{}, options("fp32"));
    store.declare({"a", BucketKind::dense, {matrix("a", {2, 2})}, {2, 2}});
    CHECK(error_of([&] { store.value("a"); }).kind() == ErrorKind::state);
    CHECK(error_of([&] { store.declare({"a", BucketKind::dense, {matrix("b", {2, 2})}, {2, 2}}); }).kind() == ErrorKind::config);
    CHECK(error_of([&] { store.declare({"c", BucketKind::dense, {matrix("a", {2, 2})}, {2, 2}}); }).kind() == ErrorKind::config);
    CHECK(error_of([&] { store.declare({"d", BucketKind::dense, {matrix("d", {2, 2})}, {2, 3}}); }).kind() == ErrorKind::shape);
    CHECK(error_of([&] { store.declare({"e", BucketKind::dense, {matrix("e", {2, 0})}, {2, 0}}); }).kind() == ErrorKind::shape);
    CHECK(error_of([] { ParamStore(dist::Mesh{}, options("fp32", 4)); }).kind() == ErrorKind::config);
}

TEST_CASE("param: a model that does not fit says how many bytes it wants", "[param]") {
    ParamStore store(dist::Mesh{}, options("bf16"));
    store.declare({"huge", BucketKind::expert, {matrix("huge", {int64_t(1) << 30, 1 << 20})}, {int64_t(1) << 30, 1 << 20}});
    auto e = error_of([&] { store.build(); });
    CHECK(e.kind() == ErrorKind::memory);
    // 2^50 elements of 2 (value) + 4 (gradient) + 12 (master, two moments) bytes.
    CHECK(e.parts().want.find("16777216.00 GiB") != std::string::npos);
    CHECK(e.parts().op == "parameters");
}
