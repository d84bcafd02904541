// All parameters of a model on one rank: logical tensors in typed buckets, their main gradients and optimizer state, and which
// pieces of them this rank owns. A logical tensor has the name of Hugging Face's checkpoints (one expert's matrix is one).
// What products read is a handle (Weight): a run of neighbouring logical tensors seen as one array.
#pragma once
#include "core/dist/group.h"
#include "core/tensor/master.h"
#include "core/tensor/precision.h"
#include "core/tensor/weight.h"

#include <algorithm>
#include <array>
#include <functional>
#include <map>
#include <string>
#include <vector>

namespace moe {

/// Which ranks hold a parameter, and in which type. dense: all ranks of a stage; expert: expert_dp; router: as dense, but its compute
/// type is the master type (the gate's product is fp32); tensor: cut over tp, so replicated over dp alone; tied: used by the first
/// and the last pipeline stage, so replicated over the ranks of both, where its gradients are summed like any other's.
enum class BucketKind { dense, expert, router, tensor, tied };
constexpr int kNumBuckets = 5;

/// One parameter as a checkpoint knows it. Rows are its first dim.
struct TensorSpec {
    std::string name;
    std::vector<int64_t> shape;   ///< of the whole logical tensor
    double init_std = 0;          ///< normal with this deviation, by (seed, name, element); see init_value for 0
    double init_value = 0;        ///< where init_std is 0: every element
    bool decay = true;            ///< weight decay applies (not to norms and biases)
    bool frozen = false;
    int cut_dim = -1;             ///< this rank's layout holds [cut_begin, cut_begin + cut_size) of that dim; −1: all of it
    int64_t cut_begin = 0, cut_size = 0;
    /// Shape of what this rank's layout holds.
    std::vector<int64_t> local_shape() const;
};

/// A handle over consecutive tensors: `shape` has as many elements as they have together.
struct WeightSpec {
    std::string name;
    BucketKind bucket = BucketKind::dense;
    std::vector<TensorSpec> tensors;
    std::vector<int64_t> shape;
};

/// A piece of a logical tensor: elements [offset, offset + shape) in every dim. What a checkpoint's index stores.
struct Rectangle {
    std::string name;
    std::vector<int64_t> offset, shape;
    bool operator==(const Rectangle&) const = default;
};

/// A rectangle with what this rank keeps of it: views, so that writing them sets the store; after that gather_values().
struct OwnedPiece {
    Rectangle rectangle;
    std::vector<int64_t> global_shape;
    Master master;                            ///< of the rectangle's shape
    std::vector<Tensor> state;                ///< optimizer's tensors, of that shape
};

/// Part of a bucket with one treatment by the optimizer. Elements [begin, end) of the bucket.
struct Range {
    int64_t begin = 0, end = 0;
    bool decay = true, frozen = false;
    double lr_scale = 1;
};

/// One flat allocation a kind. master, moments and `ranges` span the part [own_begin, own_end) that this rank updates (ZeRO 0: all of
/// it; from ZeRO 1: a cut at tensor starts or at rows that are multiples of 128). value and grad span the whole bucket, but grad only
/// the own part from ZeRO 2 and value from ZeRO 3.
struct Bucket {
    BucketKind kind = BucketKind::dense;
    dist::Group group;                        ///< ranks that hold the same elements
    Tensor value, grad;                       ///< compute type; gradient type (undefined without training)
    int64_t value_begin = 0, grad_begin = 0;  ///< element of the bucket that value[0] and grad[0] are
    Tensor master;                            ///< [own] as Master::data: master type, a view of value where the types agree; int16 beside bf16; undefined without training where types differ
    std::vector<Tensor> state;                ///< optimizer's moments, each [own], moments' type
    int64_t own_begin = 0, own_end = 0;
    std::vector<int64_t> counts;              ///< elements by rank of the group from ZeRO 1
    int64_t norm_begin = 0, norm_end = 0;     ///< part whose squares this rank adds to the gradient norm: a partition over the group
    std::vector<Range> ranges;                ///< merged, cover [own_begin, own_end)
    /// Elements [begin, end) of the bucket, which must lie in what is kept: views.
    Tensor value_of(int64_t begin, int64_t end) const { return value.narrow(0, begin - value_begin, end - begin); }
    Tensor grad_of(int64_t begin, int64_t end) const { return grad.narrow(0, begin - grad_begin, end - begin); }
    /// Of the own part.
    Master master_of(int64_t begin, int64_t end) const;
};

/// A handle's elements [begin, end) of its bucket.
struct PlacedWeight {
    WeightPtr weight;
    int64_t begin, end;
};

/// How the store holds its tensors.
struct StoreOptions {
    Precision precision;
    at::Device device = at::kCPU;
    int zero_stage = 0;                       ///< 0 to 3
    uint64_t seed = 0;
    int num_moments = 2;                      ///< optimizer's state tensors: AdamW 2, SGD with momentum 1, without 0
    bool training = true;                     ///< false: no gradients and no state
    bool whole_tensors = false;               ///< ZeRO cuts at tensor starts only: for an optimizer that needs whole matrices
};

/// The sum of the gradients' squares = sum of `known`, float64, + that of the squares of `rest`, flat views of gradients.
struct GradNormParts { std::vector<Tensor> known, rest; };

/// Owner of all parameters; not copied: handles point at its sink.
class ParamStore {
public:
    /// Throws moe::Error (config) for a ZeRO stage outside 0 to 3.
    ParamStore(const dist::Mesh& mesh, StoreOptions options);
    ParamStore(const ParamStore&) = delete;             // handles point at sink_
    ParamStore& operator=(const ParamStore&) = delete;
    /// Declares a handle; its tensors exist after build(). Throws moe::Error (state after build, config for a name used twice,
    /// shape where the element counts differ).
    WeightPtr declare(const WeightSpec& spec);
    /// Allocates, initialises, fills every handle. Throws moe::Error (memory) with the bytes wanted.
    void build();

