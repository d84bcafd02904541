#include "core/tensor/check.h"
#include "core/tensor/print.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

// After LibTorch, which has a CHECK of its own: one that ends the process.
#include "tests/catch.h"

using namespace moe;

namespace {
template <class F> std::string message(F f) {
    try {
        f();
    } catch (const Error& e) {
        return std::string(to_string(e.kind())) + "|" + e.what();
    }
    return "no error";
}
}  // namespace

TEST_CASE("check: messages carry got and want with their values", "[tensor]") {
    Tensor a = at::zeros({4, 8}), b = at::zeros({4, 8}), ids = at::zeros({3}, at::kLong), none;
    CHECK(message([&] { check_inner("matmul", {"a", a}, 1, {"b", b}, 0); }) == "shape|matmul: inner dims differ: got [4, 8] x [4, 8], want a.size(1) == b.size(0)");
    CHECK(message([&] { check_shape("op", {"a", a}, {-1, 16}); }) == "shape|op: a: got [4, 8], want [any, 16]");
    CHECK(message([&] { check_shape("op", {"a", none}, {1}); }) == "shape|op: a: got an undefined tensor, want a tensor");
    CHECK(message([&] { check_dims("op", {"a", a}, 3); }) == "shape|op: a: got [4, 8], want 3 dims");
    CHECK(message([&] { check_dtype("op", {"ids", ids}, {at::kInt, at::kBool}); }) == "dtype|op: ids: got int64, want int32 or bool");
    CHECK(message([&] { check_float("op", {"ids", ids}); }) == "dtype|op: ids: got int64, want float64 or float32 or bfloat16 or float16");
    CHECK(message([&] { check_main_float("op", {"ids", ids}); }) == "dtype|op: ids: got int64, want float64 or float32 or bfloat16");
    CHECK(message([&] { check_same_dtype("op", {"a", a}, {"ids", ids}); }) == "dtype|op: dtypes of a and ids differ: got float32 and int64, want one dtype");
    CHECK(message([&] { check_contiguous("op", {"a", a.t()}); }).find("strides [1, 8]") != std::string::npos);
}

TEST_CASE("check: what is right passes", "[tensor]") {
    Tensor a = at::zeros({4, 8}), b = at::zeros({8, 2});
    CHECK(message([&] {
        check_inner("matmul", {"a", a}, 1, {"b", b}, 0);
        check_shape("op", {"a", a}, {-1, 8});
        check_same_device("op", {"a", a}, {"b", b});
        check_wide_float("op", {"a", a});
    }) == "no error");
    CHECK(describe(a) == "float32 [4, 8] cpu");
    CHECK(describe({}) == "undefined");
}

TEST_CASE("print: a header and at most six by six values", "[tensor]") {
    CHECK(to_text({}) == "undefined");
    CHECK(to_text(at::zeros({0, 3})) == "float32 [0, 3] cpu");
    CHECK(to_text(at::full({}, 2.5)) == "float32 [] cpu\n  2.5");
    CHECK(to_text(at::arange(3)) == "int64 [3] cpu\n  0 1 2");
    CHECK(to_text(at::zeros({1, 2}, at::kBool)) == "bool [1, 2] cpu\n  false false");
    CHECK(to_text(at::arange(100).view({10, 10})) ==
          "int64 [10, 10] cpu\n   0  1  2 ...  7  8  9\n  10 11 12 ... 17 18 19\n  20 21 22 ... 27 28 29\n  ...\n"
          "  70 71 72 ... 77 78 79\n  80 81 82 ... 87 88 89\n  90 91 92 ... 97 98 99");
    CHECK(to_text(at::arange(40)) == "int64 [40] cpu\n   0  1  2 ... 37 38 39");
    CHECK(to_text(at::arange(8).view({2, 2, 2})) == "int64 [2, 2, 2] cpu, first matrix:\n  0 1\n  2 3");
}
