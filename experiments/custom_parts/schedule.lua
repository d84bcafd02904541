-- A learning-rate schedule of one's own: triangles, each half as high as the one before.
local here, options = arg[0]:match("^(.*)/[^/]*$") or ".", moe.script_options({ output_dir = "outputs", steps = 100 }, "schedule")
local run <close> = moe.run { config = moe.config(here .. "/../ablation.json"):with { output_dir = options.output_dir, training = { train_steps = options.steps, lr_warmup_steps = 0 } }, name = "schedule", console = false }
local period, peak = math.max(2, run.num_steps // 4), 8e-3
run.schedule = function(step)
  local cycle, at = (step - 1) // period, ((step - 1) % period) / period
  return peak * 0.5 ^ cycle * (1 - math.abs(2 * at - 1)) + 1e-5
end
run:every(math.max(1, run.num_steps // 8), function(m) print(("step %d lr %.2e loss %.3f"):format(m.step, m.lr, m.loss)) end)
local m = run:train()
print(("schedule: loss %.3f after %d steps"):format(m.loss, m.step))
