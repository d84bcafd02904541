// Balance without an auxiliary loss: a selection bias an expert, moved once per optimizer step by that step's global counts.
// Source: Wang et al., "Auxiliary-loss-free load balancing", 2408.15664; DeepSeek-V3 technical report 2.1.2.
#pragma once
#include "core/config/config.h"

#include <ATen/core/Tensor.h>

namespace moe::routing {

/// bias [E] fp32 or fp64 (host or device), counts int64 [E] (host): bias += u · sign(c̄ − c) (rule "sign"), u · (c̄ − c) / c̄ ("magnitude"),
/// or the sign rule less its mean over the experts ("centred"). Nothing happens where no token was counted. Pure apart from bias.
void update_bias(at::Tensor bias_E, const at::Tensor& counts_E, double speed, const std::string& rule);

}  // namespace moe::routing
