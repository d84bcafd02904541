#include "core/tensor/weight.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

namespace moe {
bool Fp8Copy::are_of(const Tensor& value) const { return q.defined() && version_ == int64_t(value._version()) && data_ == value.const_data_ptr(); }
void Fp8Copy::made_of(const Tensor& value) { version_ = int64_t(value._version()), data_ = value.const_data_ptr(); }

Tensor Weight::grad_to_add() {
    if (take_stale()) grad.zero_();
    return grad;
}

void GradSink::add(std::function<void()> make) {
    if (deferring_) queue_.push_back({segment_, micro_batch_, std::move(make)});
    else make();
}
void GradSink::defer(int segment, int micro_batch) {
    deferring_ = true;
    segment_ = segment;
    micro_batch_ = micro_batch;
}
void GradSink::drain(int segment, int micro_batch) {
    // Outside backward grad mode is on, and saved tensors come back with their grad_fn: out= products would refuse them.
    at::NoGradGuard no_grad;
    for (auto& d : queue_)
        if (d.segment == segment && d.micro_batch == micro_batch) {
            d.make();
            d.make = nullptr;
        }
    std::erase_if(queue_, [](const Deferred& d) { return !d.make; });
}
void GradSink::reset() {
    queue_.clear();
    deferring_ = false;
}
}  // namespace moe
