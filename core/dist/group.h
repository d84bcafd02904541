// Process groups on tensors, the mesh of them that a run uses, and where the ranks come from.
#pragma once
#include "core/config/config.h"
#include "core/dist/backend.h"

#include <ATen/core/Tensor.h>

#include <functional>
#include <memory>
#include <vector>

namespace moe::dist {

/// A process group; copies share it. Of one rank it needs no backend and every collective is the identity. Tensors must be
/// contiguous; shapes and types are checked; failures throw moe::Error (dist, shape, dtype).
class Group {
public:
    Group() = default;                                     ///< one rank
    explicit Group(std::shared_ptr<Backend> backend) : backend_(std::move(backend)) {}
    /// This process's place in the group, from 0, and how many there are.
    int rank() const { return backend_ ? backend_->rank() : 0; }
    int size() const { return backend_ ? backend_->size() : 1; }
    /// The ranks that give the same colour as a group of their own, in the order of their keys. A collective, as what follows up to all_to_all_rows().
    Group split(int colour, int key) const;
    /// The same ranks as a group that fails by itself: for another thread, or for what ranks say about a failure of this one.
    Group duplicate() const;
    /// Where an exception on one rank ends its calls of this group, or of one that was split from the same: all come here, the others once a call
    /// has thrown moe::Error (dist) because of that, which has_failed() tells. Then every group of them can be used again. train::together does this.
    void recover() const;
    bool has_failed() const { return backend_ && backend_->has_failed(); }
    /// Returns when every rank has called it.
    void barrier() const;
    /// The root's data on every rank, in place.
    void broadcast(at::Tensor data, int root) const;
    /// Sum, smallest or largest over the ranks, element by element, in place or of a number.
    void all_reduce(at::Tensor data, ReduceOp op = ReduceOp::sum) const;
    double all_reduce(double value, ReduceOp op = ReduceOp::sum) const;
    int64_t all_reduce(int64_t value, ReduceOp op = ReduceOp::sum) const;
    /// Flat tensors; out.numel() is the sum of counts, in.numel() is counts[rank]. `in` may be a view of its own part of out.
    void all_gather(const at::Tensor& in, at::Tensor out, const std::vector<int64_t>& counts) const;
    /// in.numel() is the sum of counts, out.numel() is counts[rank]; out may be a view of its own part of in.
    void reduce_scatter(const at::Tensor& in, at::Tensor out, const std::vector<int64_t>& counts) const;
    /// Rows of a tensor [R, …] to ranks: send[r] rows to r, recv[r] rows from r.
    at::Tensor all_to_all_rows(const at::Tensor& rows, const std::vector<int64_t>& send, const std::vector<int64_t>& recv) const;
    /// Starts a message to a rank of the group; the caller keeps the tensor unchanged until flush().
    void send(const at::Tensor& data, int to) const;
    /// Fills `data` with the next message of a rank.
    void receive(at::Tensor data, int from) const;
    /// True where receive() from that rank would not wait, be it that it throws; after a failure it throws itself.
    bool has_message(int from) const;
    /// Returns when the tensors of all send() calls may change again.
    void flush() const;
    /// Whether that is so already; does not wait.
    bool is_flushed() const;

private:
    std::shared_ptr<Backend> backend_;
};

/// While it lives, f runs on this thread, once, before its next collective of whatever group of several ranks, which throws what f throws. There ranks can hear of one that
/// failed on the way to it, for which they would else wait in the collective.
class BeforeCollectives {
public:
    explicit BeforeCollectives(std::function<void()> f);
    ~BeforeCollectives();
    BeforeCollectives(const BeforeCollectives&) = delete;
    /// Now, and not there: for what must not begin where f throws. Nothing where it ran, or where none lives.
    static void pass();

private:
    std::function<void()> outer_;
};

/// The world of this process: MPI where a launcher started several ranks (OMPI_COMM_WORLD_SIZE, PMI_SIZE, or SLURM_NTASKS
/// with MOELAB_BACKEND=mpi), else one rank. Opened once. Throws moe::Error (dist) when the plugin or the library is missing.
const Group& world();
/// True where a launcher's environment says that several ranks were started.
bool launched_with_ranks();

/// The groups of a run. World rank = (stage · dp + replica) · tp + part: neighbours share a tensor, stages are furthest apart.
/// Every rank of a stage works on tokens of its own (sequence parallel over tp, batches over dp), so what is not cut is replicated
/// over the whole stage; experts are cut over ep, which takes neighbouring ranks of the stage, and replicated over expert_dp.
struct Mesh {
    Group world;
    Group stage;                                            ///< dp × tp: the ranks that have the same layers
    Group dp, tp, pp, cp;                                   ///< ranks that differ in one axis only; cp has one rank until it is built
    Group ep, expert_dp;
    Group tied;                                             ///< the ranks of the first and the last stage; of one stage, that stage
    int num_stages() const { return pp.size(); }
    bool is_first() const { return pp.rank() == 0; }
    bool is_last() const { return pp.rank() + 1 == pp.size(); }
};
/// Throws moe::Error (config) where the sizes do not divide the number of ranks.
Mesh make_mesh(const DistributedConfig& config, const Group& world);

}  // namespace moe::dist
