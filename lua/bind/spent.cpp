#include "lua/bind/tensor.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <array>

namespace moe::lua {
namespace {
// As many as a loop leaves behind between two passes of the collector: about 5 MB with what LibTorch has beside the numbers.
constexpr size_t kMostBytes = 256, kPlaces = 64, kMostTensors = 8192;

/// By dtype and sizes. Of a thread: a state's lock may pass from one thread to another, the pools of both stay their own.
struct Pool {
    std::array<std::vector<at::Tensor>, kPlaces> places;
    size_t count = 0;
    std::vector<at::Tensor>& place(at::ScalarType dtype, at::IntArrayRef sizes) {
        uint64_t hash = uint64_t(dtype);
        for (int64_t size : sizes) hash = (hash ^ uint64_t(size)) * 0x9e3779b97f4a7c15u;
        return places[(hash ^ hash >> 32) % kPlaces];
    }
};
thread_local Pool pool;

/// Dense, of the CPU, float32 or float64, small, without anything of autograd: no gradient wanted, held or hooked.
bool is_plain(const at::Tensor& t) {
    static const c10::DispatchKeySet of_plain = at::empty({0}).key_set();
    return t.key_set() == of_plain && !t.unsafeGetTensorImpl()->autograd_meta() && (t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble) && t.nbytes() <= kMostBytes && t.is_contiguous();
}
}  // namespace

void keep_spent(at::Tensor t) {
    if (!t.defined() || t.use_count() != 1 || !is_plain(t)) return;
    const at::Storage& storage = t.storage();
    // Memory of its own that may be written: not a view's, not a file's.
    if (storage.use_count() != 1 || storage.nbytes() > kMostBytes || t.storage_offset() != 0 || storage.data_ptr().get_deleter() != c10::GetCPUAllocator()->raw_deleter()) return;
    if (pool.count == kMostTensors) pool = {};          // those of forms that nobody wants any more among them
    pool.place(t.scalar_type(), t.sizes()).push_back(std::move(t));
    ++pool.count;
}

at::Tensor take_spent(const at::Tensor& a, const at::Tensor& b) {
    if (a.scalar_type() != b.scalar_type() || a.sizes() != b.sizes() || !is_plain(a) || !is_plain(b)) return {};
    auto& place = pool.place(a.scalar_type(), a.sizes());
    if (place.empty() || place.back().scalar_type() != a.scalar_type() || place.back().sizes() != a.sizes()) return {};
    at::Tensor t = std::move(place.back());
    place.pop_back();
    --pool.count;
    return t;
}
}  // namespace moe::lua
