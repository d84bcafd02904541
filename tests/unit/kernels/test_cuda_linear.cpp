#include "core/kernels/embed/embed.h"
#include "core/kernels/linear/linear.h"
#include "core/kernels/norm/rmsnorm.h"
#include <torch/csrc/autograd/autograd.h>

#include "tests/unit/kernels/cuda_compare.h"       // after LibTorch, which has a CHECK of its own

using namespace moe;
using namespace moe::test;

namespace {
Op linear_op(int64_t T, int64_t I, int64_t O) {
    return [=](const Place& p) -> std::vector<Result> {
        Tensor x = p.leaf({T, I}, 1);
        auto w = p.weight({O, I}, 2, 0.3);
        Tensor y = kernels::linear(x, w);
        y.backward(p.random({T, O}, 3));
        return {{"y", y}, {"dx", x.grad()}, {"dw", w->grad}};
    };
}
Op linears_op(int64_t T, int64_t I, std::vector<int64_t> outs) {
    return [=](const Place& p) -> std::vector<Result> {
        Tensor x = p.leaf({T, I}, 1);
        std::vector<WeightPtr> weights;
        std::vector<Tensor> dys;
        for (int64_t O : outs) {
            weights.push_back(p.weight({O, I}, 2 + weights.size(), 0.3));
            dys.push_back(p.random({T, O}, 10 + weights.size()));
        }
        auto ys = kernels::linears(x, weights);
        torch::autograd::backward(ys, dys);
        std::vector<Result> out = {{"dx", x.grad()}};
        for (size_t k = 0; k < weights.size(); ++k) {
            out.push_back({"y", ys[k].detach()});
            out.push_back({"dw", weights[k]->grad});
        }
        return out;
    };
}
Op wide_op(int64_t T, int64_t I, int64_t O) {
    return [=](const Place& p) -> std::vector<Result> {
        Tensor x = p.leaf({T, I}, 1);
        auto w = p.weight(p.wide({O, I}, 2, 0.3));
        Tensor y = kernels::linear_wide(x, w);
        CHECK(y.scalar_type() == w->value.scalar_type());
        y.backward(p.wide({T, O}, 3));
        return {{"y", y}, {"dx", x.grad()}, {"dw", w->grad}};
    };
}
Op grouped_op(std::vector<int64_t> offsets, int64_t I, int64_t O) {
    return [=](const Place& p) -> std::vector<Result> {
        const int64_t R = offsets.back(), E = int64_t(offsets.size()) - 1;
        Tensor x = p.leaf({R, I}, 1);
        auto w = p.weight({E, O, I}, 2, 0.3);
        Tensor y = kernels::grouped_linear(x, longs(offsets), w);
        y.backward(p.random({R, O}, 3));
        return {{"y", y}, {"dx", x.grad()}, {"dw", w->grad}};
    };
}
}  // namespace

TEST_CASE("cuda linear: product and gradients are those of float64 on the CPU", "[gpu][kernels]") {
    if (!has_gpu()) return;
    compare("linear 37x40x24", linear_op(37, 40, 24), 5e-3);
    compare("linear 5x7x3", linear_op(5, 7, 3), 5e-3);
    compare("linear 300x1024x136", linear_op(300, 1024, 136), 5e-3);
    compare("linear no tokens", linear_op(0, 16, 8));
}

TEST_CASE("cuda linears: products of one x, dx added up by them", "[gpu][kernels]") {
    if (!has_gpu()) return;
    compare("linears 37x40", linears_op(37, 40, {24, 16, 8}), 8e-3);
    compare("linears 300x1024", linears_op(300, 1024, {136, 576}), 8e-3);
    compare("linears no tokens", linears_op(0, 16, {8, 4}));
}

TEST_CASE("cuda linear: the weight gradient of bf16 operands is added in fp32", "[gpu][kernels]") {
    if (!has_gpu()) return;
    auto op = [](const Place& p) -> std::vector<Result> {
        Tensor x = p.leaf({512, 64}, 1);
        auto w = p.weight({32, 64}, 2);
        kernels::linear(x, w).backward(p.random({512, 32}, 3));
        return {{"dw", w->grad}};
    };
    compare("linear dw", op, 2e-6, {at::kBFloat16});
}

