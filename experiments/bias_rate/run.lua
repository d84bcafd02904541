-- How fast should the balancing bias move? Balance against loss for four speeds. Arguments: help=true
local options = moe.script_options({ "jobs", "rule", "help", output_dir = "outputs", seeds = 3, steps = 300 }, "bias_rate")
if options.help then
  print("output_dir=outputs   where the sweep's folder goes\nseeds=3              repetitions\nsteps=300            optimizer steps of each run\nrule=sign            bias_update_rule: sign, magnitude or centred\njobs=0               runs at once, as processes; 0: one after the other here")
  return
end
local here, steps = arg[0]:match("^(.*)/[^/]*$") or ".", options.steps

local sweep = moe.sweep {
  name = "bias_rate", about = "How fast should the balancing bias move?", metric = "validation_loss",
  base = moe.config(here .. "/../ablation.json"):with {
    output_dir = options.output_dir, training = { train_steps = steps, lr_warmup_steps = steps // 10 }, model = { moe = { bias_update_rule = options.rule or "sign" } } },
  seeds = options.seeds, grid = { ["model.moe.bias_update_speed"] = { 0, 1e-4, 1e-3, 1e-2 } },
}
sweep:run { jobs = options.jobs }
print(sweep:agg { "validation_loss", "maxvio" })
sweep:report { plots = { { x = "model.moe.bias_update_speed", y = "validation_loss", categories = true }, { x = "model.moe.bias_update_speed", y = "maxvio", categories = true } } }
print("\nreport: " .. sweep.folder .. "/report.md")
return sweep
