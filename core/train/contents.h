// Weights, moments and selection biases that acts of somebody move, set and put back: which content lies in which cell, over all ranks.
#pragma once
#include "core/model/model.h"

#include <nlohmann/json.hpp>

#include <functional>
#include <map>
#include <string>
#include <vector>

namespace moe::train {

/// What one act can change alone: a tensor of the model, a row of a gate, an element of a selection bias.
struct Cell {
    std::string name;                     ///< of the tensor in checkpoints
    int64_t row = -1;                     ///< of its first dim; −1: all of it
    int64_t bias_of = -1;                 ///< layer whose selection bias it is an element of; −1: a parameter's
    std::string key() const;              ///< "name" or "name[row]"
    auto operator<=>(const Cell&) const = default;
};

/// Contents by cell, of the cells that acts touched. A content is named after its beginning: "cell" is what training had made of it before the first act, "cell@3" what act 3 put there,
/// and "cell@3<content" a copy that act 3 made. So lists of acts with the same effect on a cell give it the same name, and training goes on with a content wherever it lies.
class Placement {
public:
    void put(const Cell& cell, int64_t act);
    void copy(const Cell& from, const Cell& to, int64_t act);
    void exchange(const Cell& a, const Cell& b);
    std::string of(const Cell& cell) const;
    const std::map<Cell, std::string>& cells() const { return cells_; }

private:
    std::map<Cell, std::string> cells_;
};

/// Owner of the contents that acts displaced. Every rank of the model's mesh makes the same calls with the same arguments; each keeps its own pieces.
class Contents {
public:
    /// What an act puts into a cell: {value, moment …} of the cell's shape, any float dtype, on every rank that asks; moments that are left out stay what they were.
    using Maker = std::function<std::vector<Tensor>(const Cell&)>;
    explicit Contents(Model& model) : model_(model) {}
    /// Brings the model from one placement to another: what lies in a cell moves with its moments, what was displaced comes back as it was, what lay nowhere yet is copied, or made by
    /// `make` for `act`. Throws moe::Error (state) before anything has changed where a content is gone.
    void move(const Placement& from, const Placement& to, int64_t act, const Maker& make = {});
    /// True where an exception has ended move() amid its changes.
    bool is_half_moved() const { return is_half_moved_; }
    /// An act is not in force any more, so what it displaced or made cannot come back.
    void forget(int64_t act);
    /// Value in the master type of a whole tensor or row, on every rank. Throws moe::Error (config) for a name that no rank has.
    Tensor whole(const Cell& cell) const;
    /// A layer's selection bias, float64 [E] on the host of every rank; undefined where its router has none.
    Tensor bias(int64_t layer) const;

    /// Biases that were displaced, and the names of the weights that were, which a checkpoint does not carry.
    nlohmann::json state() const;
    void restore(const nlohmann::json& state);

private:
    struct Local;
    struct Held {
        int64_t act = 0;                  ///< that displaced it
        bool is_gone = false;
        double bias = 0;
        std::vector<int64_t> shape;       ///< of the cell; empty for a bias, and where no rank has the tensor
        struct Part { std::vector<int64_t> offset; std::vector<Tensor> values; };      ///< {value, moment …} of a rectangle of the cell
        std::vector<Part> parts;          ///< this rank's; those of all ranks cover the cell once
    };
    using Pieces = std::map<std::string, std::vector<OwnedPiece>>;
    Pieces pieces(bool once) const;
    std::vector<int64_t> shape_of(const Cell& cell) const;
    Held take(const Cell& cell, const Pieces& once, const std::map<int64_t, Tensor>& biases) const;
    Tensor gather(const Held& held, size_t k) const;
    void limit();

    Model& model_;
    std::map<std::string, Held> displaced_;               ///< by content
    bool is_half_moved_ = false;
};

}  // namespace moe::train
