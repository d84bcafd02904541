// The whole model: embed, layers of attention and feed-forward or experts, head; read top to bottom as on one device.
#pragma once
#include "core/config/config.h"
#include "core/kernels/dropout/dropout.h"
#include "core/kernels/mla/attention.h"
#include "core/model/segment.h"
#include "core/param/param_store.h"
#include "core/routing/router.h"

namespace moe {

/// How a model is held in memory.
struct ModelOptions {
    Precision precision;
    at::Device device = at::kCPU;
    bool training = true;                 ///< false: no gradients, no optimizer state
    int num_moments = 2;                  ///< optimizer's state tensors (train/optimizer.h)
};

/// Throws moe::Error (config) where E4M3 products on this device do not take a matrix [out, in]; those of a CPU take any.
void check_fp8_sizes(const std::string& name, int64_t out, int64_t in, at::Device device);

/// Segments, parameters and router buffers of one rank. Neither copied nor moved: segments point into it.
class Model {
public:
    /// Builds segments and parameters and initialises them. Throws moe::Error (config: not built yet, impossible shapes; memory).
    Model(const Config& config, const dist::Mesh& mesh, const ModelOptions& options);
    Model(const Model&) = delete;

    const Config& config() const { return config_; }
    const ModelOptions& options() const { return options_; }
    const dist::Mesh& mesh() const { return mesh_; }
    ParamStore& store() { return store_; }
    const std::vector<Segment>& segments() const { return segments_; }
    /// Absolute indices of this stage's layers that have a router, MTP modules included.
    const std::vector<int64_t>& routed_layers() const { return routed_layers_; }
    /// Selection bias of a layer's router: fp32 (fp64 in the fp64 recipe) [E], a buffer, not a parameter. Undefined without use_aux_loss_free.
    Tensor bias(int64_t layer) const;
    /// Name of that buffer in checkpoints: model.layers.N.mlp.gate.e_score_correction_bias.
    static std::string bias_name(int64_t layer);

    /// A layer's intervention; null where its router is as the configuration says, which costs nothing.
    const routing::Intervention* intervention(int64_t layer) const;
    /// Replaces all of them. Between steps only.
    void set_interventions(std::map<int64_t, routing::Intervention> by_layer) { interventions_ = std::move(by_layer); }
    bool has_interventions() const { return !interventions_.empty(); }
    /// The rule of every router without an intervention.
    const routing::RouterSettings& router_settings() const { return router_; }
    /// Takes model.moe's weights of losses, temperature, capacity and bias from a configuration that differs in nothing else that the model is built
    /// from. Where it newly wants selection biases they are made, of zeros; where it no longer does they are dropped. Between steps only.
    void adopt(const Config& config);

    /// Every handle of this rank's segments, each once.
    std::vector<WeightPtr> weights() const;

    /// Micro-batch from host tensors: ids, targets int64 [B, S]; domain int32 [B, S] or undefined (0); doc_start int32 [B, S], the first
    /// position of each token's piece of a document, or undefined (0): MTP looks ahead within a piece only, and with `mask_documents`
    /// attention sees only the piece. Under tensor parallel every rank of tp gives the same and gets its part of the tokens. Throws moe::Error (shape; data for ids
    /// outside the vocabulary).
    MicroBatch micro_batch(const Tensor& ids, const Tensor& targets, const Tensor& domain, const Tensor& doc_start, bool mask_documents = true) const;
    /// Valid targets of MTP module k (from 1) in host targets int64 [B, S] and doc_start int32 [B, S] or undefined.
    static int64_t num_mtp_targets(const Tensor& targets_BS, const Tensor& doc_start_BS, int64_t k);

