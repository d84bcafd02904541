#include "core/tensor/print.h"

#include "core/tensor/check.h"

#include <ATen/ops/cat.h>

#include <vector>

namespace moe {
namespace {
constexpr int64_t kShown = 8, kEdge = 3;

/// Indices shown of a dim of n; −1 stands for the gap.
std::vector<int64_t> shown(int64_t n) {
    std::vector<int64_t> out;
    for (int64_t i = 0; i < n; ++i) {
        if (n <= kShown || i < kEdge || i >= n - kEdge) out.push_back(i);
        else if (i == kEdge) out.push_back(-1);
    }
    return out;
}

std::string value_text(const Tensor& row, int64_t i) {
    if (row.scalar_type() == at::kBool) return row.select(0, i).item<bool>() ? "true" : "false";
    if (row.is_floating_point()) return fmt::format("{:.5g}", row.select(0, i).item<double>());
    return fmt::format("{}", row.select(0, i).item<int64_t>());
}

/// Rows of cells, right-aligned in columns of one width.
std::string table(const Tensor& matrix) {
    std::vector<std::vector<std::string>> cells;
    size_t width = 0;
    for (int64_t r : shown(matrix.size(0))) {
        cells.emplace_back();
        if (r < 0) { cells.back().push_back("..."); continue; }
        for (int64_t c : shown(matrix.size(1))) {
            cells.back().push_back(c < 0 ? "..." : value_text(matrix.select(0, r), c));
            if (c >= 0) width = std::max(width, cells.back().back().size());
        }
    }
    std::string text;
    for (auto& row : cells) {
        text += "\n ";
        for (auto& cell : row) text += fmt::format(" {:>{}}", cell, cell == "..." ? 3 : width);
    }
    return text;
}
}  // namespace

std::string to_text(const Tensor& t) {
    if (!t.defined()) return "undefined";
    std::string header = describe(t);
    if (t.numel() == 0) return header;
    if (t.is_complex()) MOE_THROW(dtype, "print", dtype_text(t.scalar_type()), "a real dtype", "");
    Tensor matrix = t.detach();
    while (matrix.dim() > 2) matrix = matrix.select(0, 0);
    if (t.dim() > 2) header += ", first matrix:";
    if (matrix.dim() == 0) matrix = matrix.view({1, 1});
    if (matrix.dim() == 1) matrix = matrix.unsqueeze(0);
    // Only what is shown crosses to the host; integers go as they are, floats as float64.
    auto edges = [](const Tensor& x, int64_t dim) {
        if (x.size(dim) <= 2 * kShown) return x;
        return at::cat({x.narrow(dim, 0, kShown), x.narrow(dim, x.size(dim) - kShown, kShown)}, dim);
    };
    matrix = edges(edges(matrix, 0), 1).cpu();
    if (matrix.is_floating_point()) matrix = matrix.to(at::kDouble);
    return header + table(matrix);
}
}  // namespace moe
