// The one error type of moelab. Every failure that a user can cause says what was got, what was wanted and what to do.
#pragma once
#include <fmt/format.h>

#include <stdexcept>
#include <string>

namespace moe {

/// What went wrong, in one word; the Lua field `kind` and the exit code (usage and config: 2, interrupted: 130, else 1).
enum class ErrorKind { usage, config, shape, dtype, device, memory, state, io, data, dist, cuda, lua, interrupted, internal };

/// Name of a kind as Lua and JSON show it, e.g. "shape".
const char* to_string(ErrorKind kind);

/// The parts of an error's text. `op` is the operation or key that failed ("matmul", "model.moe.num_experts_per_token").
struct ErrorParts {
    ErrorKind kind = ErrorKind::internal;
    std::string op, got, want, hint;
    std::string where;       ///< file:line of the check, or of the user's file where that is the cause
    int rank = -1;           ///< rank that raised it, −1 in a single process
    std::string traceback;   ///< Lua traceback where there is one
};

/// The only exception that moelab throws. what() is one line: "op: got …, want … (hint)".
class Error : public std::runtime_error {
public:
    explicit Error(ErrorParts parts);
    const ErrorParts& parts() const noexcept { return parts_; }
    ErrorKind kind() const noexcept { return parts_.kind; }
    /// Process exit code of this kind.
    int exit_code() const noexcept;

private:
    ErrorParts parts_;
};

/// Throws moe::Error; `where` is filled by the macros below.
[[noreturn]] void throw_error(ErrorKind kind, std::string op, std::string got, std::string want, std::string hint = {}, std::string where = {});

}  // namespace moe

#define MOE_WHERE_2(file, line) file ":" #line
#define MOE_WHERE_1(file, line) MOE_WHERE_2(file, line)
#define MOE_WHERE MOE_WHERE_1(__FILE__, __LINE__)

/// MOE_THROW(kind, op, got, want, hint): throws moe::Error with this place as `where`.
#define MOE_THROW(kind, op, got, want, hint) ::moe::throw_error(::moe::ErrorKind::kind, op, got, want, hint, MOE_WHERE)

/// MOE_CHECK(cond, kind, op, got, want, hint): the texts are made only when the condition fails.
#define MOE_CHECK(cond, kind, op, got, want, hint)          \
    do {                                                    \
        if (!(cond)) MOE_THROW(kind, op, got, want, hint);  \
    } while (false)
