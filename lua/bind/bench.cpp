// What `moelab bench lua` compares: a binding that does nothing, and ops as C++ calls them.
#include "lua/bind/bind.h"
#include "lua/bind/tensor.h"

#include <ATen/ATen.h>

#include <ctime>

namespace moe::lua {
namespace {
int nothing(lua_State*) { return 0; }

int add_secs(lua_State* L) {
    at::Tensor &a = check_tensor(L, 1, "a"), &b = check_tensor(L, 2, "b");
    int64_t n = check_integer(L, 3, "n");
    MOE_CHECK(n > 0, usage, running(L) + ": n", std::to_string(n), "1 or more", "");
    std::clock_t start = std::clock();
    for (int64_t i = 0; i < n; ++i) at::Tensor c = at::add(a, b);
    lua_pushnumber(L, double(std::clock() - start) / CLOCKS_PER_SEC / double(n));
    return 1;
}
const Binding kFunctions[] = {
    {"nothing", nothing, "moe.bench.nothing(): does nothing: what a bound call costs."},
    {"add_secs", add_secs, "moe.bench.add_secs(a, b, n): seconds of the processor that a + b takes in C++, result made and freed, the mean of n.\nExample: print(moe.bench.add_secs(moe.ones {4}, moe.ones {4}, 100))"},
};
}  // namespace

void open_bench(lua_State* L) {
    lua_newtable(L);
    set_functions(L, "moe.bench.", kFunctions);
    set_help(L, -1, "moe.bench", "moe.bench: what `moelab bench lua` measures.");
    lua_setfield(L, -2, "bench");
}
}  // namespace moe::lua