    /// All segments in one ordinary autograd graph: the losses of head and MTP modules, 0-d float64, scaled. One pipeline stage only.
    /// What routers add hangs on the graph and is in batch.losses.
    Tensor run_attached(MicroBatch& batch);
    /// Segments [begin, end) on slots; returns the sum of the losses among their outputs, undefined without one. Without grad mode
    /// weights that ZeRO has cut are gathered around each; with it the caller does it.
    Tensor run_segments(MicroBatch& batch, size_t begin, size_t end, std::map<std::string, Tensor>& slots);
    /// Logits of all positions, fp32 or fp64 [B, S, V]; no gradient. Throws moe::Error (state) where the model is cut over ranks.
    Tensor logits(const Tensor& ids_BS);

private:
    /// A norm's scale and, for layernorm, its shift.
    struct Norm { WeightPtr gamma, beta; };
    Norm norm(const std::string& name, int64_t width);
    WeightPtr rms_gamma(const std::string& name, int64_t width);
    /// below: how many of the products with weights that in_fp8 marks read x's gradient. Where tp gathers it first, its E4M3 copy would be of no use, and none is made.
    Tensor normalized(const Tensor& x_TD, const Norm& norm, int below = 0) const;
    /// {normalized x, x}: what a block reads and what goes around it, so that backward adds both gradients in the norm's pass. products: how many read the normalized x; below as above.
    std::pair<Tensor, Tensor> branch(const Tensor& x_TD, const Norm& norm, int products, int below) const;
    int fp8_readers(int products) const { return options_.precision.fp8 && mesh_.tp.size() == 1 ? products : 0; }
    /// cut_dim: the dim that tensor parallel cuts, −1 for none.
    /// A matrix of a layer, [out, in]: in E4M3 where the precision says so. Embedding, head, gate and norms never are.
    WeightPtr projection(const std::string& name, int64_t out, int64_t in, int cut_dim = -1);
    /// Marks the weight for E4M3 products where the precision wants them. Throws moe::Error (config) for sizes that the device cannot.
    WeightPtr in_fp8(WeightPtr weight, int64_t out, int64_t in) const;
    WeightPtr weight(const std::string& name, std::vector<int64_t> shape, int cut_dim = -1, BucketKind bucket = BucketKind::dense);
    TensorSpec cut(TensorSpec spec, int dim) const;
    WeightPtr gate_up(const std::string& prefix, int64_t width);
    void add(const std::string& name, int64_t layer, std::vector<std::string> reads, std::vector<std::string> writes, std::vector<WeightPtr> weights, std::function<Tensors(const Tensors&, Call&)> forward);
    void declare_embedding();
    void add_embed();
    void add_attention(int64_t layer);
    void add_dense(int64_t layer);
    void add_experts(int64_t layer);
    WeightPtr add_route(int64_t layer);
    void add_head();
    void add_mtp(int64_t k);
    Tensor head_loss(const Tensor& final_TD, const Tensor& targets_T, const Factor& scale, Call& call, bool main) const;
    const kernels::RopeTable& rope(int64_t S);
    Tensor router_losses(const Tensor& logits_TE, const Tensor& scores_TE, const Tensor& counted_T, const Routed& routed, MicroBatch& batch, bool again) const;
    Tensor zero_bias() const;
    void decide(int64_t layer, const routing::RouterSettings& settings, const Tensor& weights_TK, const Tensor& domain_T, Routed& routed, MicroBatch& batch);
    routing::RouteCall route_call(int64_t layer, const MicroBatch& batch) const;
    const Tensor& domain_of(int64_t layer, const MicroBatch& batch) const;
    kernels::RandomRows rows_of(Purpose purpose, int64_t layer, const MicroBatch& batch) const;

    Config config_;
    dist::Mesh mesh_;
    ModelOptions options_;
    dist::Layout layout_;
    ParamStore store_;
    std::vector<Segment> segments_;
    std::vector<int64_t> routed_layers_;
    std::map<int64_t, Tensor> bias_;
    std::map<int64_t, routing::Intervention> interventions_;
    std::map<int64_t, kernels::RopeTable> rope_tables_;      ///< by sequence length
    routing::RouterSettings router_;
    routing::LossWeights loss_weights_;
    WeightPtr embedding_, head_;
    int residual_products_ = 0;                              ///< while segments are added: products of the last one that read the gradient of the residual as it leaves it
};

}  // namespace moe
