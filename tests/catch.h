// Catch2 2 (Debian 12) and 3 (Ubuntu, backports) behind one include.
#pragma once
#if __has_include(<c10/util/Logging.h>)
#include <c10/util/Logging.h>      // it defines a CHECK that ends the process: it goes first, so that Catch's is the one that stays
#undef CHECK
#endif
#if __has_include(<catch2/catch_all.hpp>)
#include <catch2/catch_all.hpp>
#else
#include <catch2/catch.hpp>
#endif
