// What tests of saved runs share: a small run that is saved often, and what an error mentions.
#pragma once
#include "core/train/run.h"
#include "tests/error_of.h"
#include "tests/folder.h"
#include "tests/small_config.h"

#include <string>

namespace moe::test {

inline train::RunOptions silent(const std::string& resume = "") {
    train::RunOptions o;
    o.console = false;
    o.resume = resume;
    return o;
}

/// Two micro-batches a step, packed documents, workers, biases that move, MTP, dropouts, noise, capacity; in its own output folder.
inline Config saved_often(const Folder& folder) {
    Config c = small_config();
    c.output_dir = folder.path();
    c.experiment_name = "often";
    c.deterministic = true;
    c.training.global_batch_size = 4;
    c.training.micro_batch_size = 2;
    c.model.moe.bias_update_speed = 0.01;
    c.training.use_mtp = true;
    c.model.mla.attn_dropout = 0.1;
    c.model.moe.dropout = 0.1;
    c.model.moe.router_noise_std = 0.2;
    c.model.moe.capacity_factor = 1.2;
    c.data.packing = true;
    c.data.preprocessing.num_workers = 2;
    c.training.save_interval = 10;
    return c;
}

inline bool mentions(const Error& e, const std::string& text) { return std::string(e.what()).find(text) != std::string::npos; }

}  // namespace moe::test
