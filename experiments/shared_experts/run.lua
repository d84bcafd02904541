-- Is an expert that every token passes worth the one that it could have chosen? Arguments: help=true
local options = moe.script_options({ "jobs", "help", output_dir = "outputs", seeds = 3, steps = 300 }, "shared_experts")
if options.help then
  print("output_dir=outputs   where the sweep's folder goes\nseeds=3              repetitions\nsteps=300            optimizer steps of each run\njobs=0               runs at once, as processes; 0: one after the other here")
  return
end
local here, steps = arg[0]:match("^(.*)/[^/]*$") or ".", options.steps

-- Four experts of one width work on each token in all of them, and all have 18 experts' weights.
local KINDS = {
  ["4 of 18, none shared"] = { num_experts = 18, num_experts_per_token = 4, num_shared_experts = 0 },
  ["3 of 17, 1 shared"] = { num_experts = 17, num_experts_per_token = 3, num_shared_experts = 1 },
  ["2 of 16, 2 shared"] = { num_experts = 16, num_experts_per_token = 2, num_shared_experts = 2 },
}
local base = moe.config(here .. "/../ablation.json"):with { output_dir = options.output_dir, training = { train_steps = steps, lr_warmup_steps = steps // 10 } }

local sweep = moe.sweep {
  name = "shared_experts", about = "Is an expert that every token passes worth the one that it could have chosen?", metric = "validation_loss", output_dir = options.output_dir,
  base = function(values) return base:with { model = { moe = KINDS[values.experts] } } end,
  seeds = options.seeds, grid = { experts = { "4 of 18, none shared", "3 of 17, 1 shared", "2 of 16, 2 shared" } },
}
sweep:run { jobs = options.jobs }
print(sweep:agg { "validation_loss", "maxvio" })
sweep:report { plots = { { x = "experts", y = "validation_loss" }, { x = "experts", y = "maxvio" } } }
print("\nreport: " .. sweep.folder .. "/report.md")
return sweep
