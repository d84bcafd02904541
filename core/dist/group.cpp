#include "core/dist/group.h"

#include "core/base/error.h"
#include "core/dist/world_rank.h"
#include "core/tensor/check.h"

#include <ATen/ops/empty.h>

#include <numeric>
#include <utility>

namespace moe::dist {
namespace {
DType dtype_of(const char* op, const Tensor& t) {
    switch (t.scalar_type()) {
        case at::kDouble: return DType::f64;
        case at::kFloat: return DType::f32;
        case at::kBFloat16: return DType::bf16;
        case at::kLong: return DType::i64;
        case at::kInt: return DType::i32;
        case at::kByte: return DType::u8;
        default: MOE_THROW(dtype, op, dtype_text(t.scalar_type()), "float64, float32, bfloat16, int64, int32 or uint8", "cast the tensor first");
    }
}

/// For what only moves data: two bytes are two bytes, and fp16 travels as the libraries' other type of that size.
DType moved_dtype_of(const char* op, const Tensor& t) { return t.scalar_type() == at::kHalf ? DType::bf16 : dtype_of(op, t); }

void check_buffer(const char* op, Named t) {
    MOE_CHECK(t.tensor.defined(), shape, op, fmt::format("{} undefined", t.name), "a tensor", "");
    check_contiguous(op, t);
    MOE_CHECK(t.tensor.is_cpu(), device, op, describe(t.tensor), "a tensor on the host", "this group's library moves host memory; run on the CPU, or on one rank");
    moved_dtype_of(op, t.tensor);
}

void check_counts(const char* op, const std::vector<int64_t>& counts, int size) {
    MOE_CHECK(int(counts.size()) == size, shape, op, fmt::format("{} counts", counts.size()), fmt::format("{} (one a rank)", size), "");
    for (int64_t n : counts) MOE_CHECK(n >= 0, shape, op, fmt::format("a count of {}", n), "counts of at least 0", "");
}

void check_numel(const char* op, Named t, int64_t want) {
    MOE_CHECK(t.tensor.numel() == want, shape, op, fmt::format("{} of {} elements", t.name, t.tensor.numel()), fmt::format("{}", want), "the counts and the tensors must agree");
}

int64_t sum(const std::vector<int64_t>& v) { return std::accumulate(v.begin(), v.end(), int64_t(0)); }

/// Runs a collective; whatever fails becomes moe::Error and says which rank it was.
template <class F> auto on_rank(const Group& group, const char* op, F&& call) {
    if (group.size() == 1) return call();
    int rank = world_rank() >= 0 ? world_rank() : group.rank();
    try {
        return call();
    } catch (const Error& e) {
        ErrorParts parts = e.parts();
        if (parts.rank < 0) parts.rank = rank;
        throw Error(std::move(parts));
    } catch (const c10::Error&) {
        throw;
    } catch (const std::runtime_error& e) {
        if (group.has_failed()) throw Error({ErrorKind::dist, op, e.what(), "all ranks", "its error says why", MOE_WHERE, rank, {}});
        throw Error({ErrorKind::dist, op, e.what(), "a collective that ends on all ranks", "look for the first rank that failed: the others only wait for it", MOE_WHERE, rank, {}});
    }
}

thread_local std::function<void()> before_collectives;

/// The same of a call that all ranks of the group make.
template <class F> auto collective(const Group& group, const char* op, F&& call) {
    if (group.size() > 1) BeforeCollectives::pass();
    return on_rank(group, op, std::forward<F>(call));
}

void copy_flat(const Tensor& from, Tensor to) {
    if (from.numel() > 0 && from.data_ptr() != to.data_ptr()) to.view(-1).copy_(from.reshape(-1));
}
}  // namespace

BeforeCollectives::BeforeCollectives(std::function<void()> f) : outer_(std::exchange(before_collectives, std::move(f))) {}
BeforeCollectives::~BeforeCollectives() { before_collectives = std::move(outer_); }
void BeforeCollectives::pass() {
    if (before_collectives) std::exchange(before_collectives, nullptr)();
}

Group Group::split(int colour, int key) const {
    if (!backend_) return {};
    return collective(*this, "dist.split", [&] {
        std::shared_ptr<Backend> part = backend_->split(colour, key);
        return part->size() == 1 ? Group() : Group(std::move(part));
    });
}

Group Group::duplicate() const {
    if (!backend_) return {};
    return collective(*this, "dist.duplicate", [&] { return Group(std::shared_ptr<Backend>(backend_->duplicate())); });
}

void Group::recover() const {
    if (backend_) on_rank(*this, "dist.recover", [&] { backend_->recover(); });
}

void Group::barrier() const {
    if (size() > 1) collective(*this, "dist.barrier", [&] { backend_->barrier(); });
}

void Group::broadcast(at::Tensor data, int root) const {
    MOE_CHECK(root >= 0 && root < size(), dist, "dist.broadcast", fmt::format("root {}", root), fmt::format("0 to {}", size() - 1), "");
    if (size() == 1) return;
    collective(*this, "dist.broadcast", [&] {
        check_buffer("dist.broadcast", {"data", data});
        backend_->broadcast(data.data_ptr(), data.numel(), moved_dtype_of("dist.broadcast", data), root);
    });
}

void Group::all_reduce(at::Tensor data, ReduceOp op) const {
    if (size() == 1) return;
    collective(*this, "dist.all_reduce", [&] {
        check_buffer("dist.all_reduce", {"data", data});
        backend_->all_reduce(data.data_ptr(), data.numel(), dtype_of("dist.all_reduce", data), op);
    });
}

double Group::all_reduce(double value, ReduceOp op) const {
    if (size() > 1) collective(*this, "dist.all_reduce", [&] { backend_->all_reduce(&value, 1, DType::f64, op); });
    return value;
}

int64_t Group::all_reduce(int64_t value, ReduceOp op) const {
    if (size() > 1) collective(*this, "dist.all_reduce", [&] { backend_->all_reduce(&value, 1, DType::i64, op); });
    return value;
}

void Group::all_gather(const at::Tensor& in, at::Tensor out, const std::vector<int64_t>& counts) const {
    constexpr const char* op = "dist.all_gather";
    collective(*this, op, [&] {
        check_counts(op, counts, size());
        check_numel(op, {"in", in}, counts[rank()]);
        check_numel(op, {"out", out}, sum(counts));
        check_same_dtype(op, {"in", in}, {"out", out});
        if (size() == 1) return copy_flat(in, out);
        check_buffer(op, {"in", in});
        check_buffer(op, {"out", out});
        backend_->all_gather(in.data_ptr(), out.data_ptr(), counts.data(), moved_dtype_of(op, in));
    });
}

void Group::reduce_scatter(const at::Tensor& in, at::Tensor out, const std::vector<int64_t>& counts) const {
    constexpr const char* op = "dist.reduce_scatter";
    collective(*this, op, [&] {
        check_counts(op, counts, size());
        check_numel(op, {"in", in}, sum(counts));
        check_numel(op, {"out", out}, counts[rank()]);
        check_same_dtype(op, {"in", in}, {"out", out});
        if (size() == 1) return copy_flat(in, out);
        check_buffer(op, {"in", in});
        check_buffer(op, {"out", out});
        backend_->reduce_scatter(in.data_ptr(), out.data_ptr(), counts.data(), dtype_of(op, in), ReduceOp::sum);
    });
}

at::Tensor Group::all_to_all_rows(const at::Tensor& rows, const std::vector<int64_t>& send, const std::vector<int64_t>& recv) const {
    constexpr const char* op = "dist.all_to_all_rows";
    return collective(*this, op, [&] {
        check_counts(op, send, size());
        check_counts(op, recv, size());
        MOE_CHECK(rows.defined() && rows.dim() >= 1, shape, op, describe(rows), "rows [R, …]", "");
        MOE_CHECK(rows.size(0) == sum(send), shape, op, fmt::format("{} rows, {} to send", rows.size(0), sum(send)), "equal numbers", "the plan belongs to other rows");
        MOE_CHECK(send[rank()] == recv[rank()], shape, op, fmt::format("{} rows to itself, {} from itself", send[rank()], recv[rank()]), "equal numbers", "");
        if (size() == 1) return rows;
        check_buffer(op, {"rows", rows});
        auto sizes = rows.sizes().vec();
        sizes[0] = sum(recv);
        Tensor out = at::empty(sizes, rows.options().requires_grad(false));
        // From the dims, not from numel() / R: a rank may have no rows.
        int64_t row = std::accumulate(sizes.begin() + 1, sizes.end(), int64_t(1), std::multiplies<>());
        std::vector<int64_t> send_elements, recv_elements;
        for (int64_t n : send) send_elements.push_back(n * row);
        for (int64_t n : recv) recv_elements.push_back(n * row);
        backend_->all_to_all(rows.data_ptr(), send_elements.data(), out.data_ptr(), recv_elements.data(), moved_dtype_of(op, rows));
        return out;
    });
}

void Group::send(const at::Tensor& data, int to) const {
    MOE_CHECK(to >= 0 && to < size() && to != rank(), dist, "dist.send", fmt::format("to rank {}", to), fmt::format("another of {} ranks", size()), "");
    on_rank(*this, "dist.send", [&] {
        check_buffer("dist.send", {"data", data});
        backend_->send(data.data_ptr(), data.numel(), moved_dtype_of("dist.send", data), to);
    });
}

void Group::receive(at::Tensor data, int from) const {
    MOE_CHECK(from >= 0 && from < size() && from != rank(), dist, "dist.receive", fmt::format("from rank {}", from), fmt::format("another of {} ranks", size()), "");
    on_rank(*this, "dist.receive", [&] {
        check_buffer("dist.receive", {"data", data});
        backend_->receive(data.data_ptr(), data.numel(), moved_dtype_of("dist.receive", data), from);
    });
}

bool Group::has_message(int from) const {
    MOE_CHECK(from >= 0 && from < size() && from != rank(), dist, "dist.has_message", fmt::format("from rank {}", from), fmt::format("another of {} ranks", size()), "");
    return on_rank(*this, "dist.has_message", [&] { return backend_->has_message(from); });
}

void Group::flush() const {
    if (size() > 1) on_rank(*this, "dist.flush", [&] { backend_->flush(); });
}

bool Group::is_flushed() const {
    return size() == 1 || on_rank(*this, "dist.is_flushed", [&] { return backend_->is_flushed(); });
}
}  // namespace moe::dist
