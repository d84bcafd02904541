// What an interrupt raises, wherever it is noticed.
#pragma once
#include "core/base/error.h"

namespace moe {

/// The error of an interrupt: `Error(interruption())`.
inline ErrorParts interruption() { return {ErrorKind::interrupted, "interrupted", "", "", "", "", -1, ""}; }
/// Whether it is that one; exit() ends a session with another text.
inline bool is_interruption(const ErrorParts& e) { return e.kind == ErrorKind::interrupted && e.op == "interrupted"; }

}  // namespace moe
