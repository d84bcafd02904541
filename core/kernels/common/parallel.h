// Tasks of unequal length over the threads of LibTorch's pool.
#pragma once
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace moe::kernels {
/// Calls work(take) on the pool's threads, at most n of them; take() gives each of 0 … n − 1 to one of them, in order, then n or more. A thread that was
/// held up or had long tasks takes fewer. Where the caller is such a thread itself, it does all of them.
template <class F> void share_out(int64_t n, F work) {
    std::atomic<int64_t> next = 0;
    auto take = [&next] { return next.fetch_add(1, std::memory_order_relaxed); };
    at::parallel_for(0, std::min<int64_t>(n, at::get_num_threads()), 1, [&](int64_t, int64_t) { work(take); });
}
}  // namespace moe::kernels
