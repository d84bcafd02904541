// Every collective against what one rank computes: all ranks know what every rank put in.
#include "core/base/error.h"
#include "core/dist/group.h"

#include <ATen/ATen.h>

#include <cmath>
#include <numeric>

#include "tests/catch.h"      // last: a LibTorch header defines a CHECK of its own

using namespace moe;
using at::Tensor;
using namespace moe::dist;

namespace {
/// What rank r puts in: the same on every rank that asks. Integers are exact in every type.
Tensor input(int r, int64_t n, at::ScalarType type, bool integers = true) {
    Tensor i = at::arange(n, at::kDouble);
    Tensor x = integers ? (i * 7 + r * 13).remainder(23) - (type == at::kByte ? 0 : 9) : at::sin(i * 0.7 + r * 1.3) * 3;
    return x.to(type);
}
const std::vector<at::ScalarType> kTypes = {at::kDouble, at::kFloat, at::kBFloat16, at::kLong, at::kInt, at::kByte};

/// Uneven counts, with a rank that has nothing.
std::vector<int64_t> uneven(int size, int shift) {
    std::vector<int64_t> counts;
    for (int r = 0; r < size; ++r) counts.push_back((r + shift) % size == 0 ? 0 : 5 + 4 * ((r + shift) % size));
    return counts;
}
int64_t sum(const std::vector<int64_t>& v) { return std::accumulate(v.begin(), v.end(), int64_t(0)); }
int64_t start(const std::vector<int64_t>& v, int r) { return std::accumulate(v.begin(), v.begin() + r, int64_t(0)); }
}  // namespace

TEST_CASE("mpi: ranks are numbered and several", "[dist]") {
    const Group& g = world();
    CHECK(g.size() >= 2);
    CHECK(g.all_reduce(int64_t(1) << g.rank()) == (int64_t(1) << g.size()) - 1);
    CHECK(g.all_reduce(double(g.rank()), ReduceOp::max) == g.size() - 1);
    CHECK(g.all_reduce(double(g.rank()), ReduceOp::min) == 0);
    g.barrier();
}

TEST_CASE("mpi: broadcast gives every rank the root's data", "[dist]") {
    const Group& g = world();
    for (auto type : kTypes)
        for (int root = 0; root < g.size(); ++root)
            for (int64_t n : {0, 1, 17}) {
                Tensor x = input(g.rank(), n, type);
                g.broadcast(x, root);
                CHECK(at::equal(x, input(root, n, type)));
            }
}

TEST_CASE("mpi: all_reduce sums, takes the largest and the smallest in every type", "[dist]") {
    const Group& g = world();
    for (auto type : kTypes)
        for (int64_t n : {0, 1, 33}) {
            Tensor total = input(0, n, type).to(at::kDouble), largest = total.clone(), smallest = total.clone();
            for (int r = 1; r < g.size(); ++r) {
                Tensor x = input(r, n, type).to(at::kDouble);
                total += x;
                largest = at::maximum(largest, x);
                smallest = at::minimum(smallest, x);
            }
            Tensor a = input(g.rank(), n, type), b = a.clone(), c = a.clone();
            g.all_reduce(a);
            g.all_reduce(b, ReduceOp::max);
            g.all_reduce(c, ReduceOp::min);
            CHECK(at::equal(a, total.to(type)));
            CHECK(at::equal(b, largest.to(type)));
            CHECK(at::equal(c, smallest.to(type)));
        }
}

TEST_CASE("mpi: bf16 sums are made in float and rounded to nearest", "[dist]") {
    const Group& g = world();
    Tensor mine = input(g.rank(), 501, at::kBFloat16, false);
    auto first = [](int r) { return r == 0 ? 1.0 : 0x1p-8; };      // on two ranks half way between 1 and the next: ties go to even
    mine[0] = first(g.rank());
    Tensor got = mine.clone(), exact = at::zeros({501}, at::kDouble), size = at::zeros({501}, at::kDouble);
    g.all_reduce(got);
    for (int r = 0; r < g.size(); ++r) {
        Tensor x = input(r, 501, at::kBFloat16, false);
        x[0] = first(r);
        exact += x.to(at::kDouble);
        size += x.to(at::kDouble).abs();
    }
    CHECK(got.isfinite().all().item<bool>());
    // bf16 has 8 significant bits: one rounding by at most 2^-8 a step of the reduction, of partial sums no larger than the
    // sum of the absolute values.
    CHECK(((got.to(at::kDouble) - exact).abs() <= size * (0x1p-8 * 1.01 * (g.size() - 1))).all().item<bool>());
    if (g.size() == 2) CHECK(at::equal(got, exact.to(at::kFloat).to(at::kBFloat16)));
    Tensor bad = at::tensor({1.0, g.rank() == 1 ? std::nan("") : 2.0, g.rank() == 0 ? INFINITY : 1.0}).to(at::kBFloat16);
    g.all_reduce(bad);
    CHECK(std::isfinite(bad[0].item<float>()));
    CHECK(std::isnan(bad[1].item<float>()));
    CHECK(std::isinf(bad[2].item<float>()));
}

TEST_CASE("mpi: all ranks get the same bits of a sum, twice the same", "[dist]") {
    const Group& g = world();
    for (auto type : {at::kDouble, at::kFloat, at::kBFloat16}) {
        Tensor once = input(g.rank(), 4099, type, false), again = once.clone();
        g.all_reduce(once);
        g.all_reduce(again);
        CHECK(at::equal(once, again));
        Tensor others = once.clone();
        g.broadcast(others, 0);
        CHECK(at::equal(once, others));
    }
}

