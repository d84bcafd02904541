#include "core/train/contents.h"

#include "core/base/error.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <optional>
#include <set>

namespace moe::train {
namespace {
/// Acts whose displaced weights are kept.
constexpr size_t kMaxActsKept = 16;
constexpr int64_t kMaxDims = 4;

std::string mark(int64_t act) { return fmt::format("@{}", act); }

bool mentions(const std::string& content, int64_t act) {
    std::string m = mark(act);
    for (size_t at = content.find(m); at != std::string::npos; at = content.find(m, at + 1))
        if (size_t end = at + m.size(); end == content.size() || content[end] == '<') return true;
    return false;
}

at::Tensor narrowed(at::Tensor t, const std::vector<int64_t>& offset, at::IntArrayRef shape) {
    for (size_t d = 0; d < shape.size(); ++d) t = t.narrow(int64_t(d), offset[d], shape[d]);
    return t;
}
}  // namespace

std::string Cell::key() const { return row < 0 ? name : fmt::format("{}[{}]", name, row); }

std::string Placement::of(const Cell& cell) const {
    auto it = cells_.find(cell);
    return it == cells_.end() ? cell.key() : it->second;
}
void Placement::put(const Cell& cell, int64_t act) { cells_[cell] = cell.key() + mark(act); }
void Placement::copy(const Cell& from, const Cell& to, int64_t act) {
    cells_[from] = of(from);
    cells_[to] = fmt::format("{}{}<{}", to.key(), mark(act), of(from));
}
void Placement::exchange(const Cell& a, const Cell& b) {
    std::string of_a = of(a), of_b = of(b);
    cells_[a] = of_b;
    cells_[b] = of_a;
}

/// What a rank holds of a cell: views.
struct Contents::Local {
    std::vector<int64_t> offset;
    Master master;
    std::vector<Tensor> state;

