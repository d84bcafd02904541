// The list of segments and the weights that they read. Letters: T tokens, D hidden, E experts.
#include "core/model/model.h"

#include "core/base/error.h"
#include "core/config/load.h"
#include "core/kernels/grouped/grouped.h"
#include "core/kernels/norm/layernorm.h"
#include "core/kernels/norm/rmsnorm.h"

#include <ATen/ops/zeros.h>

#include <algorithm>
#include <utility>

namespace moe {
namespace {
StoreOptions store_options(const Config& config, const ModelOptions& options) {
    StoreOptions s;
    s.precision = options.precision;
    s.device = options.device;
    s.zero_stage = int(config.distributed.zero_stage);
    s.seed = uint64_t(config.seed);
    s.num_moments = options.num_moments;
    s.whole_tensors = config.training.optimizer == "muon";
    s.training = options.training;
    return s;
}
}  // namespace

void check_fp8_sizes(const std::string& name, int64_t out, int64_t in, at::Device device) {
    bool fits = device.is_cpu() || kernels::grouped_fp8_fits(out, in, device);
    MOE_CHECK(fits, config, "training.use_fp8", fmt::format("{} of {} x {} on {}", name, out, in, device.str()), "both multiples of 16 up to 65536, on a GPU of compute capability 9.0", "use_bf16, or other widths");
}

Model::Model(const Config& config, const dist::Mesh& mesh, const ModelOptions& options)
    : config_(config), mesh_(mesh), options_(options), layout_(mesh), store_(mesh, store_options(config, options)), router_(routing::RouterSettings::from(config.model.moe)),
      loss_weights_(routing::LossWeights::from(config.model.moe)) {
    validate(config_);
    require_built(config_);
    declare_embedding();
    if (mesh_.is_first()) add_embed();
    int64_t L = config_.model.num_layers, P = mesh_.num_stages(), stage = mesh_.pp.rank();
    for (int64_t layer = stage * L / P; layer < (stage + 1) * L / P; ++layer) {
        add_attention(layer);
        if (config_.model.is_moe_layer(layer)) add_experts(layer);
        else add_dense(layer);
    }
    if (mesh_.is_last()) {
        add_head();
        for (int64_t k = 1; k <= config_.training.mtp_depth(); ++k) add_mtp(k);
    }
    store_.build();
}

std::string Model::bias_name(int64_t layer) { return layer_prefix(layer) + "mlp.gate.e_score_correction_bias"; }

Tensor Model::bias(int64_t layer) const {
    auto it = bias_.find(layer);
    return it == bias_.end() ? Tensor() : it->second;
}

const routing::Intervention* Model::intervention(int64_t layer) const {
    auto it = interventions_.find(layer);
    return it == interventions_.end() ? nullptr : &it->second;
}

Tensor Model::zero_bias() const { return at::zeros({config_.model.moe.num_experts}, at::TensorOptions().dtype(options_.precision.master).device(options_.device)); }

void Model::adopt(const Config& config) {
    config_.model.moe = config.model.moe;
    config_.training = config.training;
    router_ = routing::RouterSettings::from(config_.model.moe);
    loss_weights_ = routing::LossWeights::from(config_.model.moe);
    for (int64_t layer : routed_layers_)
        if (config_.model.moe.use_aux_loss_free && !bias_.contains(layer)) bias_[layer] = zero_bias();
    if (!config_.model.moe.use_aux_loss_free) bias_.clear();
}

std::vector<WeightPtr> Model::weights() const {
    std::vector<WeightPtr> all;
    for (auto& s : segments_)
        for (auto& w : s.weights)
            if (std::find(all.begin(), all.end(), w) == all.end()) all.push_back(w);
    return all;
}

// ---- weights ----
TensorSpec Model::cut(TensorSpec spec, int dim) const {
    int64_t parts = mesh_.tp.size();
    if (dim < 0 || parts == 1) return spec;
    int64_t whole = spec.shape[size_t(dim)];
    MOE_CHECK(whole % parts == 0, config, "distributed.tensor_parallel_size", fmt::format("{}: {} on {} ranks", spec.name, whole, parts), "a divisor", "");
    spec.cut_dim = dim;
    spec.cut_size = whole / parts;
    spec.cut_begin = mesh_.tp.rank() * spec.cut_size;
    return spec;
}

WeightPtr Model::in_fp8(WeightPtr weight, int64_t out, int64_t in) const {
    weight->is_fp8 = options_.precision.fp8;
    if (weight->is_fp8) check_fp8_sizes(weight->name, out, in, options_.device);
    return weight;
}

WeightPtr Model::projection(const std::string& name, int64_t out, int64_t in, int cut_dim) {
    WeightPtr w = weight(name, {out, in}, cut_dim);
    return in_fp8(w, cut_dim == 0 ? out / mesh_.tp.size() : out, cut_dim == 1 ? in / mesh_.tp.size() : in);
}

WeightPtr Model::weight(const std::string& name, std::vector<int64_t> shape, int cut_dim, BucketKind bucket) {
    TensorSpec tensor = cut({name + ".weight", shape, config_.model.init_method_std}, cut_dim);
    return store_.declare({name, tensor.cut_dim >= 0 ? BucketKind::tensor : bucket, {tensor}, tensor.local_shape()});
}

WeightPtr Model::rms_gamma(const std::string& name, int64_t width) {
    TensorSpec tensor{name + ".weight", {width}, 0, 1, /*decay=*/false};
    return store_.declare({name, BucketKind::dense, {tensor}, {width}});
}

Model::Norm Model::norm(const std::string& name, int64_t width) {
    Norm n{rms_gamma(name, width), {}};
    if (config_.model.norm_type == "layernorm") n.beta = store_.declare({name + ".bias", BucketKind::dense, {{name + ".bias", {width}, 0, 0, /*decay=*/false}}, {width}});
    return n;
}

Tensor Model::normalized(const Tensor& x_TD, const Norm& n, int below) const {
    double eps = config_.model.norm_eps;
    return n.beta ? kernels::layernorm(x_TD, n.gamma, n.beta, eps) : kernels::rmsnorm(x_TD, n.gamma, eps, {0, fp8_readers(below)});
}

std::pair<Tensor, Tensor> Model::branch(const Tensor& x_TD, const Norm& n, int products, int below) const {
    if (n.beta) return {normalized(x_TD, n), x_TD};
    return kernels::rmsnorm_and_input(x_TD, n.gamma, config_.model.norm_eps, {fp8_readers(products), fp8_readers(below)});
}

/// Gate and up of one feed-forward as one product: [2 · width, D].
WeightPtr Model::gate_up(const std::string& prefix, int64_t width) {
    int64_t D = config_.model.mla.d_model;
    double std = config_.model.init_method_std;
    TensorSpec gate = cut({prefix + "gate_proj.weight", {width, D}, std}, 0), up = cut({prefix + "up_proj.weight", {width, D}, std}, 0);
    int64_t rows = 2 * gate.local_shape()[0];
    return in_fp8(store_.declare({prefix + "gate_up", gate.cut_dim >= 0 ? BucketKind::tensor : BucketKind::dense, {gate, up}, {rows, D}}), rows, D);
}

/// The embedding is also what MTP modules read and, tied, the head: then the last stage has a copy.
void Model::declare_embedding() {
    bool again = config_.model.tie_word_embeddings || config_.training.mtp_depth() > 0;
    if (!mesh_.is_first() && !(mesh_.is_last() && again)) return;
    embedding_ = weight("model.embed_tokens", {config_.model.vocab(), config_.model.mla.d_model}, -1, again && mesh_.num_stages() > 1 ? BucketKind::tied : BucketKind::dense);
}

void Model::add(const std::string& name, int64_t layer, std::vector<std::string> reads, std::vector<std::string> writes, std::vector<WeightPtr> weights,
                std::function<Tensors(const Tensors&, Call&)> forward) {
    std::erase(weights, WeightPtr());
    segments_.push_back({name, layer, std::move(reads), std::move(writes), std::move(weights), std::move(forward)});
}

}  // namespace moe