    const StoreOptions& options() const { return options_; }
    const dist::Mesh& mesh() const { return mesh_; }
    GradSink& sink() { return sink_; }
    std::vector<Bucket>& buckets() { return buckets_; }
    /// Logical names in declaration order.
    const std::vector<std::string>& names() const { return names_; }
    bool has(const std::string& name) const { return tensors_.contains(name); }
    const TensorSpec& spec(const std::string& name) const;
    BucketKind bucket_of(const std::string& name) const;
    /// Elements before the tensor in its bucket.
    int64_t offset_of(const std::string& name) const;
    /// View of this rank's compute weights of a logical tensor, of its main gradient (also of a frozen one: zeros), of the local
    /// shape. Throws moe::Error (config) with the nearest name, (state) before build(), for gradients without training, and where
    /// ZeRO has cut it (value from stage 3, grad from stage 2): master() gathers.
    Tensor value(const std::string& name) const;
    Tensor grad(const std::string& name) const;
    /// Copy of the master weights of a whole logical tensor, gathered from the ranks that own its pieces (a collective of those
    /// ranks from ZeRO 1 and under tp). Where there are none (no training, lower-precision compute type) the compute weights in the
    /// master type.
    Tensor master(const std::string& name);
    /// The same of a parameter's main gradient, after reduce_grads(), and of the optimizer's tensors, each in its own type. Throws moe::Error (state) without training, and before build().
    Tensor whole_grad(const std::string& name);
    std::vector<Tensor> whole_state(const std::string& name);
    /// Sets master (where owned) and compute weights (master rounded, as after an update) from a tensor of the logical shape,
    /// any float dtype, any device. Throws (shape, dtype).
    void set(const std::string& name, const Tensor& from);
    /// The pieces whose master this rank keeps, in bucket order: what a checkpoint is loaded into.
    std::vector<Rectangle> rectangles() const;
    /// The same with views of master and state. With `once`, a partition over the ranks that hold the same elements: what a
    /// checkpoint is saved from. Without training there is no state, and where the compute type is lower the master is the weights.
    std::vector<OwnedPiece> owned(bool once) const;
    /// Elements of all logical tensors on this rank.
    int64_t num_parameters() const;

    /// Gathers the values of these handles where ZeRO 3 has cut them, and makes room for their gradients (zeros) from ZeRO 2;
    /// nothing below. Collectives: every rank of a bucket's group calls with the same handles in the same order.
    void gather(const std::vector<WeightPtr>& weights, bool with_grads);
    /// The end of gather(): gradients are summed over the ranks into the owners' parts, and both are let go.
    void release(const std::vector<WeightPtr>& weights, bool with_grads);
    /// Lets go what gather() made, without a collective: after a failed step.
    void drop(const std::vector<WeightPtr>& weights);
    /// True where gather() and release() do something.
    bool is_cut() const { return options_.zero_stage >= 2; }

