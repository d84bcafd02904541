// ParamStore on two or four ranks: ZeRO 1 against ZeRO 0, gradients summed once, norms counted once.
#include "core/base/error.h"
#include "core/param/param_store.h"

#include <ATen/ATen.h>

#include "tests/catch.h"      // last: a LibTorch header defines a CHECK of its own

using namespace moe;
using namespace moe::dist;

namespace {
struct Model {
    Mesh mesh;
    std::unique_ptr<ParamStore> store;
    int64_t ep_rank;

    Model(int zero, int64_t ep, const std::string& precision) {
        DistributedConfig config;
        config.expert_parallel_size = ep;
        mesh = make_mesh(config, world());
        ep_rank = mesh.ep.rank();
        StoreOptions o;
        o.precision = Precision::named(precision);
        o.zero_stage = zero;
        o.seed = 3;
        store = std::make_unique<ParamStore>(mesh, o);
        auto tensor = [](std::string name, std::vector<int64_t> shape, bool frozen = false) { return TensorSpec{std::move(name), std::move(shape), 0.1, 0, true, frozen}; };
        store->declare({"embed", BucketKind::dense, {tensor("embed", {515, 3})}, {515, 3}});
        store->declare({"norm", BucketKind::dense, {TensorSpec{"norm", {7}, 0, 1, false, false}}, {7}});
        store->declare({"qkv", BucketKind::dense, {tensor("q", {130, 5}), tensor("kv", {40, 5})}, {170, 5}});
        store->declare({"gate", BucketKind::router, {tensor("gate", {9, 3})}, {9, 3}});
        WeightSpec up{"up", BucketKind::expert, {}, {4 / ep, 130, 3}};
        for (int64_t e = ep_rank * 4 / ep; e < (ep_rank + 1) * 4 / ep; ++e) up.tensors.push_back(tensor("expert." + std::to_string(e), {130, 3}, e == 1));
        store->declare(up);
        store->build();
    }

    /// Gradient of rank r: known to all ranks. Whole numbers, so that sums are exact in any order.
    Tensor gradient(const std::string& name, int r) const {
        const auto& spec = store->spec(name);
        int64_t n = 1;
        for (int64_t d : spec.shape) n *= d;
        return ((at::arange(n, at::kDouble) * 3 + double(name.size()) + r * 11).remainder(17) - 8).view(spec.shape);
    }
    void fill_gradients() {
        for (const auto& name : store->names()) store->grad(name).copy_(gradient(name, world().rank()));
    }
    /// Sum over the ranks that hold the tensor.
    Tensor summed(const std::string& name) const {
        Tensor total = at::zeros(store->spec(name).shape, at::kDouble);
        if (store->spec(name).frozen) return total;
        int64_t ep = mesh.ep.size();
        for (int r = 0; r < world().size(); ++r)
            if (store->bucket_of(name) != BucketKind::expert || r % ep == ep_rank) total += gradient(name, r);
        return total;
    }
    /// master −= lr · grad on the own parts; value becomes master rounded.
    void update(double lr) {
        for (Bucket& b : store->buckets()) {
            int64_t n = b.own_end - b.own_begin;
            Master own = b.master_of(b.own_begin, b.own_end);
            own.write(own.read() - lr * b.grad.narrow(0, b.own_begin, n));
        }
        store->gather_values();
    }
    double squared_norm() {
        double sum = 0;
        for (Bucket& b : store->buckets()) sum += b.grad.narrow(0, b.norm_begin, b.norm_end - b.norm_begin).to(at::kDouble).square().sum().item<double>();
        return world().all_reduce(sum);
    }
};
}  // namespace

