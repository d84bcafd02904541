#include "core/tensor/master.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/where.h>

namespace moe {
namespace {
constexpr int kNan = 0x7FC00000;
}  // namespace

std::pair<Tensor, Tensor> split_master(const Tensor& x) {
    Tensor bits = x.detach().to(at::kFloat).contiguous().view(at::kInt);
    bits = bits.masked_fill(x.isnan(), kNan);                              // one with a payload could round to an infinity, or over the end
    Tensor high = bits.add(0x8000).__rshift__(16);
    return {high.to(at::kShort).view(at::kBFloat16), bits.sub(high.__lshift__(16)).to(at::kShort)};
}

Tensor joined_master(const Tensor& weight, const Tensor& rest) {
    return weight.detach().contiguous().view(at::kShort).to(at::kInt).__lshift__(16).add(rest).view(at::kFloat);
}

Tensor rounded(const Tensor& x, at::ScalarType dtype) { return dtype == at::kBFloat16 && x.scalar_type() != dtype ? split_master(x).first : x.detach().to(dtype); }

bool Master::is_split() const { return data.scalar_type() == at::kShort; }

Tensor Master::read() const { return is_split() ? joined_master(value, data) : data; }

void Master::write(const Tensor& from) const {
    if (is_split()) {
        auto [weight, rest] = split_master(from.to(data.device()));
        value.copy_(weight);
        data.copy_(rest);
        return;
    }
    data.copy_(from);
    if (value.defined()) value.copy_(rounded(data, value.scalar_type()));
}

Master Master::narrow(int64_t begin, int64_t count) const { return {data.narrow(0, begin, count), value.defined() ? value.narrow(0, begin, count) : value}; }
Master Master::view(at::IntArrayRef shape) const { return {data.view(shape), value.defined() ? value.view(shape) : value}; }
}  // namespace moe
