#include "core/train/optimizer.h"

#include "core/base/error.h"
#include "core/kernels/adamw/adamw.h"
#include "core/kernels/muon/muon.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <array>
#include <cmath>
#include <map>
#include <utility>

namespace moe::train {
namespace {
/// Matrices of one handle go through Muon together, at most this many elements (of the whole matrices) at a time: what a call holds besides them is a
/// few copies in the type of its products.
constexpr int64_t kMuonElements = int64_t(1) << 28;
}  // namespace

Precision precision_of(const TrainingConfig& c) {
    Precision p = Precision::named(c.precision());
    if (c.moments_dtype == "bf16") p.moments = at::kBFloat16;
    if (c.grads_dtype == "bf16") p.grad = at::kBFloat16;
    return p;
}

int num_moments(const TrainingConfig& c) {
    if (c.optimizer == "adamw" || c.optimizer == "adam" || c.optimizer == "muon") return 2;
    if (c.optimizer == "sgd") return c.momentum == 0 ? 0 : 1;
    MOE_THROW(config, "training.optimizer", c.optimizer, "adamw, adam, sgd or muon", "");
}

bool is_hidden_matrix(const ParamStore& store, const std::string& name) {
    const TensorSpec& spec = store.spec(name);
    if (spec.shape.size() != 2 || spec.frozen || store.bucket_of(name) == BucketKind::router) return false;
    for (const char* other : {"embed_tokens.weight", "head.weight"})       // lm_head, and shared_head.head of an MTP module
        if (name.ends_with(other)) return false;
    return true;
}

double grad_norm(ParamStore& store, const dist::Group& world) {
    GradNormParts parts = store.grad_norm_parts();
    std::vector<Tensor> sums = std::move(parts.known);
    for (const Tensor& grad : parts.rest) sums.push_back(kernels::sum_of_squares(grad).view(1));
    double sum = sums.empty() ? 0 : at::cat(sums).sum().item<double>();
    return std::sqrt(world.all_reduce(sum));
}

namespace {
/// A piece of a bucket's own part: views of elements [begin, end) of the bucket.
struct Piece {
    Master master;
    Tensor grad, m, v;
};
Piece piece(const Bucket& b, int64_t begin, int64_t end) {
    int64_t at = begin - b.own_begin, n = end - begin;
    Piece p{b.master_of(begin, end), b.grad_of(begin, end), {}, {}};
    if (b.state.size() > 0) p.m = b.state[0].narrow(0, at, n);
    if (b.state.size() > 1) p.v = b.state[1].narrow(0, at, n);
    return p;
}

/// Neighbouring matrices of one shape, or this rank's parts of them: elements [begin, begin + count · rows · cols) of a bucket.
struct Matrices {
    int64_t begin, count, rows, cols;
    int cut_dim;                               ///< 0 rows, 1 columns: cut over tp; −1: whole
    int64_t end() const { return begin + count * rows * cols; }
};

/// The matrices that Muon moves on this rank, by bucket, in the order of their elements.
std::array<std::vector<Matrices>, kNumBuckets> hidden_matrices(ParamStore& store) {
    std::array<std::vector<Matrices>, kNumBuckets> out;
    for (auto& name : store.names()) {
        if (!is_hidden_matrix(store, name)) continue;
        int kind = int(store.bucket_of(name));
        auto shape = store.spec(name).local_shape();
        const Bucket& b = store.buckets()[size_t(kind)];
        Matrices next{store.offset_of(name), 1, shape[0], shape[1], store.spec(name).cut_dim};
        if (next.end() <= b.own_begin || next.begin >= b.own_end) continue;
        MOE_CHECK(next.begin >= b.own_begin && next.end() <= b.own_end, internal, "muon: " + name, "a part of the matrix on this rank", "the whole matrix", "");
        auto& list = out[size_t(kind)];
        bool joins = !list.empty() && list.back().end() == next.begin && list.back().rows == next.rows && list.back().cols == next.cols && list.back().cut_dim == next.cut_dim &&
                     (list.back().count + 1) * next.rows * next.cols * (next.cut_dim < 0 ? 1 : store.mesh().tp.size()) <= kMuonElements;
        if (joins) ++list.back().count;
        else list.push_back(next);
    }
    return out;
}

/// Weights that AdamW moves together with their E4M3 copies.
struct Quantized {
    std::vector<PlacedWeight> of_bucket;                                             ///< those of the bucket at hand
    std::map<std::pair<bool, double>, std::vector<kernels::AdamWMatrix>> matrices;   ///< by what a range decides: decay and lr_scale
    std::vector<WeightPtr> weights;
};

/// What an update needs besides the buckets.
struct Step {
    const TrainingConfig& config;
    const dist::Group& tp;
    double lr, scale;
    int64_t number;
    Quantized& quantized;
};

kernels::AdamWOptions adam_options(bool decay, double lr_scale, const Step& s) {
    auto& c = s.config;
    kernels::AdamWOptions o{s.lr * lr_scale, c.adam_beta1, c.adam_beta2, c.adam_eps, decay ? c.weight_decay : 0, s.scale, s.number};
    o.decoupled = c.optimizer != "adam";
    return o;
}

/// A piece by AdamW, except for the weights in it whose E4M3 copies are made in the same pass: they wait for move_quantized().
void adam_piece(const Bucket& b, int64_t begin, int64_t end, const Range& r, const Step& s) {
    auto flat = [&](int64_t from, int64_t to) {
        if (from >= to) return;
        Piece p = piece(b, from, to);
        kernels::adamw(p.master, p.grad, p.m, p.v, adam_options(r.decay, r.lr_scale, s));
    };
    int64_t at = begin;
    for (auto& w : s.quantized.of_bucket) {
        if (w.begin < at || w.end > end) continue;
        flat(at, w.begin);
        Piece p = piece(b, w.begin, w.end);
        auto& copy = w.weight->fp8;
        s.quantized.matrices[{r.decay, r.lr_scale}].push_back({p.master, p.grad, p.m, p.v, {copy.q, copy.transposed, copy.scale}});
        s.quantized.weights.push_back(w.weight);
        at = w.end;
    }
    flat(at, end);
}

void move_quantized(const Step& s) {
    for (auto& w : s.quantized.weights) w->fp8.forget();                             // should the pass fail
    for (auto& [rule, matrices] : s.quantized.matrices) kernels::adamw_quantized(matrices, adam_options(rule.first, rule.second, s));
}

void sgd_range(const Bucket& b, const Range& r, const Step& s) {
    Piece p = piece(b, r.begin, r.end);
    kernels::sgd(p.master, p.grad, p.m, {s.lr * r.lr_scale, s.config.momentum, r.decay ? s.config.weight_decay : 0, s.scale});
}

/// fp64 for fp64; bf16 where the GPU computes in two bytes, as the paper does; else fp32.
at::ScalarType muon_products(const Bucket& b) {
    if (b.master.scalar_type() == at::kDouble) return at::kDouble;
    return b.value.is_cuda() && at::isReducedFloatingType(b.value.scalar_type()) ? at::kBFloat16 : at::kFloat;
}

/// The whole matrices of which every rank of tp has a part [N, R, C]. A collective.
Tensor gathered(const Tensor& part_NRC, int cut_dim, const dist::Group& tp) {
    Tensor flat = part_NRC.contiguous().view(-1), all = at::empty({tp.size(), part_NRC.size(0), part_NRC.size(1), part_NRC.size(2)}, flat.options());
    tp.all_gather(flat, all.view(-1), std::vector<int64_t>(size_t(tp.size()), flat.numel()));
    return at::cat(all.unbind(0), cut_dim + 1);
}

void muon_matrices(const Bucket& b, const Matrices& x, const Range& r, const Step& s) {
    Piece p = piece(b, x.begin, x.end());
    std::vector<int64_t> shape = {x.count, x.rows, x.cols};
    kernels::MuonOptions o{s.lr * r.lr_scale, s.config.momentum, r.decay ? s.config.weight_decay : 0, s.scale, muon_products(b), {}, {}};
    if (x.cut_dim >= 0) {
        int64_t size = x.cut_dim ? x.cols : x.rows;
        o.whole = [&](const Tensor& part) { return gathered(part, x.cut_dim, s.tp); };
        o.part = [&s, &x, size](const Tensor& whole) { return whole.narrow(x.cut_dim + 1, s.tp.rank() * size, size); };
    }
    kernels::muon(p.master.view(shape), p.grad.view(shape), p.m.view(shape), o);
}

/// Hidden matrices by Muon, what lies between them by AdamW. `next` walks the bucket's list along with its ranges.
void muon_range(const Bucket& b, const std::vector<Matrices>& matrices, size_t& next, const Range& r, const Step& s) {
    int64_t at = r.begin;
    while (next < matrices.size() && matrices[next].begin < r.begin) ++next;
    for (; next < matrices.size() && matrices[next].begin < r.end; ++next) {
        const Matrices& x = matrices[next];
        adam_piece(b, at, x.begin, r, s);
        muon_matrices(b, x, r, s);
        at = x.end();
    }
    adam_piece(b, at, r.end, r, s);
}
}  // namespace

void update(ParamStore& store, const TrainingConfig& c, double lr, double norm, int64_t step, double loss_scale) {
    at::NoGradGuard no_grad;
    double clip = c.grad_clip > 0 && norm > c.grad_clip ? c.grad_clip / norm : 1;
    Quantized quantized;
    Step s{c, store.mesh().tp, lr, clip / loss_scale, step, quantized};
    std::array<std::vector<Matrices>, kNumBuckets> matrices;
    if (c.optimizer == "muon") matrices = hidden_matrices(store);
    for (auto& b : store.buckets()) {
        size_t next = 0;
        quantized.of_bucket = store.quantized_weights(b);
        for (auto& r : b.ranges) {
            if (r.frozen) continue;
            if (c.optimizer == "sgd") sgd_range(b, r, s);
            else muon_range(b, matrices[size_t(b.kind)], next, r, s);
        }
    }
    move_quantized(s);
    store.gather_values();
    for (auto& w : quantized.weights) w->fp8.made_of(w->value);
    store.begin_grads();
}

}  // namespace moe::train
