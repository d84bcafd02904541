#include "core/base/error.h"
#include "core/plan/memory.h"
#include "core/train/hardware.h"
#include "core/train/recompute.h"
#include "core/train/run.h"
#include "tests/catch.h"
#include "tests/small_config.h"

#include <algorithm>
#include <cmath>
#include <memory>

using namespace moe;
using namespace moe::train;

namespace {
/// One of several ranks that exchange nothing: enough to build a stage of a model. Only the smallest of a number comes from another rank.
struct SilentRank : dist::Backend {
    int rank_, size_;
    double smallest = INFINITY;
    SilentRank(int rank, int size) : rank_(rank), size_(size) {}
    int rank() const override { return rank_; }
    int size() const override { return size_; }
    std::unique_ptr<dist::Backend> split(int, int) override { return std::make_unique<SilentRank>(0, 1); }
    std::unique_ptr<dist::Backend> duplicate() override { return std::make_unique<SilentRank>(rank_, size_); }
    bool has_failed() const override { return false; }
    void recover() override {}
    void barrier() override {}
    void broadcast(void*, int64_t, dist::DType, int) override {}
    void all_reduce(void* data, int64_t count, dist::DType type, dist::ReduceOp op) override {
        if (op == dist::ReduceOp::min && type == dist::DType::f64 && count == 1) *static_cast<double*>(data) = std::min(smallest, *static_cast<double*>(data));
    }
    void all_gather(const void*, void*, const int64_t*, dist::DType) override {}
    void reduce_scatter(const void*, void*, const int64_t*, dist::DType, dist::ReduceOp) override {}
    void all_to_all(const void*, const int64_t*, void*, const int64_t*, dist::DType) override {}
    void send(const void*, int64_t, dist::DType, int) override {}
    void receive(void*, int64_t, dist::DType, int) override {}
    bool has_message(int) override { return false; }
    void flush() override {}
    bool is_flushed() override { return true; }
};
}  // namespace

TEST_CASE("recompute: what is named to be computed again must be a segment of some stage, or a kind of them", "[train]") {
    Config c = test::small_config();                                                  // layer 0 dense, 1 and 2 with experts, 3 the MTP module's
    c.training.use_mtp = true;
    c.training.num_predict_tokens = 2;
    std::vector<std::string> all = segment_names(c), of_stages;
    for (int num_stages : {1, 2}) {
        of_stages.clear();
        for (int stage = 0; stage < num_stages; ++stage) {
            INFO("stage " << stage << " of " << num_stages);
            c.distributed.pipeline_parallel_size = num_stages;
            dist::Mesh mesh = dist::make_mesh(c.distributed, num_stages == 1 ? dist::Group() : dist::Group(std::make_shared<SilentRank>(stage, num_stages)));
            Model model(c, mesh, {Precision::named("fp64"), at::kCPU, true});
            for (auto& s : model.segments()) of_stages.push_back(s.name);
            // A name is taken on every stage and means something on the one that has it.
            std::vector<std::string> names = {"layers.0.attention", "layers.3.experts", "mtp.1.join", "route", "feed_forward"};
            auto spans = recompute_spans(model, "selective", names);
            for (size_t s = 0; s < spans.size(); ++s) {
                std::string name = model.segments()[s].name, kind = name.substr(name.rfind('.') + 1);
                CHECK((spans[s] >= 0) == (name == names[0] || name == names[1] || name == names[2] || kind == "route" || kind == "feed_forward"));
            }
            struct Case { const char *name, *nearest; };
            for (auto& k : {Case{"expert", "experts"}, Case{"layers.1.expert", "layers.1.experts"}, Case{"layers.4.combine", "layers.1.combine"}, Case{"layers.0.experts", "layers.1.experts"},
                            Case{"layers.01.route", "layers.1.route"}, Case{"layer.2.dispatch", "layers.2.dispatch"}, Case{"mtp.2.head", "mtp.1.head"}, Case{"layers.1.", ""}, Case{"", ""}}) {
                INFO(k.name);
                using Catch::Contains;
                REQUIRE_THROWS_WITH(recompute_spans(model, "selective", {"attention", k.name}), Contains("training.recompute") && Contains("got \"" + std::string(k.name) + '"') && Contains("attention, combine, ") &&
                                                                                               Contains("0 to 3") && Contains(*k.nearest ? "did you mean \"" + std::string(k.nearest) + "\"?" : ""));
            }
        }
        CHECK(of_stages == all);
    }
    c = test::small_config();
    c.model.moe.num_shared_experts = 0;
    dist::Mesh mesh;
    Model model(c, mesh, {Precision::named("fp64"), at::kCPU, true});
    std::vector<std::string> names;
    for (auto& s : model.segments()) names.push_back(s.name);
    CHECK(names == segment_names(c));
    REQUIRE_THROWS_WITH(recompute_spans(model, "selective", {"shared_experts"}), Catch::Contains("did you mean \"experts\"?"));
}

