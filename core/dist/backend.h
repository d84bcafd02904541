// What a communication library must offer, on raw memory, so that MPI can be a plugin opened at run time and NCCL a second
// implementation. No LibTorch here: the plugin includes this file alone.
#pragma once
#include <cstdint>
#include <memory>

namespace moe::dist {

enum class DType : int { f64, f32, bf16, i64, i32, u8 };
enum class ReduceOp : int { sum, max, min };

/// Bytes of one element.
constexpr int64_t size_of(DType t) { return t == DType::f64 || t == DType::i64 ? 8 : t == DType::f32 || t == DType::i32 ? 4 : t == DType::bf16 ? 2 : 1; }

/// One process group. Every call is made by all ranks of it, in the same order; counts are in elements. Calls block until
/// the data is there. Failures throw std::runtime_error with the library's message: the caller turns it into moe::Error (dist).
///
/// A group and those that were split from it are a family, which one thread of a rank uses at a time. A rank that cannot go on amid the
/// family's calls goes to recover(); the others' next call that this rank does not make throws, as do all calls after it, until they have
/// come to recover(), too. A call is made by all ranks of its group or by none, so that no buffer is left to a library.
class Backend {
public:
    virtual ~Backend() = default;
    virtual int rank() const = 0;
    virtual int size() const = 0;
    /// A group of the ranks that give the same colour, ordered by key.
    virtual std::unique_ptr<Backend> split(int colour, int key) = 0;
    /// The same ranks as a family of their own: for another thread, or for what goes on where this family fails.
    virtual std::unique_ptr<Backend> duplicate() = 0;
    /// Whether a call of the family has thrown because another rank is in recover().
    virtual bool has_failed() const = 0;
    /// Every rank of the family comes here, the first ones because they failed. After it no call and no message that was begun is left, and
    /// all groups can be used again. (A library that must give its communicators up for that makes new ones here.)
    virtual void recover() = 0;
    virtual void barrier() = 0;
    virtual void broadcast(void* data, int64_t count, DType type, int root) = 0;
    /// In place.
    virtual void all_reduce(void* data, int64_t count, DType type, ReduceOp op) = 0;
    /// Rank r's counts[r] elements land at the sum of the counts before r, on every rank.
    virtual void all_gather(const void* in, void* out, const int64_t* counts, DType type) = 0;
    /// Rank r receives the reduced elements of its part of `in`, which starts at the sum of the counts before r.
    virtual void reduce_scatter(const void* in, void* out, const int64_t* counts, DType type, ReduceOp op) = 0;
    /// Parts lie one after another in rank order, in `in` by send_counts and in `out` by recv_counts.
    virtual void all_to_all(const void* in, const int64_t* send_counts, void* out, const int64_t* recv_counts, DType type) = 0;
    /// Starts a message to one rank and returns at once; `data` stays as it is until flush(). Messages of a pair keep their order.
    virtual void send(const void* data, int64_t count, DType type, int to) = 0;
    /// Waits for a message of that many elements.
    virtual void receive(void* data, int64_t count, DType type, int from) = 0;
    /// Whether receive() from that rank would not wait; where that would throw at once, this is true or throws.
    virtual bool has_message(int from) = 0;
    /// Waits until all started messages have left.
    virtual void flush() = 0;
    /// Whether flush() would not wait.
    virtual bool is_flushed() = 0;
};

/// The symbol a plugin exports: the world group, initialised. Throws std::runtime_error.
using OpenBackend = Backend* (*)();
constexpr const char* kOpenBackend = "moe_open_backend";

}  // namespace moe::dist
