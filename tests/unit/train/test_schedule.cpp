#include "core/base/error.h"
#include "core/train/schedule.h"
#include "tests/catch.h"
#include "tests/small_config.h"

#include <ATen/ATen.h>
#include <nlohmann/json.hpp>

#include <cmath>

using namespace moe;
using namespace moe::train;

namespace {
TrainingConfig rates(const std::string& style, int64_t warmup = 0) {
    TrainingConfig c;
    c.learning_rate = 1; c.min_learning_rate = 0.1; c.lr_warmup_steps = warmup; c.lr_decay_style = style;
    return c;
}
/// Packed synthetic sequences of 10 tokens, one a micro-batch.
Config batches(int64_t global, int64_t micro = 1) {
    Config c = test::small_config();
    c.training.seq_length = 10;
    c.training.global_batch_size = global;
    c.training.micro_batch_size = micro;
    c.training.train_steps.reset();
    return c;
}
}  // namespace

TEST_CASE("learning rate: warm-up is linear, cosine ends at the minimum, constant stays", "[train]") {
    TrainingConfig c = rates("cosine", 4);
    REQUIRE(learning_rate(c, 0, 101) == Approx(0.25));
    REQUIRE(learning_rate(c, 3, 101) == Approx(1.0));
    REQUIRE(learning_rate(c, 4, 101) == Approx(1.0));
    REQUIRE(learning_rate(c, 28, 101) == Approx(0.1 + 0.9 * 0.5 * (1 + std::sqrt(0.5))));      // a quarter of the way: cos 45°
    REQUIRE(learning_rate(c, 52, 101) == Approx(0.55));           // halfway
    REQUIRE(learning_rate(c, 100, 101) == Approx(0.1));
    REQUIRE(learning_rate(c, 500, 101) == Approx(0.1));           // beyond the end
    c.lr_decay_style = "constant";
    REQUIRE(learning_rate(c, 100, 101) == Approx(1.0));
    c.lr_decay_style = "linear";
    REQUIRE(learning_rate(c, 28, 101) == Approx(0.775));
    REQUIRE(learning_rate(c, 52, 101) == Approx(0.55));
    c.lr_decay_style = "stairs";
    REQUIRE_THROWS_WITH(learning_rate(c, 50, 101), Catch::Contains("stairs"));
}

TEST_CASE("learning rate: lr_decay_ratio is the last share of the run", "[train]") {
    for (std::string style : {"cosine", "linear", "wsd"}) {
        INFO(style);
        TrainingConfig c = rates(style, 10);
        c.lr_decay_ratio = 0.4;                                   // steps 60 … 99
        REQUIRE(learning_rate(c, 9, 100) == Approx(1.0));
        REQUIRE(learning_rate(c, 59, 100) == Approx(1.0));
        REQUIRE(learning_rate(c, 60, 100) == Approx(1.0));
        REQUIRE(learning_rate(c, 61, 100) < 1.0);
        double progress = 13.0 / 39;                              // a third: cos 60° is a half
        REQUIRE(learning_rate(c, 73, 100) == Approx(style == "cosine" ? 0.1 + 0.9 * 0.75 : 1 - 0.9 * progress));
        REQUIRE(learning_rate(c, 99, 100) == Approx(0.1));
        c.lr_decay_ratio = 1.0;                                   // the warm-up comes first
        REQUIRE(learning_rate(c, 10, 100) == Approx(1.0));
        REQUIRE(learning_rate(c, 11, 100) < 1.0);
    }
}

TEST_CASE("learning rate: wsd decays linearly over the last tenth where no ratio is given", "[train]") {
    TrainingConfig c = rates("wsd", 5);
    REQUIRE(learning_rate(c, 0, 200) == Approx(0.2));
    REQUIRE(learning_rate(c, 5, 200) == Approx(1.0));
    REQUIRE(learning_rate(c, 180, 200) == Approx(1.0));
    REQUIRE(learning_rate(c, 199, 200) == Approx(0.1));
    REQUIRE(learning_rate(c, 190, 200) == Approx(1 - 0.9 * 10 / 19));
}

TEST_CASE("learning rate: deepseek_v3 at its recipe's points, 14800 steps of a billion tokens", "[train]") {
    TrainingConfig c = rates("deepseek_v3", 2000);
    c.learning_rate = 2.2e-4; c.min_learning_rate = 2.2e-5;
    auto at = [&](int64_t step) { return learning_rate(c, step, 14800); };
    REQUIRE(at(999) == Approx(1.1e-4));
    REQUIRE(at(2000) == Approx(2.2e-4));
    REQUIRE(at(9999) == Approx(2.2e-4));
    REQUIRE(at(10000) == Approx(2.2e-4));
    REQUIRE(at(10000 + 2150) == Approx(1.21e-4));                 // half of the cosine
    REQUIRE(at(14299) == Approx(2.2e-5).epsilon(1e-5));
    REQUIRE(at(14300) == Approx(2.2e-5));
    REQUIRE(at(14632) == Approx(2.2e-5));
    REQUIRE(at(14634) == Approx(7.3e-6));
    REQUIRE(at(14799) == Approx(7.3e-6));
    REQUIRE(at(20000) == Approx(7.3e-6));
    REQUIRE(learning_rate(c, 9, 10) == Approx(2.2e-4 * 10 / 2000));      // all warm-up
}