TEST_CASE("param: after reduction, update and gather ZeRO 1 equals ZeRO 0 and every rank agrees", "[dist]") {
    for (int64_t ep = 1; ep <= world().size(); ep *= 2)
        for (const char* precision : {"fp64", "fp32", "bf16"}) {
            Model zero(0, ep, precision), one(1, ep, precision);
            std::map<std::string, Tensor> want;
            for (const auto& name : zero.store->names()) {
                want[name] = zero.store->master(name).to(at::kDouble);
                CHECK(at::equal(one.store->value(name), zero.store->value(name)));
            }
            for (int step = 0; step < 2; ++step)
                for (Model* m : {&zero, &one}) {
                    m->store->zero_grads();
                    m->fill_gradients();
                    m->store->reduce_grads();
                    m->update(0.25);
                }
            for (const auto& name : zero.store->names()) {
                Tensor expected = want[name] - 0.5 * zero.summed(name);
                CHECK(at::allclose(zero.store->master(name).to(at::kDouble), expected, 1e-5, 1e-5));
                CHECK(at::equal(one.store->master(name), zero.store->master(name)));
                CHECK(at::equal(one.store->value(name), zero.store->value(name)));
                if (one.store->bucket_of(name) == BucketKind::expert) continue;
                Tensor first = one.store->value(name).clone();
                world().broadcast(first, 0);
                CHECK(at::equal(first, one.store->value(name)));
            }
        }
}

TEST_CASE("param: gradients are sums over the ranks that hold the parameter, under EP too", "[dist]") {
    for (int64_t ep = 1; ep <= world().size(); ep *= 2) {
        Model m(0, ep, "fp32");
        m.fill_gradients();
        m.store->reduce_grads();
        for (const auto& name : m.store->names()) CHECK(at::equal(m.store->grad(name).to(at::kDouble), m.summed(name)));
    }
}

TEST_CASE("param: the norm counts every element of the world once", "[dist]") {
    for (int64_t ep = 1; ep <= world().size(); ep *= 2)
        for (int zero : {0, 1}) {
            Model m(zero, ep, "fp64");
            m.fill_gradients();
            m.store->reduce_grads();
            double want = 0;      // dense once; experts once a rank of ep, that is once each
            for (const auto& name : m.store->names()) {
                double s = m.summed(name).square().sum().item<double>();
                want += m.store->bucket_of(name) == BucketKind::expert ? m.mesh.ep.all_reduce(s) : s;
            }
            CHECK(m.squared_norm() == Approx(want).epsilon(1e-14));
        }
}

TEST_CASE("param: under ZeRO 1 the pieces of all ranks make up every tensor once, cut at multiples of 128 rows", "[dist]") {
    Model m(1, 1, "bf16");
    std::map<std::string, int64_t> rows;
    bool cut = false;
    for (const auto& piece : m.store->rectangles()) {
        rows[piece.name] += piece.shape[0];
        CHECK(piece.offset[0] % 128 == 0);
        cut |= piece.shape[0] != m.store->spec(piece.name).shape[0];
    }
    for (const auto& name : m.store->names()) CHECK(world().all_reduce(rows[name]) == m.store->spec(name).shape[0]);
    CHECK(world().all_reduce(int64_t(cut)) > 0);      // the case tests something
    for (Bucket& b : m.store->buckets()) {
        CHECK(b.master.numel() == b.own_end - b.own_begin);
        CHECK(b.counts[b.group.rank()] == b.master.numel());
        CHECK(b.group.all_reduce(b.master.numel()) == b.value.numel());
        int64_t covered = 0;
        for (const auto& r : b.ranges) covered += r.end - r.begin;
        CHECK(covered == b.master.numel());
    }
}

TEST_CASE("param: set and master work on cut tensors", "[dist]") {
    for (const char* precision : {"fp32", "bf16"}) {
        Model m(1, 1, precision);
        Tensor from = at::arange(515 * 3, at::kDouble).view({515, 3}) / 7;
        m.store->set("embed", from);
        CHECK(at::equal(m.store->master("embed"), from.to(at::kFloat)));
        CHECK(at::equal(m.store->value("embed"), from.to(at::kFloat).to(m.store->value("embed").scalar_type())));
    }
}

TEST_CASE("param: initial weights do not depend on the number of ranks", "[dist]") {
    Model m(1, 2, "fp32");
    StoreOptions o;
    o.seed = 3;
    ParamStore alone(Mesh{}, o);
    for (const auto& name : m.store->names()) {
        auto spec = m.store->spec(name);
        alone.declare({name, m.store->bucket_of(name), {spec}, spec.shape});
    }
    alone.build();
    for (const auto& name : m.store->names()) CHECK(at::equal(alone.value(name), m.store->value(name)));
}
