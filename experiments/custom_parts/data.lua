-- A data source of one's own: sequences that repeat their first half, so that the loss says how well a model copies.
local here, options = arg[0]:match("^(.*)/[^/]*$") or ".", moe.script_options({ output_dir = "outputs", steps = 100 }, "data")
local run <close> = moe.run {
  config = moe.config(here .. "/../ablation.json"):with { output_dir = options.output_dir, training = { train_steps = options.steps, lr_warmup_steps = 0 } }, name = "data", console = false,
  data = function(m)
    local half = moe.randint(0, 512, { m.sequences, m.seq_length // 2 })
    return moe.cat({ half, half }, 1)
  end,
}
local m = run:train()
print(("data: loss %.3f after %d steps; guessing the first half and copying the second would be %.3f"):format(m.loss, m.step, math.log(512) / 2))
