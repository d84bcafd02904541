#ifdef MOE_WITH_CUDA
#include "core/kernels/adamw/adamw_kernels.h"

#include "core/kernels/adamw/adamw_sm90.h"
#include "core/kernels/common/cuda_check.h"

#include <ATen/ops/empty.h>

#include <cmath>

namespace moe::kernels {
namespace {
sm90::Range range(std::string_view op, const Tensor& t) {
    return t.defined() ? sm90::Range{out_pointer(t), sm90_dtype(op, t)} : sm90::Range{nullptr, sm90::Dtype::fp32};
}
sm90::Weights weights(std::string_view op, const Master& m) {
    if (m.is_split()) return {{out_pointer(m.data), sm90::Dtype::fp32}, range(op, m.value), true};
    return {range(op, m.data), range(op, m.value), false};
}
}  // namespace

void adamw_cuda(const Master& master, const Tensor& grad, Tensor m, Tensor v, const AdamWOptions& o) {
    OnDevice on(master.data);
    sm90::AdamW p{};
    p.n = master.data.numel(), p.weights = weights("adamw", master), p.grad = range("adamw", grad), p.m = range("adamw", m), p.v = range("adamw", v);
    p.scale = o.grad_scale, p.beta1 = o.beta1, p.beta2 = o.beta2, p.eps = o.eps;
    p.pull = o.decoupled ? 0 : o.weight_decay, p.keep = o.decoupled ? 1 - o.lr * o.weight_decay : 1;
    p.rate = o.lr / (1 - std::pow(o.beta1, double(o.step))), p.root = 1 / std::sqrt(1 - std::pow(o.beta2, double(o.step)));
    MOE_CUDA_CHECK(sm90::adamw(p, on.stream));
}

void sgd_cuda(const Master& master, const Tensor& grad, Tensor buffer, const SgdOptions& o) {
    OnDevice on(master.data);
    sm90::Sgd p{};
    p.n = master.data.numel(), p.weights = weights("sgd", master), p.grad = range("sgd", grad), p.buffer = range("sgd", buffer);
    p.lr = o.lr, p.momentum = o.momentum, p.weight_decay = o.weight_decay, p.scale = o.grad_scale;
    MOE_CUDA_CHECK(sm90::sgd(p, on.stream));
}

void sum_of_squares_cuda(const Tensor& x, Tensor out) {
    OnDevice on(x);
    Tensor partial = at::empty({sm90::sum_parts(x.numel())}, out.options());
    MOE_CUDA_CHECK(sm90::sum_of_squares(range("sum_of_squares", x), x.numel(), partial.mutable_data_ptr<double>(), out.mutable_data_ptr<double>(), on.stream));
}
}  // namespace moe::kernels
#endif
