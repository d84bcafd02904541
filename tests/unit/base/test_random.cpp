#include "core/base/random.h"
#include "tests/catch.h"

#include <cmath>
#include <set>
#include <vector>

using namespace moe;

TEST_CASE("philox: the generator's published answers", "[base][random]") {
    // Source: kat_vectors of Random123, philox4x32 with 10 rounds.
    auto zeros = philox({0, 0, 0, 0}, 0);
    CHECK(zeros == std::array<uint32_t, 4>{0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u});
    auto ones = philox({~0u, ~0u, ~0u, ~0u}, ~0ull);
    CHECK(ones == std::array<uint32_t, 4>{0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu});
    auto pi = philox({0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u}, 0x299f31d0a4093822ull);
    CHECK(pi == std::array<uint32_t, 4>{0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u});
}

TEST_CASE("draw: every part of the key and of the counter changes the numbers", "[base][random]") {
    std::set<std::array<uint32_t, 4>> seen;
    RandomKey base{7, Purpose::router_noise, 3, 2};
    seen.insert(draw(base, 5, 1));
    for (RandomKey k : {RandomKey{8, Purpose::router_noise, 3, 2}, RandomKey{7, Purpose::sampling, 3, 2}, RandomKey{7, Purpose::router_noise, 4, 2}, RandomKey{7, Purpose::router_noise, 3, 1}})
        seen.insert(draw(k, 5, 1));
    seen.insert(draw(base, 6, 1));
    seen.insert(draw(base, 5, 2));
    seen.insert(draw(base, 5 + (1ull << 32), 1));       // tokens beyond 2^32
    seen.insert(draw(base, 5 + (1ull << 43), 1));
    CHECK(seen.size() == 9);
    CHECK(draw(base, 5, 1) == draw(base, 5, 1));
}

TEST_CASE("uniform: in [0, 1), with mean and variance of the uniform distribution", "[base][random]") {
    CHECK(uniform(0, 0) == 0.0);
    CHECK(uniform(~0u, ~0u) < 1.0);
    CHECK(uniform(0x80000000u, 0) == 0.5);
    const int n = 40000;
    double sum = 0, squares = 0;
    for (int i = 0; i < n; ++i) {
        auto r = draw({1, Purpose::synthetic, 0, 0}, uint64_t(i));
        double u = uniform(r[0], r[1]);
        sum += u;
        squares += u * u;
    }
    double mean = sum / n;
    CHECK(std::abs(mean - 0.5) < 5 * std::sqrt(1.0 / 12 / n));
    CHECK(std::abs(squares / n - mean * mean - 1.0 / 12) < 0.003);
}

TEST_CASE("normal: a value depends on its index only, however the range is cut", "[base][random]") {
    const int n = 101;
    std::vector<double> whole(n), pieces(n);
    normal(42, "layers.0.wq", 0, n, whole.data());
    for (int first = 0, size = 1; first < n; first += size, size = size % 7 + 1) {
        size = std::min(size, n - first);
        normal(42, "layers.0.wq", first, size, pieces.data() + first);
    }
    CHECK(whole == pieces);
    std::vector<double> one(1);
    normal(42, "layers.0.wq", 57, 1, one.data());
    CHECK(one[0] == whole[57]);
}

TEST_CASE("normal: names and seeds give other values, with the normal distribution's moments", "[base][random]") {
    const int n = 60001;
    std::vector<double> a(n), b(n), c(n);
    normal(1, "a", 0, n, a.data());
    normal(1, "b", 0, n, b.data());
    normal(2, "a", 0, n, c.data());
    double mean = 0, square = 0, fourth = 0, ab = 0, ac = 0, neighbour = 0;
    for (int i = 0; i < n; ++i) {
        REQUIRE(std::isfinite(a[size_t(i)]));
        mean += a[i] / n;
        square += a[i] * a[i] / n;
        fourth += std::pow(a[i], 4) / n;
        ab += a[i] * b[i] / n;
        ac += a[i] * c[i] / n;
        if (i > 0) neighbour += a[i] * a[i - 1] / n;
    }
    double sigma = 1 / std::sqrt(double(n));
    CHECK(std::abs(mean) < 5 * sigma);
    CHECK(std::abs(square - 1) < 5 * std::sqrt(2.0) * sigma);
    CHECK(std::abs(fourth - 3) < 5 * std::sqrt(96.0) * sigma);
    CHECK(std::abs(ab) < 5 * sigma);
    CHECK(std::abs(ac) < 5 * sigma);
    CHECK(std::abs(neighbour) < 5 * sigma);
}

TEST_CASE("hash_name: FNV-1a's published answers", "[base][random]") {
    CHECK(hash_name("") == 0xcbf29ce484222325ull);
    CHECK(hash_name("a") == 0xaf63dc4c8601ec8cull);
    CHECK(hash_name("foobar") == 0x85944171f73967e8ull);
}
