// Access by name, and what a training step does with the store.
#include "core/param/param_store.h"

#include "core/base/error.h"
#include "core/base/suggest.h"
#include "core/tensor/check.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/isfinite.h>

#include <algorithm>

namespace moe {
namespace {
int64_t row_elements(const std::vector<int64_t>& shape) {
    int64_t n = 1;
    for (size_t i = 1; i < shape.size(); ++i) n *= shape[i];
    return n;
}
}  // namespace

const ParamStore::Placed& ParamStore::placed(const std::string& name) const {
    auto found = tensors_.find(name);
    if (found != tensors_.end()) return found->second;
    MOE_THROW(config, "parameter", name, fmt::format("one of {} names", names_.size()), did_you_mean(name, names_));
}

const TensorSpec& ParamStore::spec(const std::string& name) const { return placed(name).spec; }
BucketKind ParamStore::bucket_of(const std::string& name) const { return BucketKind(placed(name).bucket); }
int64_t ParamStore::offset_of(const std::string& name) const { return placed(name).offset; }

Tensor ParamStore::value(const std::string& name) const {
    const Placed& p = placed(name);
    MOE_CHECK(built_, state, name, "value before build()", "build() first", "");
    return buckets_[p.bucket].value.narrow(0, p.offset, p.count).view(p.spec.shape);
}

Tensor ParamStore::grad(const std::string& name) const {
    const Placed& p = placed(name);
    MOE_CHECK(built_ && options_.training, state, name, built_ ? "a gradient without training" : "gradient before build()", "a store built for training", "");
    return buckets_[p.bucket].grad.narrow(0, p.offset, p.count).view(p.spec.shape);
}

Tensor ParamStore::master(const std::string& name) {
    const Placed& p = placed(name);
    MOE_CHECK(built_, state, name, "master before build()", "build() first", "");
    Bucket& bucket = buckets_[p.bucket];
    if (!bucket.master.defined()) return value(name).to(options_.precision.master);
    if (bucket.counts.empty()) return bucket.master.narrow(0, p.offset, p.count).view(p.spec.shape).clone();
    std::vector<int64_t> counts;
    int64_t begin = 0, own_begin = 0, own = 0;
    for (int r = 0; r < bucket.group.size(); ++r) {
        int64_t lo = std::max(begin, p.offset), hi = std::min(begin + bucket.counts[r], p.offset + p.count);
        counts.push_back(std::max<int64_t>(0, hi - lo));
        if (r == bucket.group.rank() && hi > lo) own_begin = lo - bucket.own_begin, own = hi - lo;
        begin += bucket.counts[r];
    }
    Tensor whole = at::empty({p.count}, bucket.master.options());
    bucket.group.all_gather(bucket.master.narrow(0, own_begin, own), whole, counts);
    return whole.view(p.spec.shape);
}

void ParamStore::set(const std::string& name, const Tensor& from) {
    const Placed& p = placed(name);
    MOE_CHECK(built_, state, name, "set before build()", "build() first", "");
    MOE_CHECK(from.defined() && from.sizes() == at::IntArrayRef(p.spec.shape), shape, name, describe(from), shape_text(p.spec.shape), "");
    MOE_CHECK(at::isFloatingType(from.scalar_type()), dtype, name, dtype_text(from.scalar_type()), "a float dtype", "");
    write(buckets_[p.bucket], p.offset, from);
}

std::vector<Rectangle> ParamStore::rectangles() const {
    std::vector<Rectangle> list;
    for (int k = 0; k < kNumBuckets; ++k)
        for (const Placed* p : tensors_of(k)) {
            int64_t begin = std::max(p->offset, buckets_[k].own_begin), end = std::min(p->offset + p->count, buckets_[k].own_end);
            if (begin >= end) continue;
            Rectangle piece{p->spec.name, 0, p->spec.shape};
            if (!piece.shape.empty()) {
                piece.offset = (begin - p->offset) / row_elements(p->spec.shape);
                piece.shape[0] = (end - begin) / row_elements(p->spec.shape);
            }
            list.push_back(std::move(piece));
        }
    return list;
}

int64_t ParamStore::num_parameters() const {
    int64_t n = 0;
    for (const auto& [name, p] : tensors_) n += p.count;
    return n;
}

void ParamStore::zero_grads() {
    for (Bucket& b : buckets_)
        if (b.grad.defined()) b.grad.zero_();
}

void ParamStore::reduce_grads() {
    if (!options_.training) return;
    for (const auto& [name, p] : tensors_)
        if (p.spec.frozen) grad(name).zero_();      // a neighbour in the same handle may have made one
    for (Bucket& b : buckets_) {
        if (b.group.size() == 1 || b.grad.numel() == 0) continue;
        if (b.counts.empty()) b.group.all_reduce(b.grad);
        else b.group.reduce_scatter(b.grad, b.grad.narrow(0, b.own_begin, b.own_end - b.own_begin), b.counts);
    }
}

std::string ParamStore::first_non_finite() const {
    for (const auto& name : names_)
        if (options_.training && !at::isfinite(grad(name)).all().item<bool>()) return name;
    return {};
}

void ParamStore::gather_values() {
    for (Bucket& b : buckets_)
        if (b.group.size() > 1 && !b.counts.empty() && b.value.numel() > 0)
            b.group.all_gather(b.value.narrow(0, b.own_begin, b.own_end - b.own_begin), b.value, b.counts);
}
}  // namespace moe
