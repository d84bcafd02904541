#include "core/routing/balance.h"

#include "core/base/error.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

namespace moe::routing {

void update_bias(at::Tensor bias_E, const at::Tensor& counts_E, double speed, const std::string& rule) {
    at::NoGradGuard no_grad;
    at::Tensor counts = counts_E.to(at::kCPU, at::kDouble);
    double mean = counts.mean().item<double>();
    if (mean == 0) return;
    at::Tensor step;
    if (rule == "sign") step = (mean - counts).sign();
    else if (rule == "magnitude") step = (mean - counts) / mean;
    else if (rule == "centred") {
        step = (mean - counts).sign();
        step = step - step.mean();
    } else MOE_THROW(config, "model.moe.bias_update_rule", rule, "sign, magnitude or centred", "");
    step = (step * speed).to(bias_E.scalar_type());
    bias_E.add_(bias_E.is_cuda() ? step.pin_memory().to(bias_E.device(), /*non_blocking=*/true) : step);      // nothing waits for what the device is doing
}

}  // namespace moe::routing
