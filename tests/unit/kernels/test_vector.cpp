#include "core/kernels/common/parallel.h"
#include "core/kernels/common/vector.h"

#include "tests/catch.h"

#include <bit>
#include <cmath>
#include <limits>
#include <mutex>
#include <set>
#include <vector>

using namespace moe::kernels;

TEST_CASE("rounded: bf16 of every 251st float is c10's, bit for bit, NaN and infinity included", "[kernels]") {
    for (uint64_t bits = 0; bits < uint64_t(1) << 32; bits += 251) {
        auto x = std::bit_cast<float>(uint32_t(bits));
        if (rounded<c10::BFloat16>(x).x != c10::BFloat16(x).x) FAIL(bits);
    }
    for (uint32_t bits : {0x7f800000u, 0xff800000u, 0x7f800001u, 0x7fffffffu, 0xffffffffu, 0x7f7fffffu, 0x3f808000u, 0x3f818000u, 0x00000001u}) {
        auto x = std::bit_cast<float>(bits);
        CHECK(rounded<c10::BFloat16>(x).x == c10::BFloat16(x).x);
    }
    CHECK(rounded<float>(1.1f) == 1.1f);
}

TEST_CASE("vexp: is within 2 ulp of the library's, clamps at 87 and keeps a NaN", "[kernels]") {
    for (float x = -87; x <= 87; x += 0.0137f) {
        double want = std::exp(double(x)), ulp = std::nextafter(float(want), INFINITY) - float(want);
        INFO(x);
        CHECK(std::abs(double(vexp(x)) - want) <= 2 * ulp);
    }
    constexpr float inf = std::numeric_limits<float>::infinity();
    for (float x : {88.0f, 1e30f, inf}) CHECK(vexp(x) == vexp(87.0f));
    for (float x : {-88.0f, -1e30f, -inf}) CHECK(vexp(x) == vexp(-87.0f));
    CHECK(std::isnan(vexp(std::numeric_limits<float>::quiet_NaN())));
    CHECK(std::isnan(vexp(-std::numeric_limits<float>::quiet_NaN())));
}

TEST_CASE("largest: is found at every place and length", "[kernels]") {
    for (int n = 1; n < 40; ++n)
        for (int at = 0; at < n; ++at) {
            std::vector<float> x(n, -3);
            std::vector<double> y(n, -3);
            x[at] = y[at] = -1;
            CHECK(largest(x.data(), n) == -1);
            CHECK(largest(y.data(), n) == -1);
        }
}

TEST_CASE("share_out: tasks are each done once, also by a thread of the pool", "[kernels]") {
    for (int64_t n : {0, 1, 7, 100}) {
        std::mutex mutex;
        std::multiset<int64_t> done;
        auto all = [&] {
            share_out(n, [&](auto take) {
                for (int64_t i; (i = take()) < n;) {
                    std::lock_guard lock(mutex);
                    done.insert(i);
                }
            });
        };
        all();
        int64_t times = 1;
        if (n == 7) {
            at::parallel_for(0, 4, 1, [&](int64_t lo, int64_t hi) { for (; lo < hi; ++lo) all(); });
            times += 4;
        }
        for (int64_t i = 0; i < n; ++i) CHECK(int64_t(done.count(i)) == times);
        CHECK(int64_t(done.size()) == n * times);
    }
}