    static std::optional<Local> of(const OwnedPiece& piece, int64_t row) {
        const auto& [name, offset, shape] = piece.rectangle;
        if (row < 0) return Local{offset, piece.master, piece.state};
        int64_t at = row - offset[0], n = piece.master.data.numel() / shape[0];
        if (at < 0 || at >= shape[0]) return {};
        std::vector<int64_t> row_offset = offset, row_shape = shape;
        row_offset[0] = 0, row_shape[0] = 1;
        Local out{row_offset, piece.master.view({-1}).narrow(at * n, n).view(row_shape), {}};
        for (const Tensor& s : piece.state) out.state.push_back(s.narrow(0, at, 1));
        return out;
    }
    at::IntArrayRef shape() const { return master.data.sizes(); }
};

Contents::Pieces Contents::pieces(bool once) const {
    Pieces out;
    for (OwnedPiece& p : model_.store().owned(once)) out[p.rectangle.name].push_back(std::move(p));
    return out;
}

/// Of a tensor that may be on other ranks only; empty where no rank has it.
std::vector<int64_t> Contents::shape_of(const Cell& cell) const {
    at::Tensor dims = at::zeros({kMaxDims + 1}, at::kLong);
    if (model_.store().has(cell.name)) {
        auto shape = model_.store().spec(cell.name).shape;
        dims[0] = int64_t(shape.size());
        for (size_t d = 0; d < shape.size(); ++d) dims[int64_t(d) + 1] = shape[d];
    }
    model_.mesh().world.all_reduce(dims, dist::ReduceOp::max);
    const int64_t* d = dims.const_data_ptr<int64_t>();
    std::vector<int64_t> shape(d + 1, d + 1 + d[0]);
    if (cell.row >= 0 && !shape.empty()) shape[0] = 1;
    return shape;
}

Contents::Held Contents::take(const Cell& cell, const Pieces& once, const std::map<int64_t, Tensor>& biases) const {
    Held out;
    if (cell.bias_of >= 0) {
        if (const Tensor& bias = biases.at(cell.bias_of); bias.defined()) out.bias = bias[cell.row].item<double>();
        return out;
    }
    out.shape = shape_of(cell);
    auto found = once.find(cell.name);
    if (found == once.end()) return out;
    for (const OwnedPiece& piece : found->second)
        if (auto local = Local::of(piece, cell.row)) {
            out.parts.push_back({local->offset, {local->master.read().clone()}});
            for (const Tensor& s : local->state) out.parts.back().values.push_back(s.clone());
        }
    return out;
}

/// Value (k = 0) or moment k − 1 of all of a content. Every element comes from one rank, and bits are summed as integers, so that nothing is rounded.
Tensor Contents::gather(const Held& held, size_t k) const {
    const StoreOptions& o = model_.store().options();
    at::ScalarType type = k == 0 || o.precision.moments == at::kDouble ? o.precision.master : at::kFloat;
    Tensor all = at::zeros(held.shape, at::TensorOptions().dtype(type).device(o.device));
    for (const auto& part : held.parts) narrowed(all, part.offset, part.values[k].sizes()).copy_(part.values[k]);
    const auto& world = model_.mesh().world;
    if (world.size() > 1) world.all_reduce(all.view(type == at::kDouble ? at::kLong : at::kInt));
    return all;
}

Tensor Contents::whole(const Cell& cell) const {
    at::NoGradGuard no_grad;
    Held held = take(cell, pieces(true), {});
    if (held.shape.empty()) model_.store().spec(cell.name);             // throws, with the nearest name
    return gather(held, 0);
}

Tensor Contents::bias(int64_t layer) const {
    at::NoGradGuard no_grad;
    const dist::Mesh& mesh = model_.mesh();
    Tensor bias = model_.bias(layer);
    if (mesh.num_stages() == 1) return bias.defined() ? bias.to(at::kCPU, at::kDouble, false, true) : bias;
    Tensor sum = at::zeros({model_.config().model.moe.num_experts + 1}, at::kDouble);
    if (bias.defined() && mesh.stage.rank() == 0) {
        sum.narrow(0, 0, bias.numel()).copy_(bias);
        sum[bias.numel()] = 1;
    }
    mesh.world.all_reduce(sum);
    int64_t E = sum.numel() - 1;
    return sum[E].item<double>() > 0 ? sum.narrow(0, 0, E) : Tensor();
}

void Contents::move(const Placement& from, const Placement& to, int64_t act, const Maker& make) {
    at::NoGradGuard no_grad;
    is_half_moved_ = false;
    std::set<Cell> changed;
    std::map<std::string, Cell> where;
    std::set<std::string> placed;
    std::map<int64_t, Tensor> biases;
    for (const Placement* p : {&from, &to})
        for (const auto& [cell, _] : p->cells()) {
            where[from.of(cell)] = cell;
            placed.insert(to.of(cell));
            if (from.of(cell) != to.of(cell)) changed.insert(cell);
        }
    if (changed.empty()) return;
    // Where each new content comes from: itself, or what it is to be a copy of; "" where the act makes it.
    std::map<Cell, std::string> source;
    for (const Cell& cell : changed) {
        std::string content = to.of(cell);
        auto exists = [&] { return where.contains(content) || displaced_.contains(content); };
        while (!exists() && content.find('<') != std::string::npos) content = content.substr(content.find('<') + 1);
        bool is_made = !exists() && make && content == cell.key() + mark(act);
        auto old = displaced_.find(content);
        bool is_gone = !is_made && (!exists() || (!where.contains(content) && old->second.is_gone));
        MOE_CHECK(!is_gone, state, "undo: " + cell.key(), "values before that are gone", fmt::format("those that one of the last {} acts of this process displaced", kMaxActsKept),
                  "a checkpoint does not carry them: run:restore goes back as a whole");
        source[cell] = is_made ? "" : content;
    }
    for (const Cell& cell : changed)
        if (cell.bias_of >= 0 && !biases.contains(cell.bias_of)) biases[cell.bias_of] = bias(cell.bias_of);
    for (const auto& [_, content] : source)
        if (auto it = where.find(content); it != where.end() && it->second.bias_of >= 0 && !biases.contains(it->second.bias_of)) biases[it->second.bias_of] = bias(it->second.bias_of);
    Pieces once = pieces(true), mine = pieces(false);
    std::map<std::string, Held> now;
    for (const Cell& cell : changed) now[from.of(cell)] = take(cell, once, biases);
    for (const auto& [_, content] : source)
        if (auto it = where.find(content); it != where.end() && !now.contains(content)) now[content] = take(it->second, once, biases);
    size_t num_values = 1 + (model_.store().options().training ? size_t(model_.store().options().num_moments) : 0);
    bool moves_weights = false;
    for (const auto& [cell, content] : source) {
        const Held* held = content.empty() ? nullptr : now.contains(content) ? &now.at(content) : &displaced_.at(content);
        if (cell.bias_of >= 0) {
            if (Tensor& bias = biases.at(cell.bias_of); bias.defined()) bias[cell.row] = held ? held->bias : make(cell).at(0).item<double>();
            continue;
        }
        moves_weights = true;
        std::vector<Tensor> values;
        for (size_t k = 0; held && !held->shape.empty() && k < num_values; ++k) values.push_back(gather(*held, k));
        auto targets = mine.find(cell.name);
        if (targets == mine.end()) continue;
        if (!held) values = make(cell);
        is_half_moved_ = true;
        for (const OwnedPiece& piece : targets->second)
            if (auto local = Local::of(piece, cell.row)) {
                local->master.write(narrowed(values.at(0), local->offset, local->shape()));
                for (size_t s = 0; s + 1 < values.size() && s < local->state.size(); ++s) local->state[s].copy_(narrowed(values[s + 1], local->offset, local->shape()));
            }
    }
    is_half_moved_ = true;
    for (auto& [layer, bias] : biases)
        if (Tensor own = model_.bias(layer); own.defined()) own.copy_(bias);
    if (moves_weights) model_.store().gather_values();
    for (const Cell& cell : changed)
        if (std::string content = from.of(cell); !placed.contains(content)) {
            displaced_[content] = std::move(now.at(content));
            displaced_[content].act = act;
        }
    for (const std::string& content : placed) displaced_.erase(content);
    limit();
    is_half_moved_ = false;
}

void Contents::forget(int64_t act) {
    std::erase_if(displaced_, [&](const auto& entry) { return mentions(entry.first, act); });
}

void Contents::limit() {
    std::set<int64_t> acts;
    for (const auto& [_, held] : displaced_)
        if (!held.parts.empty() || !held.shape.empty()) acts.insert(held.act);
    if (acts.size() <= kMaxActsKept) return;
    int64_t oldest = *std::next(acts.rbegin(), kMaxActsKept - 1);
    for (auto& [_, held] : displaced_)
        if (!held.shape.empty() && held.act < oldest) held = {held.act, true, 0, {}, {}};
}

nlohmann::json Contents::state() const {
    nlohmann::json out = nlohmann::json::object();
    for (const auto& [content, held] : displaced_) out[content] = held.shape.empty() && !held.is_gone ? nlohmann::json(held.bias) : nlohmann::json();
    return out;
}

void Contents::restore(const nlohmann::json& state) {
    is_half_moved_ = false;
    displaced_.clear();
    for (const auto& [content, bias] : state.items()) {
        Held& held = displaced_[content];
        held.is_gone = bias.is_null();
        if (!held.is_gone) held.bias = bias.get<double>();
    }
}

}  // namespace moe::train
