// An intervention's function, compiled: the one that its kind says.
#pragma once
#include "core/train/script.h"

namespace moe::train {

struct CompiledScript {
    routing::ScoreFunction score;
    routing::PreTopK pre_topk;
    routing::PostTopK post_topk;
    BiasRule bias_rule;
    Schedule schedule;
    BatchSource data;
    OptimizerRule optimizer;
};

}  // namespace moe::train
