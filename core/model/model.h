// The whole model: embed, layers of attention and feed-forward or experts, head; read top to bottom as on one device.
#pragma once
#include "core/config/config.h"
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
    /// Absolute indices of the layers that have a router.
    const std::vector<int64_t>& routed_layers() const { return routed_layers_; }
    /// Selection bias of a layer's router: fp32 (fp64 in the fp64 recipe) [E], a buffer, not a parameter. Undefined without use_aux_loss_free.
    Tensor bias(int64_t layer) const;
    /// Name of that buffer in checkpoints: model.layers.N.mlp.gate.e_score_correction_bias.
    static std::string bias_name(int64_t layer);

    /// Micro-batch from host tensors: ids, targets int64 [B, S]; domain int32 [B, S] or undefined (0); doc_start int32 [B, S] or undefined.
    /// Throws moe::Error (shape; data for ids outside the vocabulary).
    MicroBatch micro_batch(const Tensor& ids, const Tensor& targets, const Tensor& domain, const Tensor& doc_start) const;

    /// All segments in one ordinary autograd graph: the loss, 0-d float64 (scaled by batch.loss_scale).
    Tensor run_attached(MicroBatch& batch);
    /// Logits of all positions, fp32 or fp64 [B, S, V]; no gradient.
    Tensor logits(const Tensor& ids_BS);

private:
    Tensors run_segments(MicroBatch& batch, size_t end, std::map<std::string, Tensor>& slots);
    void add_embed();
    void add_attention(int64_t layer);
    void add_dense(int64_t layer);
    void add_experts(int64_t layer);
    void add_head();
    WeightPtr weight(const std::string& name, std::vector<int64_t> shape, BucketKind bucket = BucketKind::dense);
    WeightPtr norm(const std::string& name, int64_t width);
    WeightPtr gate_up(const std::string& prefix, int64_t width);

    Config config_;
    dist::Mesh mesh_;
    ModelOptions options_;
    dist::Layout layout_;
    ParamStore store_;
    std::vector<Segment> segments_;
    std::vector<int64_t> routed_layers_;
    std::map<int64_t, Tensor> bias_;
    WeightPtr final_norm_, head_;
};

}  // namespace moe
