// Access by name, and what a training step does with the store.
#include "core/param/param_store.h"

#include "core/base/error.h"
#include "core/base/suggest.h"
#include "core/tensor/check.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

namespace moe {
namespace {
int64_t row_elements(const std::vector<int64_t>& shape) {
    int64_t n = 1;
    for (size_t i = 1; i < shape.size(); ++i) n *= shape[i];
    return n;
}

/// How many of the elements [offset, offset + count) each rank of a cut bucket owns.
std::vector<int64_t> shares(const Bucket& b, int64_t offset, int64_t count) {
    if (b.counts.empty()) return {count};
    std::vector<int64_t> out;
    int64_t begin = 0;
    for (int64_t n : b.counts) {
        out.push_back(std::max<int64_t>(0, std::min(begin + n, offset + count) - std::max(begin, offset)));
        begin += n;
    }
    return out;
}
}  // namespace

Master Bucket::master_of(int64_t begin, int64_t end) const {
    Master m{master.narrow(0, begin - own_begin, end - begin), {}};
    if (value.scalar_type() != master.scalar_type()) m.value = value_of(begin, end);
    return m;
}

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
    MOE_CHECK(built_ && stage_of(BucketKind(p.bucket)) < 3, state, name, built_ ? "values cut by ZeRO 3" : "value before build()", "master(), which gathers, after build()", "");
    return buckets_[p.bucket].value_of(p.offset, p.offset + p.count).view(p.spec.local_shape());
}

Tensor ParamStore::grad(const std::string& name) const {
    const Placed& p = placed(name);
    MOE_CHECK(built_ && options_.training && stage_of(BucketKind(p.bucket)) < 2, state, name, !built_ ? "gradient before build()" : options_.training ? "gradients cut by ZeRO" : "a gradient without training",
              "a store built for training, ZeRO 0 or 1", "");
    const_cast<ParamStore*>(this)->settle_grads();      // what it shows is the same
    return buckets_[p.bucket].grad_of(p.offset, p.offset + p.count).view(p.spec.local_shape());
}

Tensor ParamStore::joined(const Placed& p, bool is_shared_out, const std::function<Tensor(int64_t, int64_t)>& own) const {
    const Bucket& bucket = buckets_[p.bucket];
    Tensor local;
    if (!is_shared_out) {
        local = own(p.offset, p.offset + p.count).clone();
    } else {
        auto counts = shares(bucket, p.offset, p.count);
        int64_t mine = counts[size_t(bucket.group.rank())], begin = mine > 0 ? std::max(p.offset, bucket.own_begin) : bucket.own_begin;
        Tensor part = own(begin, begin + mine);
        local = at::empty({p.count}, part.options());
        bucket.group.all_gather(part, local, counts);
    }
    local = local.view(p.spec.local_shape());
    if (p.spec.cut_dim < 0) return local;
    Tensor whole = at::zeros(p.spec.shape, local.options());            // every element comes from one rank, so the sum is exact
    whole.narrow(p.spec.cut_dim, p.spec.cut_begin, p.spec.cut_size).copy_(local);
    mesh_.tp.all_reduce(whole);
    return whole;
}

Tensor ParamStore::master(const std::string& name) {
    const Placed& p = placed(name);
    MOE_CHECK(built_, state, name, "master before build()", "build() first", "");
    const Bucket& b = buckets_[p.bucket];
    bool from_value = !b.master.defined();
    auto own = [&](int64_t begin, int64_t end) { return from_value ? b.value_of(begin, end) : b.master_of(begin, end).read(); };
    return joined(p, !b.counts.empty() && (!from_value || stage_of(b.kind) >= 3), own).to(options_.precision.master);
}

Tensor ParamStore::whole_grad(const std::string& name) {
    const Placed& p = placed(name);
    MOE_CHECK(built_ && options_.training, state, name, built_ ? "a gradient without training" : "gradient before build()", "a store built for training", "");
    settle_grads();
    const Bucket& b = buckets_[p.bucket];
    return joined(p, !b.counts.empty(), [&](int64_t begin, int64_t end) { return b.grad_of(begin, end); });
}

std::vector<Tensor> ParamStore::whole_state(const std::string& name) {
    const Placed& p = placed(name);
    MOE_CHECK(built_, state, name, "state before build()", "build() first", "");
    const Bucket& b = buckets_[p.bucket];
    std::vector<Tensor> out;
    for (const Tensor& s : b.state) out.push_back(joined(p, !b.counts.empty(), [&](int64_t begin, int64_t end) { return s.narrow(0, begin - b.own_begin, end - begin); }));
    return out;
}

