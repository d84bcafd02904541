// Catch2 2 (Debian 12) and 3 (Ubuntu, backports) behind one include; CMake says which it found.
#pragma once
#if __has_include(<c10/util/Logging.h>)
#include <c10/util/Logging.h>      // it defines a CHECK that ends the process: it goes first, so that Catch's is the one that stays
#undef CHECK
#endif
#ifdef MOE_CATCH2_3
#include <catch2/catch_all.hpp>
using Catch::Approx;
namespace Catch {
inline auto Contains(const std::string& text) { return Matchers::ContainsSubstring(text); }      // its name in version 2
}
#else
#include <catch2/catch.hpp>
#endif
