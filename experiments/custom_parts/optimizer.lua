-- An optimizer step of one's own: Lion, the sign of a moving mean. Source: Chen et al., 2302.06675, algorithm 2.
local here, options = arg[0]:match("^(.*)/[^/]*$") or ".", moe.script_options({ output_dir = "outputs", steps = 100 }, "optimizer")
local run <close> = moe.run { config = moe.config(here .. "/../ablation.json"):with { output_dir = options.output_dir, training = { train_steps = options.steps, lr_warmup_steps = 0 } }, name = "optimizer", console = false }
run.optimizer = function(name, value, grad, state, m)
  local mean = state[1]                              -- kept and saved by the run; AdamW's first moment otherwise
  local update = 0.9 * mean + 0.1 * grad
  local sign = update:gt(0):to(update.dtype) - update:lt(0):to(update.dtype)
  mean:copy_(0.99 * mean + 0.01 * grad)
  return value - 0.1 * m.lr * (sign + 0.1 * value)
end
local m = run:train()
print(("optimizer: loss %.3f after %d steps"):format(m.loss, m.step))
