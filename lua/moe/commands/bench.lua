-- moelab bench NAME [steps=12] [warmup=3] [--json]: the speed of one named job.
local function median(values)
  table.sort(values)
  local n = #values
  return n % 2 == 1 and values[(n + 1) // 2] or (values[n // 2] + values[n // 2 + 1]) / 2
end

-- Whole optimizer steps on random tokens, routed by the model itself: loading, forward, backward, clipping, AdamW.
local function train(name, b, steps, warmup)
  local cfg = moe.config(b.config):with {
    training = { global_batch_size = b.batch, micro_batch_size = b.batch, seq_length = b.seq, train_steps = steps + warmup, log_interval = 1000000 },
    data = { dataset_type = "synthetic", sources = {}, path = moe.null },
  }
  local run <close> = moe.run { config = cfg, name = name, log = false, console = false }
  run:train(warmup)
  local secs = {}
  for _, m in run:steps(steps) do secs[#secs + 1] = m.step_secs end
  local model = cfg.model
  return {
    name = name, value = b.batch * b.seq / median(secs), unit = "tokens/s",
    shape = ("%d layers, d %d, %d experts top-%d of %d, vocabulary %d, batch %d x %d"):format(model.num_layers, model.mla.d_model, model.moe.num_experts, model.moe.num_experts_per_token,
      model.moe.expert_intermediate_size, model.vocab_size or run.config.model.vocab_size, b.batch, b.seq),
    dtype = run.config.training.use_bf16 and "bf16" or "fp32", device = run.model.device, commit = moe.commit,
    steps = steps, median_step_secs = median(secs),
  }
end

return function(words, options, given)
  local names, by_name = {}, {}
  for i, b in ipairs(moe.benchmarks) do names[i], by_name[b.name] = b.name, b end
  if not words[1] then moe.fail { op = "bench", got = "no name", want = table.concat(names, " or ") } end
  moe.check_keys({ [words[1]] = true }, names, "bench: name")
  moe.check_keys(options, { "steps", "warmup" }, "bench: options")
  local result = train(words[1], by_name[words[1]], options.steps or 12, options.warmup or 3)
  if given.json then
    print(moe.json.encode(result))
  else
    print(("%s: %.0f %s (%s, %s on %s, commit %s)"):format(result.name, result.value, result.unit, result.shape, result.dtype, result.device, result.commit))
  end
end
