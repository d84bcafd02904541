#ifdef MOE_WITH_CUDA
#include "core/kernels/adamw/adamw_kernels.h"

#include "core/kernels/adamw/adamw_sm90.h"
#include "core/kernels/common/cuda_check.h"

#include <ATen/ops/empty.h>

#include <algorithm>
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
sm90::AdamWRule rule_of(const AdamWOptions& o) {
    return {o.grad_scale, o.decoupled ? 0 : o.weight_decay, o.beta1, o.beta2, o.decoupled ? 1 - o.lr * o.weight_decay : 1, o.lr / (1 - std::pow(o.beta1, double(o.step))),
            1 / std::sqrt(1 - std::pow(o.beta2, double(o.step))), o.eps};
}
}  // namespace

void adamw_cuda(const Master& master, const Tensor& grad, Tensor m, Tensor v, const AdamWOptions& o) {
    OnDevice on(master.data);
    sm90::AdamW p{};
    p.n = master.data.numel(), p.weights = weights("adamw", master), p.grad = range("adamw", grad), p.m = range("adamw", m), p.v = range("adamw", v);
    p.rule = rule_of(o);
    MOE_CUDA_CHECK(sm90::adamw(p, on.stream));
}

namespace {
/// Whether the pass over tiles takes it.
bool is_tiled(const AdamWMatrix& a) {
    auto narrow = [](const Tensor& t) { return t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16; };
    auto aligned = [](std::initializer_list<Tensor> tensors) {
        return std::all_of(tensors.begin(), tensors.end(), [](const Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0; });
    };
    return a.master.is_split() && narrow(a.grad) && narrow(a.m) && a.copy.q_EOI.size(1) % 16 == 0 && a.copy.q_EOI.size(2) % 16 == 0 &&
           aligned({a.master.value, a.master.data, a.grad, a.m, a.v, a.copy.q_EOI, a.copy.q_EIO});
}
sm90::AdamWTiles tiles_of(const AdamWMatrix& a) {
    return {out_pointer(a.master.value), out_pointer(a.master.data), out_pointer(a.m), out_pointer(a.v), out_pointer(a.copy.q_EOI), out_pointer(a.copy.q_EIO), in_pointer(a.grad),
            a.copy.scale_EOI.mutable_data_ptr<float>(), int(a.copy.q_EOI.size(1)), int(a.copy.q_EOI.size(2)), 0};
}
}  // namespace

void adamw_quantized_cuda(const std::vector<AdamWMatrix>& matrices, const AdamWOptions& o) {
    OnDevice on(matrices[0].master.data);
    sm90::AdamWTileList list;
    const Tensor &grad = matrices[0].grad, &m = matrices[0].m;
    auto flush = [&] {
        MOE_CUDA_CHECK(sm90::adamw_tiles(list, rule_of(o), sm90_dtype("adamw", grad), sm90_dtype("adamw", m), on.stream));
        list = {};
    };
    for (const AdamWMatrix& a : matrices) {
        if (!is_tiled(a) || a.grad.scalar_type() != grad.scalar_type() || a.m.scalar_type() != m.scalar_type()) {
            adamw_quantized_apart(a, o);
            continue;
        }
        if (list.count == sm90::kAdamWTiles) flush();
        list.add(tiles_of(a), a.copy.q_EOI.size(0));
    }
    flush();
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
