#include "core/routing/trace.h"

#include "core/base/error.h"

#include <fmt/ranges.h>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>

namespace moe::routing {
namespace {
/// Micro-batches as one chunk.
TraceChunk join(const std::vector<TraceChunk>& parts) {
    auto joined = [&](auto pick) {
        std::vector<at::Tensor> list;
        for (auto& p : parts) list.push_back(pick(p));
        return list[0].defined() ? at::cat(list) : at::Tensor();
    };
    TraceChunk out{joined([](auto& p) { return p.ids; }), joined([](auto& p) { return p.domain; }), joined([](auto& p) { return p.position; }), {}};
    for (auto& [layer, first] : parts[0].layers) {
        auto of = [&, layer = layer](at::Tensor TraceChunk::Layer::*member) { return joined([&](auto& p) { return p.layers.at(layer).*member; }); };
        auto& l = out.layers[layer];
        using Layer = TraceChunk::Layer;
        l = {of(&Layer::experts), of(&Layer::weights), of(&Layer::margin), of(&Layer::entropy), of(&Layer::changed), of(&Layer::dropped), {}};
        for (auto& p : parts)
            if (auto& sum = p.layers.at(layer).probability; sum.defined()) l.probability = l.probability.defined() ? l.probability + sum : sum;
    }
    return out;
}

/// Places of T tokens in sequences of S (0: one).
at::Tensor positions(int64_t T, int64_t S) {
    at::Tensor position = at::arange(T, at::kInt);
    return S > 0 ? position.remainder(S) : position;
}

/// Layers and widths are the same: they can be one chunk.
bool fit_together(const TraceChunk& a, const TraceChunk& b) {
    return std::equal(a.layers.begin(), a.layers.end(), b.layers.begin(), b.layers.end(),
                      [](auto& x, auto& y) { return x.first == y.first && x.second.experts.size(1) == y.second.experts.size(1) && x.second.weights.defined() == y.second.weights.defined() && x.second.dropped.defined() == y.second.dropped.defined(); });
}
}  // namespace

Trace::Trace(TraceFacts facts, TraceOptions options) : facts_(std::move(facts)), options_(std::move(options)) {
    MOE_CHECK(facts_.num_experts >= 1 && facts_.num_experts <= 32767, config, "trace: experts", std::to_string(facts_.num_experts), "1 to 32767", "");
}
Trace::Trace(int64_t num_experts, std::vector<std::string> domains) : Trace(TraceFacts{num_experts, 1, 0, std::move(domains), "bytes"}) {}

Trace::Trace(const std::string& path) : file_(TraceFile::open(path)), is_open_(false) {
    facts_ = file_->facts();
    file_tokens_ = file_->num_tokens();
    for (size_t i = 0; i < file_->num_chunks() && i < 1; ++i) {
        for (auto& [layer, l] : file_->read(i).layers) {
            layers_.insert(layer);
            has_details_ = has_details_ || l.margin.defined();
        }
    }
}

void Trace::begin(const at::Tensor& ids_T, const at::Tensor& domain_T, int64_t S) {
    MOE_CHECK(is_open_, state, "trace", "more tokens", "a trace that is being made", "this one is finished");
    int64_t highest = domain_T.numel() ? domain_T.max().item<int32_t>() : -1, T = ids_T.numel();
    MOE_CHECK(highest < int64_t(facts_.domains.size()), data, "trace: domain", std::to_string(highest), fmt::format("a label below {}", facts_.domains.size()), "");
    open_bytes_ = 0;
    for (auto& part : open_) open_bytes_ += bytes_of(part);
    if (open_bytes_ >= options_.memory_bytes) spill();
    seq_length_ = S;
    open_.push_back({ids_T.flatten().to(at::kCPU, at::kInt), domain_T.flatten().to(at::kCPU, at::kShort), positions(T, S), {}});
}

void Trace::add(int64_t layer, const at::Tensor& ids_TK, const at::Tensor& kept_TK) {
    MOE_CHECK(!open_.empty() && open_.back().ids.size(0) == ids_TK.size(0), internal, "trace: tokens", std::to_string(ids_TK.size(0)), "as many as the last begin()", "");
    layers_.insert(layer);
    open_.back().layers[layer].experts = ids_TK.to(at::kCPU, facts_.num_experts <= 256 ? at::kByte : at::kShort).contiguous();
    if (!kept_TK.defined()) return;
    at::Tensor dropped = kept_TK.lt(0).sum(1).to(at::kCPU, at::kByte);
    open_.back().layers[layer].dropped = dropped.masked_fill_(open_.back().domain.lt(0), 0);           // padding counts nowhere
}

void Trace::add_details(int64_t layer, const at::Tensor& logits_TE, const at::Tensor& bias_E, const kernels::Route& route, const kernels::RouteOptions& options) {
    at::NoGradGuard no_grad;
    auto& l = open_.back().layers.at(layer);
    at::Tensor scores_TE = route.scores_TE.detach().to(at::kDouble), chosen_TK = route.ids_TK;
    int64_t T = scores_TE.size(0), E = scores_TE.size(1), K = chosen_TK.size(1), D = int64_t(facts_.domains.size());
    at::Tensor selection_TE = bias_E.defined() ? scores_TE + bias_E.to(scores_TE.options()) : scores_TE;
    l.weights = route.weights_TK.detach().to(at::kCPU, at::kHalf).contiguous();

    // The K-th and the next expert of the rule; where the allowed groups hold no more than K experts, there is no next one.
    kernels::RouteOptions wider = options;
    wider.top_k = K + 1;
    at::Tensor margin = at::full({T}, std::nan(""), scores_TE.options());
    if (K + 1 <= E / options.n_group * options.topk_group) {
        at::Tensor next = selection_TE.gather(1, kernels::route(logits_TE.detach(), bias_E, wider).ids_TK).select(1, K);
        margin = std::get<0>(selection_TE.gather(1, chosen_TK).min(1)) - next;
    }
    l.margin = margin.to(at::kCPU, at::kHalf).contiguous();

    at::Tensor p_TE = scores_TE / scores_TE.sum(1, true).clamp_min(1e-300);
    at::Tensor entropy = at::special_entr(p_TE).sum(1) / (E > 1 ? std::log(double(E)) : 1.0);
    l.entropy = entropy.to(at::kCPU, at::kHalf).contiguous();

    at::Tensor changed = at::zeros({T}, at::TensorOptions().dtype(at::kLong).device(scores_TE.device()));
    if (bias_E.defined()) {
        at::Tensor plain_TK = kernels::route(logits_TE.detach(), {}, options).ids_TK;
        changed = chosen_TK.unsqueeze(2).eq(plain_TK.unsqueeze(1)).any(2).logical_not().sum(1);
    }
    l.changed = changed.to(at::kCPU, at::kByte).contiguous();

    at::Tensor domain = open_.back().domain.to(at::kLong), counted = domain.ge(0).to(at::kDouble).unsqueeze(1);
    l.probability = at::zeros({D, E}, at::kDouble);
    if (D > 0) l.probability.index_add_(0, domain.clamp_min(0), p_TE.to(at::kCPU) * counted);
    has_details_ = true;
}

namespace {
at::Tensor flat_bytes(const at::Tensor& t) { return t.contiguous().view({-1}).view(at::kByte); }

}  // namespace

void Trace::gather(const dist::Mesh& mesh, int64_t num_tokens) {
    if (mesh.world.size() == 1) return;
    using Layer = TraceChunk::Layer;
    constexpr at::Tensor Layer::*kByToken[] = {&Layer::experts, &Layer::weights, &Layer::margin, &Layer::entropy, &Layer::changed, &Layer::dropped};
    TraceChunk& part = open_.back();
    int64_t ranks = mesh.stage.size(), all = part.ids.size(0) * ranks, N = num_tokens < 0 ? all : num_tokens, D = int64_t(facts_.domains.size());
    auto join_ranks = [&](at::Tensor& t) {
        if (!t.defined()) return;
        auto shape = t.sizes().vec();
        shape[0] = all;
        at::Tensor mine = flat_bytes(t), bytes = at::empty({mine.numel() * ranks}, at::kByte);
        mesh.stage.all_gather(mine, bytes, std::vector<int64_t>(size_t(ranks), mine.numel()));
        t = bytes.view(t.scalar_type()).view(shape).narrow(0, 0, N).contiguous();
    };
    for (at::Tensor* t : {&part.ids, &part.domain}) join_ranks(*t);
    part.position = positions(all, seq_length_).narrow(0, 0, N).contiguous();
    for (auto& [_, l] : part.layers) {
        for (auto member : kByToken) join_ranks(l.*member);
        if (l.probability.defined()) mesh.stage.all_reduce(l.probability);
    }
    if (mesh.num_stages() == 1) return;
    // Every stage has its own layers of the same tokens.
    int64_t count = mesh.pp.all_reduce(part.layers.empty() ? int64_t(0) : part.layers.rbegin()->first + 1, dist::ReduceOp::max);
    at::Tensor forms = at::full({count, 3}, -1, at::kLong);             // by layer: whose it is, choices a token, which tensors there are
    for (auto& [layer, l] : part.layers) {
        int64_t flags = 0, bit = 1;
        for (auto member : kByToken) flags += bit * (l.*member).defined(), bit *= 2;
        forms[layer].copy_(at::tensor({int64_t(mesh.pp.rank()), l.experts.size(1), flags}));
    }
    if (count > 0) mesh.pp.all_reduce(forms, dist::ReduceOp::max);
    for (int64_t layer = 0; layer < count; ++layer) {
        const int64_t* f = forms.const_data_ptr<int64_t>() + layer * 3;
        if (f[0] < 0) continue;
        Layer& l = part.layers[layer];
        int64_t bit = 1;
        auto share = [&](at::Tensor& t, at::IntArrayRef shape, at::ScalarType type) {
            if (mesh.pp.rank() != f[0]) t = at::empty(shape, type);
            mesh.pp.broadcast(t.view({-1}).view(at::kByte), int(f[0]));
        };
        for (auto member : kByToken) {
            bool is_there = f[2] & bit;
            bit *= 2;
            if (!is_there) continue;
            bool by_choice = member == &Layer::experts || member == &Layer::weights;
            at::ScalarType type = member == &Layer::experts ? (facts_.num_experts <= 256 ? at::kByte : at::kShort) : member == &Layer::changed || member == &Layer::dropped ? at::kByte : at::kHalf;
            share(l.*member, by_choice ? std::vector<int64_t>{N, f[1]} : std::vector<int64_t>{N}, type);
        }
        if (l.margin.defined()) share(l.probability, {D, facts_.num_experts}, at::kDouble);
        layers_.insert(layer);
        has_details_ = has_details_ || l.margin.defined();
    }
}

/// Micro-batches of a kind leave memory as one chunk.
void Trace::spill() {
    if (open_.empty()) return;
    if (!file_) file_ = TraceFile::create(options_.file, facts_);
    size_t begin = 0;
    for (size_t i = 1; i <= open_.size(); ++i) {
        if (i < open_.size() && fit_together(open_[begin], open_[i])) continue;
        file_->append(join(std::vector<TraceChunk>(open_.begin() + std::ptrdiff_t(begin), open_.begin() + std::ptrdiff_t(i))));
        begin = i;
    }
    file_tokens_ = file_->num_tokens();
    open_.clear();
    open_bytes_ = 0;
}

void Trace::finish() {
    if (is_open_ && (file_ || !options_.file.empty())) {
        spill();
        if (!file_) file_ = TraceFile::create(options_.file, facts_);
        file_->finish();
    }
    is_open_ = false;
}

void Trace::save(const std::string& path) const {
    auto out = TraceFile::create(path, facts_);
    for (size_t i = 0; file_ && i < file_->num_chunks(); ++i) out->append(file_->read(i));
    for (auto& part : open_) out->append(part);
    out->finish();
}

int64_t Trace::num_tokens() const {
    int64_t sum = file_tokens_;
    for (auto& part : open_) sum += part.ids.size(0);
    return sum;
}

std::vector<int64_t> Trace::layers() const { return {layers_.begin(), layers_.end()}; }

void Trace::check_layer(int64_t layer) const {
    MOE_CHECK(layers_.contains(layer), config, "trace: layer", std::to_string(layer), fmt::format("a routed layer: one of {}", fmt::join(layers_, ", ")), "layers are counted from 0; dense layers have no router");
}
void Trace::check_expert(int64_t expert) const {
    MOE_CHECK(expert >= 0 && expert < num_experts(), config, "trace: expert", std::to_string(expert), fmt::format("0 … {}", num_experts() - 1), "experts are counted from 0");
}

void Trace::each(const std::function<bool(const TraceView&)>& f) const {
    MOE_CHECK(num_tokens() > 0, state, "trace", "no tokens", "a trace with tokens", "evaluate with this trace first");
    int64_t first = 0;
    auto show = [&](TraceChunk chunk) {
        for (auto& [layer, l] : chunk.layers) l.experts = l.experts.to(at::kShort);
        bool more = f({chunk, first});
        first += chunk.ids.size(0);
        return more;
    };
    for (size_t i = 0; file_ && i < file_->num_chunks(); ++i)
        if (!show(file_->read(i))) return;
    if (open_.size() > 1 && std::all_of(open_.begin() + 1, open_.end(), [&](auto& part) { return fit_together(open_[0], part); })) open_ = {join(open_)};
    for (auto& part : open_)
        if (!show(part)) return;
}

at::Tensor Trace::all(const std::function<at::Tensor(const TraceView&)>& part) const {
    std::vector<at::Tensor> parts;
    each([&](const TraceView& v) { return parts.push_back(part(v)), true; });
    return parts.size() == 1 ? parts[0] : at::cat(parts);
}

at::Tensor Trace::ids() const { return all([](auto& v) { return v.chunk.ids.to(at::kLong); }); }
at::Tensor Trace::domain() const { return all([](auto& v) { return v.chunk.domain.to(at::kInt); }); }
at::Tensor Trace::position() const { return all([](auto& v) { return v.chunk.position; }); }

at::Tensor Trace::experts(int64_t layer) const {
    check_layer(layer);
    return all([&](auto& v) { return v.chunk.layers.at(layer).experts; });
}

namespace {
const at::Tensor& needed(const at::Tensor& t) {
    MOE_CHECK(t.defined(), state, "trace: weights and margins", "a trace without them", "one made with weights = true", "");
    return t;
}
}  // namespace

at::Tensor Trace::weights(int64_t layer) const {
    check_layer(layer);
    return all([&](auto& v) { return needed(v.chunk.layers.at(layer).weights).to(at::kFloat); });
}
at::Tensor Trace::margin(int64_t layer) const {
    check_layer(layer);
    return all([&](auto& v) { return needed(v.chunk.layers.at(layer).margin).to(at::kFloat); });
}

at::Tensor Trace::dropped(int64_t layer) const {
    check_layer(layer);
    return all([&](auto& v) {
        const at::Tensor& dropped = v.chunk.layers.at(layer).dropped;
        return dropped.defined() ? dropped : at::zeros({v.size()}, at::kByte);
    });
}

int64_t Trace::top_k(int64_t layer) const {
    check_layer(layer);
    int64_t K = 0;
    each([&](const TraceView& v) { return K = v.chunk.layers.at(layer).experts.size(1), false; });
    return K;
}

at::Tensor Trace::load(int64_t layer) const {
    check_layer(layer);
    at::Tensor out = at::zeros({int64_t(facts_.domains.size()), num_experts()}, at::kLong);
    auto* count = out.data_ptr<int64_t>();
    each([&](const TraceView& v) {
        const at::Tensor& experts = v.chunk.layers.at(layer).experts;
        auto* expert = experts.const_data_ptr<int16_t>();
        int64_t K = experts.size(1);
        for (int64_t n = 0; n < v.size(); ++n)
            for (int64_t k = 0; v.domain()[n] >= 0 && k < K; ++k) ++count[v.domain()[n] * num_experts() + expert[n * K + k]];
        return true;
    });
    return out;
}

namespace {
/// Calls f with the chunk and the place in it of every token that counts and came to the expert.
template <class F> void each_position(const Trace& trace, int64_t layer, int64_t expert, F f) {
    trace.check_layer(layer);
    trace.check_expert(expert);
    trace.each([&](const TraceView& v) {
        const at::Tensor& experts = v.chunk.layers.at(layer).experts;
        auto* chosen = experts.const_data_ptr<int16_t>();
        int64_t K = experts.size(1);
        for (int64_t n = 0; n < v.size(); ++n)
            if (v.domain()[n] >= 0 && std::find(chosen + n * K, chosen + (n + 1) * K, int16_t(expert)) != chosen + (n + 1) * K) f(v, n);
        return true;
    });
}
}  // namespace

std::vector<std::pair<int64_t, int64_t>> Trace::tokens(int64_t layer, int64_t expert, int64_t top) const {
    std::map<int64_t, int64_t> count;
    each_position(*this, layer, expert, [&](const TraceView& v, int64_t n) { ++count[v.ids()[n]]; });
    std::vector<std::pair<int64_t, int64_t>> out(count.begin(), count.end());
    std::stable_sort(out.begin(), out.end(), [](auto& a, auto& b) { return a.second > b.second; });
    if (int64_t(out.size()) > top) out.resize(size_t(std::max<int64_t>(0, top)));
    return out;
}

std::vector<int64_t> Trace::examples(int64_t layer, int64_t expert, int64_t count) const {
    std::vector<int64_t> all, out;
    each_position(*this, layer, expert, [&](const TraceView& v, int64_t n) { all.push_back(v.first + n); });
    int64_t n = std::min<int64_t>(count, int64_t(all.size()));
    for (int64_t i = 0; i < n; ++i) out.push_back(all[size_t((2 * i + 1) * int64_t(all.size()) / (2 * n))]);
    return out;
}

}  // namespace moe::routing
