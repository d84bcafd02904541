#include "core/train/profile.h"
#include "core/base/error.h"
#include "tests/catch.h"
#include "tests/gpu.h"

#include <ATen/ATen.h>
#include <ATen/record_function.h>

#include <chrono>
#include <thread>

using namespace moe;
using train::ProfileRow;

namespace {
const ProfileRow* find(const std::vector<ProfileRow>& rows, const std::string& name) {
    for (auto& row : rows)
        if (row.name == name) return &row;
    return nullptr;
}
void wait_ms(int ms) { std::this_thread::sleep_for(std::chrono::milliseconds(ms)); }
}  // namespace

TEST_CASE("a profile counts operators, and what an operator calls is not counted twice") {
    at::Tensor a = at::ones({64, 64}), b = at::ones({64, 64});
    auto p = train::profile([&] {
        for (int i = 0; i < 3; ++i) at::matmul(a, b);
    });
    REQUIRE(find(p.kernels, "aten::mm"));
    CHECK(find(p.kernels, "aten::mm")->count == 3);
    REQUIRE(find(p.kernels, "aten::matmul"));              // the caller of mm
    double sum = 0;
    for (auto& row : p.kernels) {
        CHECK(row.secs >= 0);
        sum += row.secs;
    }
    CHECK(sum <= p.wall_secs);
    for (size_t i = 1; i < p.kernels.size(); ++i) CHECK(p.kernels[i].secs <= p.kernels[i - 1].secs);
}

TEST_CASE("phases of a profile last from their start to their end") {
    auto p = train::profile([] {
        for (int i = 0; i < 2; ++i) {
            RECORD_USER_SCOPE("first");
            wait_ms(3);
        }
        RECORD_USER_SCOPE("second");
        wait_ms(1);
    });
    REQUIRE(p.phases.size() == 2);
    CHECK(p.phases[0].name == "first");
    CHECK(p.phases[0].count == 2);
    CHECK(p.phases[0].secs >= 0.006);
    CHECK(p.phases[1].secs >= 0.001);
    CHECK(p.wall_secs >= p.phases[0].secs + p.phases[1].secs);
}

TEST_CASE("what profiled work throws passes through, and the next profile works") {
    CHECK_THROWS_AS(train::profile([] { MOE_THROW(usage, "work", "a", "b", ""); }), Error);
    CHECK(train::profile([] { at::ones({3}).add_(1); }).kernels.size() > 0);
}

TEST_CASE("a profile on a GPU has its kernels, by phase", "[gpu]") {
    if (!test::has_gpu()) return;
    at::Tensor a = at::ones({512, 512}, at::kCUDA);
    auto p = train::profile([&] {
        RECORD_USER_SCOPE("products");
        for (int i = 0; i < 4; ++i) at::mm(a, a);
    });
    CHECK(p.busy_secs > 0);
    CHECK(p.busy_secs <= p.wall_secs);
    REQUIRE(find(p.phases, "products"));
    CHECK(find(p.phases, "products")->count >= 4);
}
