-- A router score of one's own: cosine-like, the logits of a token divided by their length, then a sigmoid.
local here, options = arg[0]:match("^(.*)/[^/]*$") or ".", moe.script_options({ output_dir = "outputs", steps = 100 }, "router_score")
local run <close> = moe.run { config = moe.config(here .. "/../ablation.json"):with { output_dir = options.output_dir, training = { train_steps = options.steps, lr_warmup_steps = 0 } }, name = "router_score", console = false }
run.model.router.score = function(logits, m)
  local length = ((logits * logits):sum(-1, { keepdim = true }) + 1e-6):sqrt()
  return (4.0 * logits / length):sigmoid()
end
local m = run:train()
print(("router_score: loss %.3f after %d steps, MaxVio %.2f"):format(m.loss, m.step, m.maxvio))
