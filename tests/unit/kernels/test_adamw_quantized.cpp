#include "core/base/error.h"
#include "core/kernels/adamw/adamw.h"
#include "tests/unit/kernels/cuda_compare.h"

#include <limits>

using namespace moe;
using namespace moe::test;
using namespace moe::kernels;

namespace {
Tensor bytes(const Tensor& x) { return x.cpu().view(-1).view(at::kByte); }
/// What a matrix is made of: [E, O, I], types, whether its master is split.
struct Shape {
    int64_t E, O, I;
    at::ScalarType grad = at::kFloat, moments = at::kFloat;
    bool split = true;
};
QuantizedWeight blank(const Shape& s, const Tensor& like) {
    auto q = empty_quantized_weight(s.E, s.O, s.I, like);
    q.q_EOI.view(at::kByte).fill_(7);
    q.q_EIO.view(at::kByte).fill_(7);
    q.scale_EOI.fill_(-1);
    return q;
}
AdamWMatrix matrix(const Shape& s, at::Device device, uint64_t seed) {
    const Place p{device, at::kFloat, at::kFloat};
    const int64_t n = s.E * s.O * s.I;
    Tensor w = p.random({n}, seed).mul_(at::linspace(-12, 3, n, at::TensorOptions().device(device)).exp2());        // sizes that differ from tile to tile
    w.narrow(0, 0, std::min<int64_t>(n, 128)).zero_();
    auto [high, rest] = split_master(w);
    Master master = s.split ? Master{rest, high} : Master{w, high};
    return {master, at::empty({n}, w.options().dtype(s.grad)), at::zeros({n}, w.options().dtype(s.moments)), at::zeros({n}, w.options().dtype(s.moments)), blank(s, w)};
}
AdamWMatrix copy_of(const AdamWMatrix& a) {
    auto& q = a.copy;
    return {{a.master.data.clone(), a.master.value.clone()}, a.grad, a.m.clone(), a.v.clone(), {q.q_EOI.clone(), q.q_EIO.clone(), q.scale_EOI.clone()}};
}
/// Steps of all matrices at once against adamw and quantize_weight of each, bit for bit.
void check_steps(at::Device device, const std::vector<Shape>& shapes) {
    std::vector<AdamWMatrix> got, want;
    for (auto& s : shapes) {
        got.push_back(matrix(s, device, got.size() + 1));
        want.push_back(copy_of(got.back()));
    }
    for (int step = 1; step <= 3; ++step) {
        AdamWOptions o{.lr = 0.01, .weight_decay = 0.1, .grad_scale = 0.7, .step = step};
        o.decoupled = step < 3;
        for (size_t i = 0; i < got.size(); ++i) {
            Tensor g = Place{device, at::kFloat, at::kFloat}.random(got[i].grad.sizes(), 100 * uint64_t(step) + i);
            if (step == 1) g.narrow(0, 0, std::min<int64_t>(g.numel(), 40)).zero_();
            if (step == 3) g[g.numel() / 2] = i % 2 ? std::numeric_limits<float>::infinity() : std::nanf("");
            got[i].grad.copy_(g);                                   // shared with want's
        }
        adamw_quantized(got, o);
        for (size_t i = 0; i < want.size(); ++i) {
            auto& [master, grad, m, v, copy] = want[i];
            adamw(master, grad, m, v, o);
            quantize_weight(master.value.view(copy.q_EOI.sizes()), copy);
            INFO("step " << step << ", matrix " << i << " of " << shapes[i].E << " x " << shapes[i].O << " x " << shapes[i].I);
            CHECK(bytes(got[i].master.data).equal(bytes(master.data)));
            CHECK(bytes(got[i].master.value).equal(bytes(master.value)));
            CHECK(bytes(got[i].m).equal(bytes(m)));
            CHECK(bytes(got[i].v).equal(bytes(v)));
            CHECK(bytes(got[i].copy.q_EOI).equal(bytes(copy.q_EOI)));
            CHECK(bytes(got[i].copy.q_EIO).equal(bytes(copy.q_EIO)));
            CHECK(bytes(got[i].copy.scale_EOI).equal(bytes(copy.scale_EOI)));
        }
    }
}
}  // namespace

TEST_CASE("adamw_quantized: the copies and the step are those of two passes, bit for bit", "[kernels][adamw]") {
    check_steps(at::kCPU, {{1, 16, 144}, {3, 130, 48}, {2, 16, 16, at::kBFloat16, at::kBFloat16}, {1, 32, 160, at::kFloat, at::kFloat, false}});
    adamw_quantized({}, {});
}

TEST_CASE("adamw_quantized: copies of another shape and weights that have no E4M3 are named", "[kernels][adamw]") {
    AdamWMatrix a = matrix({1, 16, 32}, at::kCPU, 1), other = a;
    other.copy = matrix({1, 16, 48}, at::kCPU, 1).copy;
    CHECK_THROWS_WITH(adamw_quantized({a, other}, {}), Catch::Contains("q: got [1, 16, 48], want 512 elements"));
    other.copy = {a.copy.q_EOI, a.copy.q_EOI, a.copy.scale_EOI};
    CHECK_THROWS_WITH(adamw_quantized({other}, {}), Catch::Contains("transposed q") && Catch::Contains("[1, 32, 16]"));
    other = a;
    other.master = {at::zeros({512}), at::zeros({512}, at::kHalf)};
    CHECK_THROWS_WITH(adamw_quantized({other}, {}), Catch::Contains("float16"));
}

TEST_CASE("cuda adamw_quantized: one pass over tiles gives the bits of two passes", "[gpu][kernels]") {
    if (!has_gpu()) return;
    check_steps(at::kCUDA, {{1, 128, 128}, {3, 144, 272}, {1, 16, 16}, {2, 2816, 512}, {1, 576, 2048}, {1, 2048, 1408}, {5, 32, 112}});
    for (auto grad : {at::kFloat, at::kBFloat16})
        for (auto moments : {at::kFloat, at::kBFloat16}) check_steps(at::kCUDA, {{1, 256, 400, grad, moments}, {2, 48, 160, grad, moments}});
    check_steps(at::kCUDA, std::vector<Shape>(90, Shape{1, 48, 80}));                                                     // more than one launch takes
    check_steps(at::kCUDA, {{1, 128, 144}, {1, 48, 160, at::kBFloat16}, {1, 32, 160, at::kFloat, at::kFloat, false}});    // what the pass does not take goes apart
}
