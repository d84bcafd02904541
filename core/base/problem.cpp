#include "core/base/problem.h"

namespace moe {
std::string Problem::text() const {
    std::string line = path;
    if (!got.empty()) line += ": got " + got;
    if (!want.empty()) line += ", want " + want;
    if (!hint.empty()) line += " (" + hint + ")";
    return line;
}

void throw_problems(ErrorKind kind, const std::string& what, const std::vector<Problem>& problems, const std::string& where) {
    if (problems.empty()) return;
    if (problems.size() == 1) {
        const Problem& p = problems.front();
        throw_error(kind, p.path, p.got, p.want, p.hint, where);
    }
    std::string list = fmt::format("{} problems", problems.size());
    for (const Problem& p : problems) list += "\n  " + p.text();
    throw_error(kind, what, list, "", "", where);
}
}  // namespace moe
