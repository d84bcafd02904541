// Catch2's main for every unit test executable; test files include "tests/catch.h".
#define CATCH_CONFIG_MAIN
#include "tests/catch.h"
