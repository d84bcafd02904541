#include "core/base/error.h"

#include <array>

namespace moe {
namespace {
std::string line_of(const ErrorParts& p) {
    std::string text = p.op;
    if (!p.got.empty()) text += (text.empty() ? "got " : ": got ") + p.got;
    if (!p.want.empty()) text += ", want " + p.want;
    if (!p.hint.empty()) text += " (" + p.hint + ")";
    if (p.rank >= 0) text = fmt::format("[rank {}] {}", p.rank, text);
    return text;
}
}  // namespace

const char* to_string(ErrorKind kind) {
    constexpr std::array names = {"usage", "config", "shape", "dtype", "device", "memory", "state", "io", "data", "dist", "cuda", "lua", "interrupted", "internal"};
    return names[static_cast<size_t>(kind)];
}

Error::Error(ErrorParts parts) : std::runtime_error(line_of(parts)), parts_(std::move(parts)) {}

int Error::exit_code() const noexcept {
    switch (parts_.kind) {
        case ErrorKind::usage:
        case ErrorKind::config: return 2;
        case ErrorKind::interrupted: return 130;
        default: return 1;
    }
}

void throw_error(ErrorKind kind, std::string op, std::string got, std::string want, std::string hint, std::string where) {
    throw Error({kind, std::move(op), std::move(got), std::move(want), std::move(hint), std::move(where), -1, {}});
}
}  // namespace moe
