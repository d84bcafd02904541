// Groups over MPI: libmoelab_mpi.so, opened by moe_dist where ranks were launched. Includes nothing else of ours, so that a
// machine without MPI runs the same executable on one rank.
#include "core/dist/backend.h"

#include <mpi.h>
#include <sched.h>

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

namespace moe::dist {
namespace {
void check(int code, const char* what) {
    if (code == MPI_SUCCESS) return;
    char text[MPI_MAX_ERROR_STRING] = "";
    int length = 0;
    MPI_Error_string(code, text, &length);
    throw std::runtime_error(std::string(what) + ": " + std::string(text, length));
}

/// Elements of one call: MPI counts in int. A smaller number makes tests of the pieces possible.
int64_t max_count() {
    static const int64_t n = [] {
        const char* text = std::getenv("MOELAB_MPI_MAX_COUNT");
        int64_t asked = text ? std::atoll(text) : 0;
        return asked > 0 ? asked : int64_t(1) << 27;      // 1 GiB of float64: some releases fail above 2 GiB
    }();
    return n;
}

float to_float(uint16_t x) { return std::bit_cast<float>(uint32_t(x) << 16); }
uint16_t to_bf16(float x) {
    auto bits = std::bit_cast<uint32_t>(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);      // a NaN stays one
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);                      // nearest, ties to even
}
/// MPI has no bfloat16: each step of a reduction is made in float and rounded once.
template <class F> void reduce_bf16(void* in, void* inout, int* count, F&& f) {
    auto* a = static_cast<const uint16_t*>(in);
    auto* b = static_cast<uint16_t*>(inout);
    for (int i = 0; i < *count; ++i) b[i] = to_bf16(f(to_float(a[i]), to_float(b[i])));
}
void sum_bf16(void* a, void* b, int* n, MPI_Datatype*) { reduce_bf16(a, b, n, [](float x, float y) { return x + y; }); }
void max_bf16(void* a, void* b, int* n, MPI_Datatype*) { reduce_bf16(a, b, n, [](float x, float y) { return x > y || x != x ? x : y; }); }
void min_bf16(void* a, void* b, int* n, MPI_Datatype*) { reduce_bf16(a, b, n, [](float x, float y) { return x < y || x != x ? x : y; }); }

MPI_Op bf16_op(ReduceOp op) {
    static const auto make = [](MPI_User_function* f) {
        MPI_Op made;
        check(MPI_Op_create(f, 1, &made), "MPI_Op_create");
        return made;
    };
    static const MPI_Op sum = make(sum_bf16), max = make(max_bf16), min = make(min_bf16);
    return op == ReduceOp::sum ? sum : op == ReduceOp::max ? max : min;
}

MPI_Datatype mpi_type(DType t) {
    switch (t) {
        case DType::f64: return MPI_DOUBLE;
        case DType::f32: return MPI_FLOAT;
        case DType::bf16: return MPI_UINT16_T;
        case DType::i64: return MPI_INT64_T;
        case DType::i32: return MPI_INT32_T;
        case DType::u8: return MPI_UINT8_T;
    }
    throw std::runtime_error("MPI: a dtype of an unknown number");
}
MPI_Op mpi_op(DType t, ReduceOp op) {
    if (t == DType::bf16) return bf16_op(op);
    return op == ReduceOp::sum ? MPI_SUM : op == ReduceOp::max ? MPI_MAX : MPI_MIN;
}

/// f(first, count) over pieces of [0, count) that MPI takes.
template <class F> void in_pieces(int64_t count, F&& f) {
    for (int64_t first = 0; first < count; first += max_count()) f(first, int(std::min(max_count(), count - first)));
}

class MpiBackend;
/// The groups that fail together (backend.h), of this rank.
struct Family {
    std::vector<MpiBackend*> groups;
    bool has_failed = false;               ///< a call has thrown because another rank is in recover()
};

/// Failures: before every collective the ranks of the group tell each other whether they make it (enter()). A rank in recover() says no, once,
/// in each of its groups; then all ranks of that group know, which then say no in theirs. What all have entered ends on all. In messages the same is an
/// empty one with a tag of its own, after what was sent before.
class MpiBackend : public Backend {
public:
    MpiBackend(MPI_Comm comm, std::shared_ptr<Family> family) : comm_(comm), family_(std::move(family)) {
        check(MPI_Comm_set_errhandler(comm, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
        check(MPI_Comm_rank(comm, &rank_), "MPI_Comm_rank");
        check(MPI_Comm_size(comm, &size_), "MPI_Comm_size");
        has_ended_.assign(size_t(size_), false);
        family_->groups.push_back(this);
    }
    ~MpiBackend() override {
        std::erase(family_->groups, this);
        int finalized = 0;
        MPI_Finalized(&finalized);
        // Freeing is collective: not while this rank alone unwinds.
        if (comm_ != MPI_COMM_WORLD && !finalized && std::uncaught_exceptions() == 0) MPI_Comm_free(&comm_);
    }
    int rank() const override { return rank_; }
    int size() const override { return size_; }

    std::unique_ptr<Backend> split(int colour, int key) override {
        enter();
        MPI_Comm part = MPI_COMM_NULL;
        check(MPI_Comm_split(comm_, colour, key, &part), "MPI_Comm_split");
        return std::make_unique<MpiBackend>(part, family_);
    }
    std::unique_ptr<Backend> duplicate() override {
        enter();
        MPI_Comm same = MPI_COMM_NULL;
        check(MPI_Comm_dup(comm_, &same), "MPI_Comm_dup");
        return std::make_unique<MpiBackend>(same, std::make_shared<Family>());
    }
    bool has_failed() const override { return family_->has_failed; }
    void recover() override {
        for (MpiBackend* group : family_->groups) group->say_no();
        for (bool waits = true; waits;) {
            waits = false;
            for (MpiBackend* group : family_->groups) waits = !group->has_heard_all() || waits;
            if (waits) sched_yield();
        }
        for (MpiBackend* group : family_->groups) group->start_again();
        family_->has_failed = false;
    }
    void barrier() override { enter(); }

    void broadcast(void* data, int64_t count, DType type, int root) override {
        enter();
        in_pieces(count, [&](int64_t first, int n) { check(MPI_Bcast(at(data, first, type), n, mpi_type(type), root, comm_), "MPI_Bcast"); });
    }

    void all_reduce(void* data, int64_t count, DType type, ReduceOp op) override {
        enter();
        in_pieces(count, [&](int64_t first, int n) {
            check(MPI_Allreduce(MPI_IN_PLACE, at(data, first, type), n, mpi_type(type), mpi_op(type, op), comm_), "MPI_Allreduce");
        });
    }

    void all_gather(const void* in, void* out, const int64_t* counts, DType type) override {
        enter();
        auto starts = starts_of(counts);
        char* own = at(out, starts[rank_], type);
        if (own != in) std::memcpy(own, in, counts[rank_] * size_of(type));
        if (starts[size_] <= max_count()) {
            std::vector<int> n(counts, counts + size_), first(starts.begin(), starts.end() - 1);
            check(MPI_Allgatherv(MPI_IN_PLACE, 0, MPI_DATATYPE_NULL, out, n.data(), first.data(), mpi_type(type), comm_), "MPI_Allgatherv");
            return;
        }
        for (int r = 0; r < size_; ++r)
            in_pieces(counts[r], [&](int64_t first, int n) { check(MPI_Bcast(at(out, starts[r] + first, type), n, mpi_type(type), r, comm_), "MPI_Bcast"); });
    }

    /// A reduction to each rank in turn: any counts, no buffer of the whole size, and `out` may lie in `in`.
    void reduce_scatter(const void* in, void* out, const int64_t* counts, DType type, ReduceOp op) override {
        enter();
        auto starts = starts_of(counts);
        for (int r = 0; r < size_; ++r)
            in_pieces(counts[r], [&](int64_t first, int n) {
                const char* from = at(in, starts[r] + first, type);
                char* to = r == rank_ ? at(out, first, type) : nullptr;
                check(MPI_Reduce(from == to ? MPI_IN_PLACE : from, to, n, mpi_type(type), mpi_op(type, op), r, comm_), "MPI_Reduce");
            });
    }

    /// Messages of one pair keep their order, so the pieces need no tags; nothing is sent where a count is 0.
    void all_to_all(const void* in, const int64_t* send_counts, void* out, const int64_t* recv_counts, DType type) override {
        enter();
        auto send_at = starts_of(send_counts), recv_at = starts_of(recv_counts);
        std::vector<MPI_Request> pending;
        for (int r = 0; r < size_; ++r)
            if (r != rank_)
                in_pieces(recv_counts[r], [&](int64_t first, int n) {
                    check(MPI_Irecv(at(out, recv_at[r] + first, type), n, mpi_type(type), r, kTag, comm_, &pending.emplace_back()), "MPI_Irecv");
                });
        for (int step = 1; step < size_; ++step) {
            int r = (rank_ + step) % size_;
            in_pieces(send_counts[r], [&](int64_t first, int n) {
                check(MPI_Isend(at(in, send_at[r] + first, type), n, mpi_type(type), r, kTag, comm_, &pending.emplace_back()), "MPI_Isend");
            });
        }
        if (send_counts[rank_] > 0) std::memcpy(at(out, recv_at[rank_], type), at(in, send_at[rank_], type), send_counts[rank_] * size_of(type));
        std::vector<MPI_Status> done(pending.size());
        int code = MPI_Waitall(int(pending.size()), pending.data(), done.data());
        if (code == MPI_ERR_IN_STATUS)
            for (const auto& status : done)
                if (status.MPI_ERROR != MPI_ERR_PENDING) check(status.MPI_ERROR, "all_to_all");
        check(code, "MPI_Waitall");
    }

    void send(const void* data, int64_t count, DType type, int to) override {
        throw_if_failed();
        in_pieces(count, [&](int64_t first, int n) { check(MPI_Isend(at(data, first, type), n, mpi_type(type), to, kMessageTag, comm_, &sending_.emplace_back()), "MPI_Isend"); });
    }
    void receive(void* data, int64_t count, DType type, int from) override {
        in_pieces(count, [&](int64_t first, int n) {
            throw_if_failed();
            MPI_Status next;
            check(MPI_Probe(from, MPI_ANY_TAG, comm_, &next), "MPI_Probe");
            if (next.MPI_TAG == kEndTag) {
                take_end(from);
                family_->has_failed = true;
                throw_if_failed();
            }
            check(MPI_Recv(at(data, first, type), n, mpi_type(type), from, kMessageTag, comm_, MPI_STATUS_IGNORE), "MPI_Recv");
        });
    }
    bool has_message(int from) override {
        throw_if_failed();
        int there = 0;
        check(MPI_Iprobe(from, MPI_ANY_TAG, comm_, &there, MPI_STATUS_IGNORE), "MPI_Iprobe");
        return there != 0;
    }
    /// Ends in any case: who is in recover() takes what is sent to it.
    void flush() override {
        int code = MPI_Waitall(int(sending_.size()), sending_.data(), MPI_STATUSES_IGNORE);
        sending_.clear();
        check(code, "MPI_Waitall");
    }
    bool is_flushed() override {
        int done = 0;
        check(MPI_Testall(int(sending_.size()), sending_.data(), &done, MPI_STATUSES_IGNORE), "MPI_Testall");
        if (done) sending_.clear();
        return done != 0;
    }

private:
    static constexpr int kTag = 1, kMessageTag = 2, kEndTag = 3;
    void throw_if_failed() const {
        if (family_->has_failed) throw std::runtime_error("another rank has failed");
    }
    /// Returns once every rank has come to this call. Not a blocking collective, which would not match that of say_no().
    void enter() {
        throw_if_failed();
        if (size_ == 1) return;
        int no = 0, any = 0;
        MPI_Request telling = MPI_REQUEST_NULL;
        check(MPI_Iallreduce(&no, &any, 1, MPI_INT, MPI_MAX, comm_, &telling), "MPI_Iallreduce");
        check(MPI_Wait(&telling, MPI_STATUS_IGNORE), "MPI_Wait");
        has_heard_ = family_->has_failed = any != 0;
        throw_if_failed();
    }
    /// In place of the next collective.
    void say_no() {
        if (size_ == 1) return;
        if (!has_heard_) check(MPI_Iallreduce(&kNo, &any_no_, 1, MPI_INT, MPI_MAX, comm_, &telling_), "MPI_Iallreduce");
        for (int r = 0; r < size_; ++r)
            if (r != rank_) check(MPI_Isend(nullptr, 0, MPI_BYTE, r, kEndTag, comm_, &sending_.emplace_back()), "MPI_Isend");
    }
    /// Takes what comes, also what nobody wants any more. True once every rank of the group is in recover() and has no message left for this one.
    bool has_heard_all() {
        if (size_ == 1) return true;
        int told = 0, flushed = is_flushed();
        check(MPI_Test(&telling_, &told, MPI_STATUS_IGNORE), "MPI_Test");
        bool all = told && flushed;
        for (int r = 0; r < size_; ++r) {
            for (int there = 1; r != rank_ && !has_ended_[size_t(r)] && there;) {
                MPI_Status next;
                check(MPI_Iprobe(r, MPI_ANY_TAG, comm_, &there, &next), "MPI_Iprobe");
                if (there) next.MPI_TAG == kEndTag ? take_end(r) : drop(next);
            }
            all = all && (r == rank_ || has_ended_[size_t(r)]);
        }
        return all;
    }
    void take_end(int from) {
        check(MPI_Recv(nullptr, 0, MPI_BYTE, from, kEndTag, comm_, MPI_STATUS_IGNORE), "MPI_Recv");
        has_ended_[size_t(from)] = true;
    }
    void drop(const MPI_Status& message) {
        int bytes = 0;
        check(MPI_Get_count(&message, MPI_BYTE, &bytes), "MPI_Get_count");
        std::vector<char> data(static_cast<size_t>(bytes));
        check(MPI_Recv(data.data(), bytes, MPI_BYTE, message.MPI_SOURCE, message.MPI_TAG, comm_, MPI_STATUS_IGNORE), "MPI_Recv");
    }
    void start_again() {
        has_heard_ = false;
        has_ended_.assign(size_t(size_), false);
    }

    static char* at(void* data, int64_t element, DType type) { return static_cast<char*>(data) + element * size_of(type); }
    static const char* at(const void* data, int64_t element, DType type) { return static_cast<const char*>(data) + element * size_of(type); }
    std::vector<int64_t> starts_of(const int64_t* counts) const {
        std::vector<int64_t> starts(size_ + 1, 0);
        std::partial_sum(counts, counts + size_, starts.begin() + 1);
        return starts;
    }
    static constexpr int kNo = 1;
    MPI_Comm comm_;
    std::shared_ptr<Family> family_;
    int rank_ = 0, size_ = 1, any_no_ = 0;
    bool has_heard_ = false;               ///< this group's last collective: that a rank does not make it
    std::vector<bool> has_ended_;          ///< by rank: its messages before recover() are all here
    MPI_Request telling_ = MPI_REQUEST_NULL;
    std::vector<MPI_Request> sending_;
};

/// A rank that ends well waits here for the others. One that fails must not: they may be waiting for it in a collective. It
/// leaves without MPI_Finalize, and the launcher ends the job.
void finish(int status, void*) {
    int finalized = 0;
    MPI_Finalized(&finalized);
    if (!finalized && status == 0 && std::uncaught_exceptions() == 0) MPI_Finalize();
}
}  // namespace
}  // namespace moe::dist

extern "C" moe::dist::Backend* moe_open_backend() {
    using namespace moe::dist;
    int initialized = 0, given = MPI_THREAD_SINGLE;
    check(MPI_Initialized(&initialized), "MPI_Initialized");
    if (!initialized) {
        check(MPI_Init_thread(nullptr, nullptr, MPI_THREAD_MULTIPLE, &given), "MPI_Init_thread");
        on_exit(finish, nullptr);      // atexit does not tell how the process ends
    } else {
        check(MPI_Query_thread(&given), "MPI_Query_thread");
    }
    if (given < MPI_THREAD_MULTIPLE) throw std::runtime_error("MPI gives thread level " + std::to_string(given) + ", want MPI_THREAD_MULTIPLE");
    return new MpiBackend(MPI_COMM_WORLD, std::make_shared<Family>());
}