void ParamStore::set(const std::string& name, const Tensor& from) {
    const Placed& p = placed(name);
    MOE_CHECK(built_, state, name, "set before build()", "build() first", "");
    MOE_CHECK(from.defined() && from.sizes() == at::IntArrayRef(p.spec.shape), shape, name, describe(from), shape_text(p.spec.shape), "");
    MOE_CHECK(at::isFloatingType(from.scalar_type()), dtype, name, dtype_text(from.scalar_type()), "a float dtype", "");
    write(buckets_[p.bucket], p.offset, p.spec.cut_dim < 0 ? from : from.narrow(p.spec.cut_dim, p.spec.cut_begin, p.spec.cut_size));
}

std::vector<OwnedPiece> ParamStore::pieces(bool once, bool with_tensors) const {
    std::vector<OwnedPiece> list;
    for (int k = 0; k < kNumBuckets; ++k) {
        const Bucket& b = buckets_[k];
        int64_t part_begin = once ? b.norm_begin : b.own_begin, part_end = once ? b.norm_end : b.own_end;
        for (const Placed* p : tensors_of(k)) {
            int64_t begin = std::max(p->offset, part_begin), end = std::min(p->offset + p->count, part_end);
            if (begin >= end) continue;
            const TensorSpec& t = p->spec;
            OwnedPiece piece{{t.name, std::vector<int64_t>(t.shape.size(), 0), t.local_shape()}, t.shape, {}, {}};
            auto& [name, offset, shape] = piece.rectangle;
            if (!shape.empty()) {
                int64_t row = row_elements(shape);
                offset[0] = (begin - p->offset) / row;
                shape[0] = (end - begin) / row;
                if (t.cut_dim >= 0) offset[size_t(t.cut_dim)] += t.cut_begin;
            }
            if (with_tensors) {
                piece.master = (b.master.defined() ? b.master_of(begin, end) : Master{b.value_of(begin, end), {}}).view(shape);
                for (const Tensor& s : b.state) piece.state.push_back(s.narrow(0, begin - b.own_begin, end - begin).view(shape));
            }
            list.push_back(std::move(piece));
        }
    }
    return list;
}

std::vector<Rectangle> ParamStore::rectangles() const {
    std::vector<Rectangle> list;
    for (auto& piece : pieces(false, false)) list.push_back(piece.rectangle);
    return list;
}

std::vector<OwnedPiece> ParamStore::owned(bool once) const {
    MOE_CHECK(built_, state, "owned pieces", "a store before build()", "build() first", "");
    return pieces(once, true);
}

const ParamStore::Handle& ParamStore::handle_of(const WeightPtr& weight) const {
    auto found = handle_index_.find(weight.get());
    MOE_CHECK(found != handle_index_.end(), internal, weight->name, "a handle of another store", "one of this store", "");
    return handles_[found->second];
}

void ParamStore::gather_value(const Handle& h) {
    Bucket& b = buckets_[int(h.spec.bucket)];
    Tensor whole = at::empty({h.count}, b.value.options());
    auto counts = shares(b, h.offset, h.count);
    int64_t mine = counts[size_t(b.group.rank())], begin = std::clamp(h.offset, b.own_begin, b.own_end);
    b.group.all_gather(mine > 0 ? b.value_of(begin, begin + mine) : b.value.narrow(0, 0, 0), whole, counts);
    h.weight->value = whole.view(h.spec.shape);
    h.weight->fp8.forget();                             // other values may lie where the last ones did
}

void ParamStore::scatter_grad(const Handle& h) {
    Bucket& b = buckets_[int(h.spec.bucket)];
    auto counts = shares(b, h.offset, h.count);
    int64_t mine = counts[size_t(b.group.rank())], begin = std::clamp(h.offset, b.own_begin, b.own_end);
    Tensor part = at::empty({mine}, b.grad.options());
    b.group.reduce_scatter(h.weight->grad.view(-1), part, counts);
    if (mine > 0) b.grad_of(begin, begin + mine).add_(part);
}

void ParamStore::gather(const std::vector<WeightPtr>& weights, bool with_grads) {
    if (!is_cut()) return;
    for (auto& w : weights) {
        const Handle& h = handle_of(w);
        Bucket& b = buckets_[int(h.spec.bucket)];
        int stage = stage_of(b.kind);
        if (stage >= 3) gather_value(h);
        if (stage >= 2 && with_grads && options_.training && !h.frozen) w->grad = at::zeros(h.spec.shape, b.grad.options());
    }
}

void ParamStore::release(const std::vector<WeightPtr>& weights, bool with_grads) {
    if (!is_cut()) return;
    for (auto& w : weights) {
        const Handle& h = handle_of(w);
        int stage = stage_of(h.spec.bucket);
        if (stage >= 2 && with_grads && w->grad.defined()) {
            scatter_grad(h);
            w->grad.reset();
        }
        if (stage >= 3) w->value.reset();
    }
}

void ParamStore::drop(const std::vector<WeightPtr>& weights) {
    if (!is_cut()) return;
    for (auto& w : weights) {
        int stage = stage_of(handle_of(w).spec.bucket);
        if (stage >= 2) w->grad.reset();
        if (stage >= 3) w->value.reset();
    }
}