namespace {
/// What a run may use of a memory that is given.
constexpr double kUsable = 0.92;

double planned(Config c, const std::vector<std::string>& recompute, int64_t ranks = 1) {
    c.training.gradient_checkpointing = "selective";
    c.training.recompute = recompute;
    return plan::memory(c, ranks).total();
}
/// A memory of which the usable part lies in the middle between keeping everything and keeping the least.
double half_enough(const Config& c, int64_t ranks = 1) { return (planned(c, {}, ranks) + planned(c, plan::choose_recompute(c, ranks, 0), ranks)) / 2 / kUsable; }
}  // namespace

TEST_CASE("recompute: selective without names chooses as few segments as memory asks for, and names are taken as they are", "[train]") {
    Config c = test::small_config();
    dist::Group alone;
    CHECK(recomputed_segments(c, alone, 0).empty());                                  // none
    c.training.gradient_checkpointing = "full";
    CHECK(recomputed_segments(c, alone, 0).empty());
    c.training.gradient_checkpointing = "selective";
    double enough = planned(c, {}) / kUsable;
    CHECK(recomputed_segments(c, alone, enough * 1.0001).empty());
    CHECK(!recomputed_segments(c, alone, enough * 0.9999).empty());
    auto all = recomputed_segments(c, alone, 0), some = recomputed_segments(c, alone, half_enough(c));
    CHECK(all.size() == 3 + 1 + 2 * 2);                                               // attention, dense, experts and shared experts
    REQUIRE(!some.empty());
    REQUIRE(some.size() < all.size());
    CHECK(std::equal(some.begin(), some.end(), all.begin()));
    CHECK(planned(c, some) <= kUsable * half_enough(c));
    CHECK(planned(c, {some.begin(), some.end() - 1}) > kUsable * half_enough(c));
    c.training.recompute = {"attention"};
    CHECK(recomputed_segments(c, alone, 0) == c.training.recompute);
    CHECK(recomputed_segments(c, alone, 2 * enough) == c.training.recompute);
}

TEST_CASE("recompute: the rank with the least memory decides for all", "[train]") {
    Config c = test::small_config();
    c.training.gradient_checkpointing = "selective";
    double much = 2 * planned(c, {}, 2), little = half_enough(c, 2);
    auto rank = std::make_shared<SilentRank>(1, 2);
    dist::Group world(rank);
    auto want = recomputed_segments(c, world, little);
    CHECK(!want.empty());
    CHECK(recomputed_segments(c, world, much).empty());
    rank->smallest = little;
    CHECK(recomputed_segments(c, world, much) == want);
}

TEST_CASE("recompute: a run that chooses what it computes again, or everything, loses what one that keeps all does", "[train]") {
    Config c = test::small_config();
    auto losses = [&](double memory_bytes) {
        RunOptions quiet;
        quiet.log_folder = quiet.console = false;
        quiet.memory_bytes = memory_bytes;
        Run run(c, quiet);
        return std::vector<double>{run.step().loss, run.step().loss, run.step().loss};
    };
    auto kept = losses(0);
    c.training.gradient_checkpointing = "selective";
    for (double memory_bytes : {0.0, 1.0, half_enough(c)}) {                             // the device's own; nothing; some segments
        INFO(memory_bytes);
        auto got = losses(memory_bytes);
        for (size_t i = 0; i < kept.size(); ++i) CHECK(got[i] == Approx(kept[i]).epsilon(1e-12));
    }
    CHECK(obtainable_memory_bytes(at::kCPU) > 1e6);
}
