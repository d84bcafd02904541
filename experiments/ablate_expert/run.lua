-- What is lost with the expert that is most at home in one domain: that domain, or all of them alike? Arguments: help=true
local options = moe.script_options({ "jobs", "help", output_dir = "outputs", seeds = 3, steps = 300 }, "ablate_expert")
if options.help then
  print("output_dir=outputs   where the sweep's folder goes\nseeds=3              repetitions\nsteps=300            optimizer steps of each run\njobs=0               runs at once, as processes; 0: one after the other here")
  return
end
local here, steps = arg[0]:match("^(.*)/[^/]*$") or ".", options.steps

-- How much the loss rises without an expert: in one domain, and on average in the others.
local function damage(run, before, expert)
  local _ <close> = run.model.router:ablate { layer = expert.layer, expert = expert.expert }
  local own, others, count = 0, 0.0, 0
  for i, d in ipairs(run:evaluate().by_domain) do
    local rise = d.loss - before[i].loss
    if d.name == expert.domain then own = rise else others, count = others + rise, count + 1 end
  end
  return own, others / count
end

local function point(p, run_options)
  local run <close> = moe.run(run_options)
  for step in run:steps() do p.progress(step / run.num_steps, ("step %d/%d"):format(step, run.num_steps)) end
  if run.stopping then moe.fail { kind = "interrupted", op = "interrupted" } end
  -- specialization() lists experts by how many times their even share of one domain they take; the last is at home in all. Those of few tokens are not in it.
  local list = run:trace { batches = 10 }:specialization()
  local e = run:evaluate()
  local most, least = list[1], list[#list]
  local result = { validation_loss = e.loss, lift = most.lift, least_lift = least.lift, share = most.share }
  result.own, result.others = damage(run, e.by_domain, most)
  result.least_own, result.least_others = damage(run, e.by_domain, least)
  return result
end

local sweep = moe.sweep {
  name = "ablate_expert", about = "What is lost with the expert that is most at home in one domain: that domain, or all of them alike?", metric = "own", fn = point, seeds = options.seeds,
  base = moe.config(here .. "/../ablation.json"):with { output_dir = options.output_dir, training = { train_steps = steps, lr_warmup_steps = steps // 10 } },
}
sweep:run { jobs = options.jobs }
local a = sweep:agg { "own", "others", "least_own", "least_others", "lift", "least_lift" }[1]
print(moe.table({
  { "most specialised", a.lift, a.own, a.own_ci, a.others, a.others_ci },
  { "least specialised", a.least_lift, a.least_own, a.least_own_ci, a.least_others, a.least_others_ci },
}, { titles = { "expert left out", "lift", "rise in its domain", "±", "in the others", "±" }, title = "Loss in nats a token; ± is half the 95 % confidence interval over seeds" }))
sweep:report { metrics = { "own", "others", "least_own", "least_others", "lift" } }
local picture = viz.bars({ { name = "its own domain", y = { a.own, a.least_own }, error = { a.own_ci or 0, a.least_own_ci or 0 } }, { name = "the other domains", y = { a.others, a.least_others }, error = { a.others_ci or 0, a.least_others_ci or 0 } } },
  { categories = { "most specialised expert", "least specialised expert" }, y_label = "rise of the loss without it, nats a token" })
picture:save(sweep.folder .. "/damage.svg")
print("\nreport: " .. sweep.folder .. "/report.md, picture: " .. sweep.folder .. "/damage.svg")
return sweep