TEST_CASE("cuda linear, rmsnorm, embed: bf16 main gradients are the sums rounded once", "[gpu][kernels]") {
    if (!has_gpu()) return;
    auto op = [](const Place& p) -> std::vector<Result> {
        // In fp64 on the CPU the same start, which bf16 holds exactly.
        auto narrow = [&](WeightPtr w) {
            if (p.device.is_cuda()) w->grad = w->grad.to(at::kBFloat16);
            return w;
        };
        Tensor x = p.leaf({512, 64}, 1), y = p.leaf({512, 64}, 4), anchor = p.leaf({1}, 5);
        auto w = narrow(p.weight({32, 64}, 2)), experts = narrow(p.weight({3, 32, 64}, 6)), gamma = narrow(p.weight({64}, 7)), table = narrow(p.weight({5, 64}, 8));
        kernels::linear(x, w).backward(p.random({512, 32}, 3));
        kernels::grouped_linear(x, longs({0, 200, 200, 512}), experts).backward(p.random({512, 32}, 3));
        kernels::rmsnorm(y, gamma, 1e-6).backward(p.random({512, 64}, 9));
        kernels::embed(anchor, on(p, at::full({512}, 3, at::kLong)), table).backward(p.random({512, 64}, 10));
        return {{"linear", w->grad}, {"grouped", experts->grad}, {"gamma", gamma->grad}, {"table", table->grad}};
    };
    compare("bf16 main gradient", op, 4e-3, {at::kBFloat16, at::kHalf});
}

TEST_CASE("cuda linear_wide: the router's product keeps fp32", "[gpu][kernels]") {
    if (!has_gpu()) return;
    auto values = [](const Place& p) -> std::vector<Result> { return {wide_op(77, 96, 9)(p)[0], wide_op(77, 96, 9)(p)[2]}; };
    compare("linear_wide", values, 1e-5);
    compare("linear_wide", wide_op(77, 96, 9), 5e-3);
    compare("linear_wide no tokens", wide_op(0, 96, 9));
}

TEST_CASE("cuda grouped_linear: experts with no rows, odd sizes, both tile sizes", "[gpu][kernels]") {
    if (!has_gpu()) return;
    compare("grouped small", grouped_op({0, 0, 5, 5, 22, 22, 40, 40}, 64, 48), 5e-3);
    compare("grouped odd widths", grouped_op({0, 3, 3, 10, 11}, 17, 9), 5e-3);
    compare("grouped one expert has all", grouped_op({0, 0, 0, 129, 129}, 32, 16), 5e-3);
    compare("grouped large tiles", grouped_op({0, 1000, 1000, 1001, 1800}, 256, 512), 5e-3, {at::kBFloat16});
    compare("grouped no rows", grouped_op({0, 0, 0}, 16, 8));
}

TEST_CASE("cuda grouped_linear: padded groups whose offsets only the device knows, and rows after them that are not read", "[gpu][kernels]") {
    if (!has_gpu()) return;
    auto op = [](std::vector<int64_t> offsets, int64_t rows, int64_t I, int64_t O) {
        return [=](const Place& p) -> std::vector<Result> {
            const int64_t R = offsets.back(), E = int64_t(offsets.size()) - 1;
            Tensor x = p.leaf({R, I}, 1), dy = p.random({R, O}, 3);
            auto w = p.weight({E, O, I}, 2, 0.3);
            if (!p.device.is_cuda()) {
                Tensor y = kernels::grouped_linear(x, longs(offsets), w);
                y.backward(dy);
                return {{"y", y}, {"dx", x.grad()}, {"dw", w->grad}};
            }
            auto longer = [&](const Tensor& t) { return at::cat({t.detach(), at::full({rows - R, t.size(1)}, NAN, t.options())}); };
            Tensor more = longer(x).requires_grad_(true);
            Tensor y = kernels::grouped_linear(more, {longs(offsets).to(p.device, at::kInt), 128}, w);
            y.backward(longer(dy));
            return {{"y", y.narrow(0, 0, R)}, {"dx", more.grad().narrow(0, 0, R)}, {"dw", w->grad}};
        };
    };
    compare("grouped padded", op({0, 0, 128, 384, 384, 512}, 768, 64, 48), 5e-3);
    compare("grouped padded, sizes of a model", op({0, 256, 256, 1024}, 1152, 256, 512), 5e-3, {at::kBFloat16});
    compare("grouped padded, one has all", op({0, 0, 640, 640}, 640, 128, 192), 5e-3, {at::kBFloat16});
    compare("grouped padded, nobody has any", op({0, 0, 0}, 128, 64, 64), 5e-3, {at::kBFloat16});
}

TEST_CASE("cuda grouped_linear: an expert with no rows leaves its gradient as it was", "[gpu][kernels]") {
    if (!has_gpu()) return;
    Place p{at::Device(at::kCUDA, 0), at::kBFloat16, at::kBFloat16};
    auto dw = grouped_op({0, 0, 200, 200, 300, 300}, 64, 64)(p)[2].value;
    for (int64_t e : {0, 2, 4}) CHECK((dw[e] == 0.25).all().item<bool>());
    CHECK_FALSE((dw[1] == 0.25).any().item<bool>());
}
