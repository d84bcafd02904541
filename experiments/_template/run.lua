-- What is asked, in a sentence. Arguments: output_dir=… seed=… steps=…
local options = moe.script_options({ "help", output_dir = "outputs", seed = 1, steps = 20 }, "experiment")
if options.help then
  print("output_dir=outputs   where the run's folder goes\nseed=1               of weights and data\nsteps=20             optimizer steps")
  return
end
local cfg = moe.config("cpu_quick"):with {
  experiment_name = "template", output_dir = options.output_dir, seed = options.seed,
  training = { train_steps = options.steps, log_interval = 5, global_batch_size = 4, micro_batch_size = 4, seq_length = 64 },
}
local run = moe.run { config = cfg }
local m = run:train(run.num_steps)
print(("loss after %d steps: %.3f, MaxVio %.2f, in %s"):format(run.step, m.loss, m.maxvio, run.folder))