TEST_CASE("batch ramp: sequences grow linearly in tokens, in multiples of what the ranks compute at once", "[train]") {
    Config c = batches(32, 2);
    c.training.batch_size_ramp = BatchSizeRamp{8, 1200};
    auto loader = data::open_loader(c, false);
    auto at = [&](int64_t tokens, int64_t ranks = 2) { return sequences_of_step(c.training, tokens, ranks, *loader); };
    REQUIRE(at(0) == 8);
    REQUIRE(at(199) == 8);                                        // 8 + 24·199/1200 = 11.98
    REQUIRE(at(200) == 12);
    REQUIRE(at(600) == 20);
    REQUIRE(at(1199) == 28);
    REQUIRE(at(1200) == 32);
    REQUIRE(at(100000) == 32);
    REQUIRE(at(500, 1) == 18);
    REQUIRE(at(0, 4) == 8);
    REQUIRE_THROWS_WITH(at(0, 8), Catch::Contains("batch_size_ramp.start") && Catch::Contains("2 × 8"));
    c.training.batch_size_ramp->tokens = 0;
    REQUIRE(at(0) == 32);
    c.training.batch_size_ramp.reset();
    REQUIRE(at(0) == 32);
    REQUIRE_THROWS_WITH(at(0, 5), Catch::Contains("global_batch_size"));
}

TEST_CASE("length of the run: tokens of a ramp are counted step by step", "[train]") {
    Config c = batches(4);
    REQUIRE_FALSE(num_steps(c, 100, 1));
    c.training.total_training_tokens = 401;
    REQUIRE(num_steps(c, 100, 1) == 11);
    REQUIRE(num_tokens(c, 11, 1) == 440);
    c.training.batch_size_ramp = BatchSizeRamp{1, 90};
    // 1 sequence at 0, 10 and 20 tokens, 2 at 30 and 50, 3 at 70 tokens: 100 after six steps, then 4 a step.
    REQUIRE(num_steps(c, 100, 1) == 6 + 8);
    REQUIRE(num_tokens(c, 4, 1) == 50);
    REQUIRE(num_tokens(c, 6, 1) == 100);
    REQUIRE(num_tokens(c, 14, 1) == 100 + 8 * 40);
    c.training.total_training_tokens = 50;
    REQUIRE(num_steps(c, 100, 1) == 4);
    c.training.total_training_tokens = 51;
    REQUIRE(num_steps(c, 100, 1) == 5);
    c.training.total_training_tokens.reset();
    c.training.tokens_per_parameter_ratio = 0.5;
    REQUIRE(num_steps(c, 100, 1) == 4);
    c.training.train_steps = 3;
    REQUIRE(num_steps(c, 100, 1) == 3);
}

TEST_CASE("dynamic batches: a step takes the sequences that hold the tokens, without moving the stream", "[train][data]") {
    Config c = batches(4, 2);
    c.training.dynamic_batch_tokens = 61;
    c.training.total_training_tokens = 1000;
    auto packed = data::open_loader(c, false);
    REQUIRE(sequences_of_step(c.training, 0, 1, *packed) == 8);   // 7 hold 70 tokens
    REQUIRE(sequences_of_step(c.training, 0, 3, *packed) == 12);
    REQUIRE(num_steps(c, 1, 1) == 13);                            // 80 tokens each

    c.data.packing = false;
    c.training.seq_length = 1000;
    c.training.micro_batch_size = 1;
    c.training.dynamic_batch_tokens = 3000;
    c.training.total_training_tokens = 10000;
    auto padded = data::open_loader(c, false);
    std::string before = padded->state().dump();
    int64_t several = 0;
    for (int step = 0; step < 5; ++step) {
        int64_t n = sequences_of_step(c.training, 0, 1, *padded);
        REQUIRE(padded->state().dump() == before);
        data::Batch b = padded->next(n, 0, n);
        auto held = [&](int64_t rows) { return b.domain.narrow(0, 0, rows).ge(0).sum().item<int64_t>(); };
        REQUIRE(held(n) >= 3000);
        REQUIRE(held(n - 1) < 3000);                              // no more than needed
        several += n > 3;
        before = padded->state().dump();
    }
    REQUIRE(several > 0);                                         // there was padding
    REQUIRE(num_steps(c, 1, 1) == 4);
    REQUIRE_THROWS_AS(padded->sequences_for_tokens(-1, 1), Error);
}
