// Building of the store: placing, cutting, allocating, filling. What reads it by name and what runs in a step is in access.cpp.
#include "core/param/param_store.h"

#include "core/base/error.h"
#include "core/base/host_memory.h"
#include "core/base/random.h"
#include "core/tensor/check.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <new>

namespace moe {
namespace {
/// Every handle starts at a multiple of this many elements: 64 bytes in fp32, whole vector registers and TMA's alignment.
constexpr int64_t kAlignment = 16;
/// Initial values pass through a host buffer of at most this many elements.
constexpr int64_t kInitElements = int64_t(1) << 22;

int64_t count_of(const std::string& name, const std::vector<int64_t>& shape) {
    int64_t n = 1;
    for (int64_t d : shape) MOE_CHECK(d >= 1 && !__builtin_mul_overflow(n, d, &n), shape, name, shape_text(shape), "sizes of at least 1 whose product fits 63 bits", "");
    return n;
}

at::ScalarType compute_type(const Precision& p, BucketKind kind) { return kind == BucketKind::router ? p.master : p.compute; }
/// Of Master::data beside weights of this type.
at::ScalarType master_type(const Precision& p, at::ScalarType compute) { return p.master == at::kFloat && compute == at::kBFloat16 ? at::kShort : p.master; }

std::string gib(double bytes) { return bytes < 1 << 20 ? fmt::format("{:.0f} bytes", bytes) : fmt::format("{:.2f} GiB", bytes / (1 << 30)); }

const char* to_string(BucketKind kind) {
    constexpr const char* names[kNumBuckets] = {"dense", "expert", "router", "tensor-parallel", "tied"};
    return names[int(kind)];
}
const dist::Group& group_of(const dist::Mesh& mesh, BucketKind kind) {
    switch (kind) {
        case BucketKind::expert: return mesh.expert_dp;
        case BucketKind::tensor: return mesh.dp;
        case BucketKind::tied: return mesh.tied;
        default: return mesh.stage;
    }
}

/// Bytes of a bucket of `total` elements that a rank allocates under this ZeRO stage.
double bytes_of(const Bucket& bucket, int64_t total, int stage, const StoreOptions& options) {
    const Precision& p = options.precision;
    int64_t own = bucket.own_end - bucket.own_begin;
    auto compute = compute_type(p, bucket.kind);
    double bytes = double(stage >= 3 ? own : total) * c10::elementSize(compute);
    if (!options.training) return bytes;
    return bytes + double(stage >= 2 ? own : total) * c10::elementSize(p.grad) + double(own) * (c10::elementSize(master_type(p, compute)) * (compute != p.master) + c10::elementSize(p.moments) * size_t(options.num_moments));
}

constexpr const char* kSmaller = "a smaller model, bf16 weights, expert parallelism or zero_stage 1 over more ranks";

/// A host gives out more memory than it has and kills who uses it: ask before.
void check_host_memory(double bytes, int64_t num_elements, bool training) {
    double available = double(host_memory().available);
    MOE_CHECK(bytes <= available, memory, "parameters", fmt::format("{} available on this host", gib(available)),
              fmt::format("{} for {} elements (weights{})", gib(bytes), num_elements, training ? ", gradients, optimizer state" : ""), kSmaller);
}
}  // namespace

std::vector<int64_t> TensorSpec::local_shape() const {
    std::vector<int64_t> local = shape;
    if (cut_dim >= 0) local.at(size_t(cut_dim)) = cut_size;
    return local;
}

ParamStore::ParamStore(const dist::Mesh& mesh, StoreOptions options) : mesh_(mesh), options_(std::move(options)) {
    MOE_CHECK(options_.zero_stage >= 0 && options_.zero_stage <= 3, config, "distributed.zero_stage", fmt::format("{}", options_.zero_stage), "0 to 3", "");
    for (int k = 0; k < kNumBuckets; ++k) {
        Bucket bucket;
        bucket.kind = BucketKind(k);
        bucket.group = group_of(mesh, bucket.kind);
        buckets_.push_back(std::move(bucket));
    }
}

WeightPtr ParamStore::declare(const WeightSpec& spec) {
    MOE_CHECK(!built_, state, spec.name, "declared after build()", "every parameter declared before it", "");
    int64_t together = 0;
    for (const TensorSpec& t : spec.tensors) {
        MOE_CHECK(t.cut_dim < int(t.shape.size()) && (t.cut_dim < 0 || (t.cut_begin >= 0 && t.cut_begin + t.cut_size <= t.shape[size_t(t.cut_dim)])), shape, t.name,
                  fmt::format("[{}, {}) of dim {}", t.cut_begin, t.cut_begin + t.cut_size, t.cut_dim), fmt::format("a part of {}", shape_text(t.shape)), "");
        together += count_of(t.name, t.local_shape());
    }
    int64_t count = count_of(spec.name, spec.shape);
    MOE_CHECK(count == together, shape, spec.name, fmt::format("{} of {} elements over tensors of {}", shape_text(spec.shape), count, together), "equal numbers", "");
    for (const Handle& h : handles_) MOE_CHECK(h.spec.name != spec.name, config, spec.name, "a handle declared twice", "one name each", "");
    int bucket = int(spec.bucket);
    int64_t offset = sizes_[bucket];
    Handle handle{spec, c10::make_intrusive<Weight>(), offset, count};
    handle.weight->name = spec.name;
    handle.weight->sink = &sink_;
    for (const TensorSpec& t : spec.tensors) {
        int64_t n = count_of(t.name, t.local_shape());
        bool added = tensors_.emplace(t.name, Placed{t, bucket, offset, n}).second;
        MOE_CHECK(added, config, t.name, "a parameter declared twice", "one name each", "");
        names_.push_back(t.name);
        offset += n;
    }
    sizes_[bucket] = (offset + kAlignment - 1) / kAlignment * kAlignment;
    handle_index_[handle.weight.get()] = handles_.size();
    handles_.push_back(std::move(handle));
    return handles_.back().weight;
}

std::vector<const ParamStore::Placed*> ParamStore::tensors_of(int bucket) const {
    std::vector<const Placed*> list;
    for (const auto& name : names_)
        if (const Placed& p = tensors_.at(name); p.bucket == bucket) list.push_back(&p);
    return list;
}

void ParamStore::build() {
    MOE_CHECK(!built_, state, "build", "a second call", "one", "");
    double bytes = 0;
    int64_t num_elements = 0;
    for (int k = 0; k < kNumBuckets; ++k) {
        cut(buckets_[k], k);
        bytes += bytes_of(buckets_[k], sizes_[k], stage_of(buckets_[k].kind), options_);
        num_elements += sizes_[k];
    }
    if (options_.device.is_cpu()) check_host_memory(bytes, num_elements, options_.training);
    for (Bucket& bucket : buckets_) allocate(bucket);
    initialise();
    fill_handles();
    built_ = true;
}

void ParamStore::cut(Bucket& bucket, int index) {
    int64_t total = sizes_[index];
    auto tensors = tensors_of(index);
    std::vector<Extent> extents;
    for (const Placed* p : tensors) extents.push_back({p->offset, p->spec.local_shape()});
    auto cuts = partition(extents, total, bucket.group.size(), options_.whole_tensors);
    int rank = bucket.group.rank();
    bucket.norm_begin = cuts[rank];
    bucket.norm_end = cuts[rank + 1];
    bool sharded = options_.zero_stage >= 1;
    bucket.own_begin = sharded ? bucket.norm_begin : 0;
    bucket.own_end = sharded ? bucket.norm_end : total;
    bucket.counts.clear();
    if (sharded)
        for (size_t r = 0; r + 1 < cuts.size(); ++r) bucket.counts.push_back(cuts[r + 1] - cuts[r]);
    // A tensor's range reaches to the next tensor's start: padding is treated like what it follows, and stays zero.
    for (size_t i = 0; i < tensors.size(); ++i) {
        int64_t begin = std::max(tensors[i]->offset, bucket.own_begin);
        int64_t end = std::min(i + 1 < tensors.size() ? tensors[i + 1]->offset : total, bucket.own_end);
        if (begin >= end) continue;
        Range range{begin, end, tensors[i]->spec.decay, tensors[i]->spec.frozen, 1};
        Range* last = bucket.ranges.empty() ? nullptr : &bucket.ranges.back();
        if (last && last->decay == range.decay && last->frozen == range.frozen && last->lr_scale == range.lr_scale) last->end = end;
        else bucket.ranges.push_back(range);
    }
}

void ParamStore::allocate(Bucket& bucket) {
    int64_t total = sizes_[int(bucket.kind)], own = bucket.own_end - bucket.own_begin;
    const Precision& p = options_.precision;
    auto compute = compute_type(p, bucket.kind);
    bool own_master = compute != p.master && options_.training;
    int stage = stage_of(bucket.kind);
    int64_t values = stage >= 3 ? own : total, grads = stage >= 2 ? own : total;
    bucket.value_begin = stage >= 3 ? bucket.own_begin : 0;
    bucket.grad_begin = stage >= 2 ? bucket.own_begin : 0;
    auto make = [&](int64_t n, at::ScalarType type) { return at::zeros({n}, at::TensorOptions().dtype(type).device(options_.device)); };
    auto failed = [&](const std::string& why) {
        MOE_THROW(memory, fmt::format("{} parameters", to_string(bucket.kind)), why.substr(0, why.find('\n')),
                  fmt::format("{} on {} for {} elements (weights{})", gib(bytes_of(bucket, total, stage, options_)), options_.device.str(), total, options_.training ? ", gradients, optimizer state" : ""),
                  kSmaller);
    };
    try {
        bucket.value = make(values, compute);
        if (compute == p.master) bucket.master = bucket.value_of(bucket.own_begin, bucket.own_end);
        if (!options_.training) return;
        if (own_master) bucket.master = make(own, master_type(p, compute));
        bucket.grad = make(grads, p.grad);
        for (int i = 0; i < options_.num_moments; ++i) bucket.state.push_back(make(own, p.moments));
    } catch (const c10::Error& e) {
        failed(e.what_without_backtrace());
    } catch (const std::bad_alloc& e) {
        failed(e.what());
    }
}

void ParamStore::initialise() {
    auto host = at::TensorOptions().dtype(at::kDouble);
    for (const auto& name : names_) {
        const Placed& p = tensors_.at(name);
        Bucket& bucket = buckets_[p.bucket];
        // Runs of local elements that are neighbours in the logical tensor: all of it, or a row's part where columns are cut.
        const TensorSpec& t = p.spec;
        int64_t inner = 1, dim = std::max(t.cut_dim, 0);
        for (size_t i = size_t(dim) + 1; i < t.shape.size(); ++i) inner *= t.shape[i];
        int64_t run = t.cut_dim < 0 ? p.count : t.cut_size * inner, whole = t.cut_dim < 0 ? p.count : t.shape[size_t(dim)] * inner;
        auto element = [&](int64_t i) { return i / run * whole + t.cut_begin * inner + i % run; };     // local → logical
        for (int64_t first = 0; first < p.count; first += kInitElements) {
            int64_t n = std::min(kInitElements, p.count - first);
            if (t.init_std == 0) {
                if (t.init_value != 0) write(bucket, p.offset + first, at::full({n}, t.init_value, host));
                continue;
            }
            Tensor values = at::empty({n}, host);
            double* out = values.data_ptr<double>();
            at::parallel_for(0, n, 4096, [&](int64_t lo, int64_t hi) {
                for (int64_t i = lo; i < hi;) {
                    int64_t stop = std::min(hi, ((first + i) / run + 1) * run - first);
                    normal(options_.seed, name, element(first + i), stop - i, out + i);
                    i = stop;
                }
                for (int64_t i = lo; i < hi; ++i) out[i] *= t.init_std;
            });
            write(bucket, p.offset + first, values);
        }
    }
}

void ParamStore::write(Bucket& bucket, int64_t offset, const Tensor& from) {
    int64_t n = from.numel();
    Tensor master = from.detach().reshape(-1).to(options_.precision.master);
    auto part = [&](int64_t begin, int64_t size, auto&& set) {                       // what of [offset, offset + n) lies in [begin, begin + size)
        int64_t lo = std::max(offset, begin), hi = std::min(offset + n, begin + size);
        if (lo < hi) set(lo, hi, master.narrow(0, lo - offset, hi - lo));
    };
    part(bucket.value_begin, bucket.value.numel(), [&](int64_t lo, int64_t hi, const Tensor& x) { bucket.value_of(lo, hi).copy_(rounded(x, bucket.value.scalar_type())); });
    if (bucket.master.defined()) part(bucket.own_begin, bucket.master.numel(), [&](int64_t lo, int64_t hi, const Tensor& x) { bucket.master_of(lo, hi).write(x); });
}

void ParamStore::fill_handles() {
    for (Handle& h : handles_) {
        Bucket& bucket = buckets_[int(h.spec.bucket)];
        if (stage_of(bucket.kind) < 3) h.weight->value = bucket.value.narrow(0, h.offset, h.count).view(h.spec.shape);
        bool frozen = std::all_of(h.spec.tensors.begin(), h.spec.tensors.end(), [](const TensorSpec& t) { return t.frozen; });
        h.frozen = frozen;
        if (options_.training && !frozen && stage_of(bucket.kind) < 2) h.weight->grad = bucket.grad.narrow(0, h.offset, h.count).view(h.spec.shape);
    }
}
}  // namespace moe
