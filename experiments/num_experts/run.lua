-- More experts of which as many are active: what do parameters buy at equal work a token? Arguments: help=true
local options = moe.script_options({ "jobs", "help", output_dir = "outputs", seeds = 3, steps = 300 }, "num_experts")
if options.help then
  print("output_dir=outputs   where the sweep's folder goes\nseeds=3              repetitions\nsteps=300            optimizer steps of each run\njobs=0               runs at once, as processes; 0: one after the other here")
  return
end
local here, steps = arg[0]:match("^(.*)/[^/]*$") or ".", options.steps

-- Two experts are active however many there are; only the router's rows grow with their number: 96 weights an expert and layer.
local sweep = moe.sweep {
  name = "num_experts", about = "More experts of which as many are active: what do parameters buy at equal work a token?", metric = "validation_loss",
  base = moe.config(here .. "/../ablation.json"):with { output_dir = options.output_dir, training = { train_steps = steps, lr_warmup_steps = steps // 10 } },
  seeds = options.seeds, grid = { ["model.moe.num_experts"] = { 2, 4, 8, 16, 32 } },
}
sweep:run { jobs = options.jobs }
local sizes = {}
for _, p in ipairs(sweep:points()) do sizes[p.values["model.moe.num_experts"]] = p.config:params() end
local t = sweep:agg { "validation_loss", "maxvio" }
t = t:with("parameters", function(row) return sizes[row["model.moe.num_experts"]].total end)
t = t:with("flops_per_token", function(row) return sizes[row["model.moe.num_experts"]].flops_per_token // 1 end)
print(t)
sweep:report { plots = { { x = "model.moe.num_experts", y = "validation_loss", log_x = true }, { x = "model.moe.num_experts", y = "maxvio", log_x = true } } }
print("\nreport: " .. sweep.folder .. "/report.md")
return sweep
