-- Balance by an auxiliary loss or by a bias: which keeps the experts even, and what does it cost? Arguments: help=true
local options = moe.script_options({ "jobs", "help", output_dir = "outputs", seeds = 3, steps = 300 }, "aux_or_bias")
if options.help then
  print("output_dir=outputs   where the sweep's folder goes\nseeds=3              repetitions\nsteps=300            optimizer steps of each run\njobs=0               runs at once, as processes; 0: one after the other here")
  return
end
local here, steps = arg[0]:match("^(.*)/[^/]*$") or ".", options.steps

local METHODS = {
  ["none"] = { use_aux_loss_free = false },
  ["Switch loss 1e-3"] = { use_aux_loss_free = false, router_aux_loss_weight = 1e-3 },
  ["Switch loss 1e-2"] = { use_aux_loss_free = false, router_aux_loss_weight = 1e-2 },
  ["sequence loss 1e-3"] = { use_aux_loss_free = false, sequence_aux_loss_weight = 1e-3 },
  ["bias"] = { use_aux_loss_free = true, bias_update_rule = "magnitude", bias_update_speed = 0.02 },
  ["bias and sequence loss 1e-4"] = { use_aux_loss_free = true, bias_update_rule = "magnitude", bias_update_speed = 0.02, sequence_aux_loss_weight = 1e-4 },
}
local ORDER = { "none", "Switch loss 1e-3", "Switch loss 1e-2", "sequence loss 1e-3", "bias", "bias and sequence loss 1e-4" }
local base = moe.config(here .. "/../ablation.json"):with { output_dir = options.output_dir, training = { train_steps = steps, lr_warmup_steps = steps // 10 } }

local sweep = moe.sweep {
  name = "aux_or_bias", about = "Balance by an auxiliary loss or by a bias: which keeps the experts even, and what does it cost?", metric = "validation_loss", output_dir = options.output_dir,
  base = function(values) return base:with { model = { moe = METHODS[values.balance] } } end,
  seeds = options.seeds, grid = { balance = ORDER },
}
sweep:run { jobs = options.jobs }
print(sweep:agg { "validation_loss", "maxvio" })
sweep:report { plots = { { x = "balance", y = "validation_loss" }, { x = "balance", y = "maxvio" } } }
print("\nreport: " .. sweep.folder .. "/report.md")
return sweep