TEST_CASE("mpi: all_gather puts uneven and empty parts in rank order, also in place", "[dist]") {
    const Group& g = world();
    for (auto type : kTypes)
        for (int shift = 0; shift < g.size(); ++shift) {
            auto counts = uneven(g.size(), shift);
            std::vector<Tensor> parts;
            for (int r = 0; r < g.size(); ++r) parts.push_back(input(r, counts[r], type));
            Tensor want = at::cat(parts), out = at::zeros({sum(counts)}, want.options());
            g.all_gather(parts[g.rank()], out, counts);
            CHECK(at::equal(out, want));
            out.zero_();
            Tensor own = out.narrow(0, start(counts, g.rank()), counts[g.rank()]);
            own.copy_(parts[g.rank()]);
            g.all_gather(own, out, counts);
            CHECK(at::equal(out, want));
        }
}

TEST_CASE("mpi: reduce_scatter gives each rank the sum of its part, also in place", "[dist]") {
    const Group& g = world();
    for (auto type : kTypes)
        for (int shift = 0; shift < g.size(); ++shift) {
            auto counts = uneven(g.size(), shift);
            Tensor want = at::zeros({sum(counts)}, at::kDouble);
            for (int r = 0; r < g.size(); ++r) want += input(r, sum(counts), type).to(at::kDouble);
            want = want.narrow(0, start(counts, g.rank()), counts[g.rank()]).to(type);
            Tensor in = input(g.rank(), sum(counts), type), before = in.clone(), out = at::zeros({counts[g.rank()]}, in.options());
            g.reduce_scatter(in, out, counts);
            CHECK(at::equal(out, want));
            CHECK(at::equal(in, before));
            Tensor own = in.narrow(0, start(counts, g.rank()), counts[g.rank()]);
            g.reduce_scatter(in, own, counts);
            CHECK(at::equal(own, want));
        }
}

TEST_CASE("mpi: all_to_all_rows moves rows between all pairs, with empty pairs and empty ranks", "[dist]") {
    const Group& g = world();
    int size = g.size(), me = g.rank();
    // n(from, to) rows; pattern 1 sends nothing off one rank, pattern 2 sends everything to one, pattern 3 nothing at all.
    auto rows_of = [&](int pattern, int from, int to) -> int64_t {
        if (pattern == 1 && from == 0) return 0;
        if (pattern == 2) return to == size - 1 ? 3 + from : 0;
        if (pattern == 3) return 0;
        return (from * 3 + to * 2) % 5;
    };
    for (int pattern = 0; pattern < 4; ++pattern)
        for (std::vector<int64_t> row : {std::vector<int64_t>{}, {3}, {2, 5}}) {
            auto block = [&](int from, int to) {
                auto shape = row;
                shape.insert(shape.begin(), rows_of(pattern, from, to));
                return at::full(shape, 100.0 * from + to, at::kDouble) + at::arange(rows_of(pattern, from, to), at::kDouble).view([&] {
                           std::vector<int64_t> s(shape.size(), 1);
                           s[0] = shape[0];
                           return s;
                       }()) * 0.125;
            };
            std::vector<int64_t> send, recv;
            std::vector<Tensor> out, want;
            for (int r = 0; r < size; ++r) {
                send.push_back(rows_of(pattern, me, r));
                recv.push_back(rows_of(pattern, r, me));
                out.push_back(block(me, r));
                want.push_back(block(r, me));
            }
            for (auto type : {at::kDouble, at::kBFloat16, at::kLong}) {
                Tensor got = g.all_to_all_rows(at::cat(out).to(type), send, recv);
                CHECK(got.sizes() == at::cat(want).sizes());
                CHECK(at::equal(got, at::cat(want).to(type)));
            }
        }
}

TEST_CASE("mpi: split makes groups by colour, ordered by key", "[dist]") {
    const Group& g = world();
    Group backwards = g.split(0, -g.rank());
    CHECK(backwards.size() == g.size());
    CHECK(backwards.rank() == g.size() - 1 - g.rank());
    Tensor x = at::full({3}, double(g.rank()), at::kDouble);
    backwards.broadcast(x, 0);
    CHECK(x[0].item<double>() == g.size() - 1);
    Group alone = g.split(g.rank(), 0);
    CHECK(alone.size() == 1);
    CHECK(alone.all_reduce(5.0) == 5.0);
    Group parity = g.split(g.rank() % 2, g.rank());
    CHECK(parity.all_reduce(int64_t(1)) == (g.size() + (g.rank() % 2 == 0)) / 2);
}

TEST_CASE("mpi: an error carries the rank and leaves the group usable", "[dist]") {
    const Group& g = world();
    try {
        g.all_reduce(at::zeros({2}, at::kHalf));
        FAIL("no error was thrown");
    } catch (const Error& e) {
        CHECK(e.parts().rank == g.rank());
        CHECK(e.kind() == ErrorKind::dtype);
    }
    try {
        g.split(-5, 0);      // MPI refuses a negative colour
        FAIL("no error was thrown");
    } catch (const Error& e) {
        CHECK(e.kind() == ErrorKind::dist);
        CHECK(e.parts().got.find("MPI_Comm_split") == 0);
    }
    CHECK(g.all_reduce(1.0) == g.size());
}