    /// All main gradients become 0.
    void zero_grads();
    /// The same, but those of matrices, nearly all of a model, only count as zero until they are written or settled: what makes them first then
    /// overwrites them, which spares a pass over them and a read.
    void begin_grads();
    /// Gradients that still only count as zero become zero. reduce_grads() and grad() do it themselves.
    void settle_grads();
    /// Whatever was written since begin_grads() was so without the host's doing (a replayed graph): nothing is stale.
    void mark_grads_written();
    /// Sums main gradients over the ranks that hold the same parameters: all-reduce under ZeRO 0, reduce-scatter into the own
    /// part under ZeRO 1, whose other parts keep this rank's share; from ZeRO 2 release() has done it. Gradients of frozen tensors
    /// become zero first.
    void reduce_grads();
    /// What the sum of squares of this rank's part of the gradients (a partition over the ranks of each bucket's group) is made of. After reduce_grads().
    GradNormParts grad_norm_parts() const;
    /// Name of the first parameter with a gradient that is not finite, "" if none; local to this rank.
    std::string first_non_finite() const;
    /// Handles whose E4M3 copies products have made and whose values this rank updates whole, by offset: an update may make the copies in passing, and after gather_values() say so.
    std::vector<PlacedWeight> quantized_weights(const Bucket& bucket) const;
    /// After the own parts of master and value have changed (an update, or owned()): every rank gets all compute weights (all-gather under ZeRO 1).
    void gather_values();

private:
    struct Placed { TensorSpec spec; int bucket; int64_t offset, count; };     ///< of the local part
    struct Handle { WeightSpec spec; WeightPtr weight; int64_t offset = 0, count = 0; bool frozen = false; };
    const Placed& placed(const std::string& name) const;
    /// A copy of a whole logical tensor, from flat views of what this rank keeps of its bucket's elements [begin, end): all of it, or where it is shared out over the bucket's group its own part.
    Tensor joined(const Placed& placed, bool is_shared_out, const std::function<Tensor(int64_t, int64_t)>& own) const;
    /// ZeRO stage of a bucket. Tied weights stop at 1: their ranks are of two pipeline stages, which do not run the same segments.
    int stage_of(BucketKind kind) const { return kind == BucketKind::tied ? std::min(options_.zero_stage, 1) : options_.zero_stage; }
    const Handle& handle_of(const WeightPtr& weight) const;
    /// Handles of a bucket whose gradients' squares are known, by offset.
    std::vector<const Handle*> squared_handles(const Bucket& bucket) const;
    void gather_value(const Handle& handle);
    void scatter_grad(const Handle& handle);
    std::vector<OwnedPiece> pieces(bool once, bool with_tensors) const;
    void cut(Bucket& bucket, int index);
    void allocate(Bucket& bucket);
    void fill_handles();
    void initialise();
    /// Elements [offset, offset + from.numel()) of a bucket, from flat values.
    void write(Bucket& bucket, int64_t offset, const Tensor& from);
    /// A bucket's tensors in the order of their offsets.
    std::vector<const Placed*> tensors_of(int bucket) const;
    dist::Mesh mesh_;
    StoreOptions options_;
    GradSink sink_;
    std::vector<Bucket> buckets_;
    std::vector<Handle> handles_;
    std::map<const Weight*, size_t> handle_index_;
    std::array<int64_t, kNumBuckets> sizes_{};              ///< elements of each bucket, padding included
    std::map<std::string, Placed> tensors_;
    std::vector<std::string> names_;
    bool built_ = false;
};

/// A tensor's place in a flat bucket. Offsets ascend; padding may follow a tensor and belongs to the part that ends it.
struct Extent {
    int64_t offset = 0;
    std::vector<int64_t> shape;
};
/// Where a bucket of `total` elements is cut into `parts`: part boundaries (parts + 1 of them) at tensor starts or at rows that
/// are multiples of 128 (with `whole_tensors` at tensor starts only), each the nearest such place to an equal share; parts may be
/// empty. Pure; used by build() and its tests.
std::vector<int64_t> partition(const std::vector<Extent>& tensors, int64_t total, int parts, bool whole_tensors = false);

}  // namespace moe
