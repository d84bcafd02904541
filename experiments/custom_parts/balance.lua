-- A balance strategy of one's own: the bias moves by the square root of the missing share, quick when far off and calm when near.
local here, options = arg[0]:match("^(.*)/[^/]*$") or ".", moe.script_options({ output_dir = "outputs", steps = 100 }, "balance")
local run <close> = moe.run { config = moe.config(here .. "/../ablation.json"):with { output_dir = options.output_dir, training = { train_steps = options.steps, lr_warmup_steps = 0 } }, name = "balance", console = false }
run.model.router.balance = function(counts, bias, m)
  local load = counts:to("fp64")
  local missing = 1.0 - load / load:mean()
  local sign = missing:gt(0):to("fp64") * 2.0 - 1.0
  return bias + 0.01 * sign * missing:abs():sqrt()
end
local m = run:train()
print(("balance: loss %.3f after %d steps, MaxVio %.2f"):format(m.loss, m.step, m.maxvio))
