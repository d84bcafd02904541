// The moe::Error of a call, for tests that look into it.
#pragma once
#include "core/base/error.h"
#include "tests/catch.h"

namespace moe::test {

/// What f() throws; the test fails where it throws no moe::Error.
template <class F>
Error error_of(F&& f) {
    try {
        f();
    } catch (const Error& e) {
        return e;
    }
    FAIL("no moe::Error was thrown");
    throw;
}

}  // namespace moe::test