int64_t ParamStore::num_parameters() const {
    int64_t n = 0;
    for (const auto& [name, p] : tensors_) n += p.count;
    return n;
}

void ParamStore::zero_grads() {
    mark_grads_written();
    for (Bucket& b : buckets_)
        if (b.grad.defined()) b.grad.zero_();
}

void ParamStore::begin_grads() {
    if (is_cut()) return zero_grads();                  // room for a whole gradient is made anew in every backward
    for (Handle& h : handles_) {
        if (!h.weight->grad.defined()) continue;
        h.weight->is_grad_stale = h.spec.shape.size() >= 2;             // made by products, which know of it
        if (!h.weight->is_grad_stale) h.weight->grad.zero_();
    }
}

void ParamStore::settle_grads() {
    for (Handle& h : handles_)
        if (h.weight->is_grad_stale) h.weight->grad_to_add();
}

void ParamStore::mark_grads_written() {
    for (Handle& h : handles_) h.weight->is_grad_stale = false;
}

void ParamStore::reduce_grads() {
    if (!options_.training) return;
    settle_grads();
    for (const auto& [name, p] : tensors_) {
        if (!p.spec.frozen) continue;               // a neighbour in the same handle may have made one
        Bucket& b = buckets_[p.bucket];
        int64_t begin = std::max(p.offset, b.grad_begin), end = std::min(p.offset + p.count, b.grad_begin + b.grad.numel());
        if (begin < end) b.grad_of(begin, end).zero_();
    }
    for (Bucket& b : buckets_) {
        if (b.group.size() == 1 || stage_of(b.kind) >= 2) continue;
        if (b.counts.empty()) {
            if (b.grad.numel() > 0) b.group.all_reduce(b.grad);
        } else if (b.grad.numel() > 0) {
            b.group.reduce_scatter(b.grad, b.grad.narrow(0, b.own_begin, b.own_end - b.own_begin), b.counts);
        }
    }
}

std::vector<const ParamStore::Handle*> ParamStore::squared_handles(const Bucket& b) const {
    std::vector<const Handle*> list;
    if (b.group.size() > 1 || is_cut()) return list;               // a reduction has written since
    for (const Handle& h : handles_) {
        const Weight& w = *h.weight;
        bool some_frozen = std::any_of(h.spec.tensors.begin(), h.spec.tensors.end(), [](const TensorSpec& t) { return t.frozen; });
        if (h.spec.bucket == b.kind && !some_frozen && w.grad.defined() && w.grad_squares.parts.defined() && w.grad_squares.version == int64_t(w.grad._version())) list.push_back(&h);
    }
    std::sort(list.begin(), list.end(), [](const Handle* x, const Handle* y) { return x->offset < y->offset; });
    return list;
}

GradNormParts ParamStore::grad_norm_parts() const {
    GradNormParts out;
    for (const Bucket& b : buckets_) {
        int64_t at = b.norm_begin;
        auto up_to = [&](int64_t end) {
            if (end > at) out.rest.push_back(b.grad_of(at, end));
        };
        for (const Handle* h : squared_handles(b)) {
            up_to(h->offset);
            out.known.push_back(h->weight->grad_squares.parts);
            at = h->offset + h->count;
        }
        up_to(b.norm_end);
    }
    return out;
}

std::string ParamStore::first_non_finite() const {
    if (!options_.training) return {};
    for (const auto& name : names_) {
        const Placed& p = tensors_.at(name);
        const Bucket& b = buckets_[p.bucket];
        int64_t begin = std::max(p.offset, b.grad_begin), end = std::min(p.offset + p.count, b.grad_begin + b.grad.numel());
        if (begin < end && !at::isfinite(b.grad_of(begin, end)).all().item<bool>()) return name;
    }
    return {};
}

std::vector<PlacedWeight> ParamStore::quantized_weights(const Bucket& b) const {
    std::vector<PlacedWeight> list;
    for (const Handle& h : handles_)
        if (h.spec.bucket == b.kind && h.weight->value.defined() && h.weight->fp8.q.defined() && h.offset >= b.own_begin && h.offset + h.count <= b.own_end)
            list.push_back({h.weight, h.offset, h.offset + h.count});
    return list;                                       // declared in the order of their offsets
}

void ParamStore::gather_values() {
    for (Bucket& b : buckets_) b.value.unsafeGetTensorImpl()->bump_version();      // the optimizer's kernels write through pointers
    for (Bucket& b : buckets_)
        if (stage_of(b.kind) < 3 && b.group.size() > 1 && !b.counts.empty() && b.value.numel() > 0)
            b.group.all_gather(b.value.narrow(0, b.own_begin, b.own_end - b.own_begin), b.value, b.counts);
}
}  // namespace moe
