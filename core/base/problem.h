// Several faults of one input, reported together.
#pragma once
#include "core/base/error.h"

#include <string>
#include <vector>

namespace moe {

/// One fault: where it is, what is there, what should be, what to do.
struct Problem {
    std::string path, got, want, hint;
    /// "path: got …, want … (hint)".
    std::string text() const;
};

/// Throws one moe::Error for all of them: a single one becomes the error itself, several are listed a line each under `what`.
/// `where` is the user's file, if any. Returns when there is none.
void throw_problems(ErrorKind kind, const std::string& what, const std::vector<Problem>& problems, const std::string& where = {});

}  // namespace moe
