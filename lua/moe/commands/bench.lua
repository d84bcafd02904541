-- moelab bench NAME [steps=12] [warmup=3] [batch=] [seq=] [dtype=bf16|fp8|fp32] [grads=fp32|bf16] [--json] [--profile]: the speed of one named job; lua [rounds=15] [calls=20000] [steps=4]: the cost of bindings and of training in the background.
local function median(values)
  table.sort(values)
  local n = #values
  return n % 2 == 1 and values[(n + 1) // 2] or (values[n // 2] + values[n // 2 + 1]) / 2
end

local MOST_ROWS = 40

local function print_profile(p, steps)
  local function rows(list, whole)
    local out = {}
    for i, r in ipairs(list) do
      if i <= MOST_ROWS then out[i] = { share = 100 * r.secs / whole, ms = 1e3 * r.secs / steps, calls = r.count / steps, name = #r.name > 120 and r.name:sub(1, 117) .. "..." or r.name } end
    end
    return out
  end
  local function sum(list)
    local secs = 0
    for _, r in ipairs(list) do secs = secs + r.secs end
    return secs
  end
  local columns, formats = { "share", "ms", "calls", "name" }, { share = "%.1f", ms = "%.3f", calls = "%.4g" }
  print(("a step: %.2f ms; GPU busy %.2f ms"):format(1e3 * p.wall_secs / steps, 1e3 * p.busy_secs / steps))
  print(moe.table(rows(p.phases, sum(p.phases)), { title = "by phase", columns = columns, titles = { share = "%", ms = "ms" }, formats = formats }))
  if #p.calls > 0 then print(moe.table(rows(p.calls, sum(p.calls)), { title = "calls of the CUDA runtime, the host's time", columns = columns, titles = { share = "%", ms = "ms" }, formats = formats })) end
  print(moe.table(rows(p.kernels, sum(p.kernels)), { title = p.busy_secs > 0 and "by kernel" or "by operator", columns = columns, titles = { share = "%", ms = "ms" }, formats = formats }))
end

-- Whole optimizer steps on random tokens, routed by the model itself: loading, forward, backward, clipping, AdamW.
local function train(name, b, options, profiled)
  local steps, warmup, batch, seq = options.steps or 12, options.warmup or 3, options.batch or b.batch, options.seq or b.seq
  local dtype = { training = { grads_dtype = options.grads } }
  if options.dtype then dtype.training.use_bf16, dtype.training.use_fp8 = options.dtype == "bf16", options.dtype == "fp8" end
  local cfg = moe.config(b.config):with(b.set or {}):with(dtype):with {
    training = { global_batch_size = batch, micro_batch_size = batch, seq_length = seq, train_steps = 2 * steps + warmup, lr_warmup_steps = 0, log_interval = 1000000 },
    data = { dataset_type = "synthetic", sources = {}, path = moe.null, document_mask = false },
  }
  local run <close> = moe.run { config = cfg, name = name, log = false, console = false }
  run:train(warmup)
  local secs, last = {}, nil
  for _, m in run:steps(steps) do secs[#secs + 1], last = m.step_secs, m end
  if profiled then print_profile(moe.profile(function() run:train(steps) end), steps) end
  local model, step_secs, params = run.config.model, median(secs), run.config:params()
  local tflops, mfu, full = last.tflops * last.step_secs / step_secs, last.mfu * last.step_secs / step_secs, params.flops_per_token_full / params.flops_per_token
  return {
    name = name, value = batch * seq / step_secs, unit = "tokens/s",
    shape = ("%d layers, d %d, %d experts top-%d of %d, vocabulary %d, batch %d x %d"):format(model.num_layers, model.mla.d_model, model.moe.num_experts, model.moe.num_experts_per_token,
      model.moe.expert_intermediate_size, model.vocab_size, batch, seq),
    dtype = run.config.training.use_fp8 and "fp8" or run.config.training.use_bf16 and "bf16" or "fp32", grads_dtype = run.config.training.grads_dtype, device = run.model.device, commit = moe.commit,
    steps = steps, median_step_secs = step_secs, tflops = tflops, mfu = mfu, tflops_full = tflops * full, mfu_full = mfu * full, memory_gib = last.memory, loss = last.loss,
  }
end

local function bench_lua(options, given)
  local r = moe.bench_lua(options)
  if given.json then return print(moe.json.encode(r)) end
  print(("lua: %.0f ns an empty bound call (%.0f ns a call of Lua's), a + b of 4 numbers %.0f ns, %.2f x its %.0f ns in C++; a[1] %.0f ns, a.dtype %.0f ns, a:dim() %.0f ns"):format(1e9 * r.empty_call_secs,
    1e9 * r.lua_call_secs, 1e9 * r.add_secs, r.add_ratio, 1e9 * r.add_cpp_secs, 1e9 * r.index_secs, 1e9 * r.field_secs, 1e9 * r.method_secs))
  print(("steps in the background take %.3f times as long as in the foreground (standard error %.3f)"):format(r.background_ratio, r.background_ratio_se))
end

return function(words, options, given)
  if words[1] == "lua" then return bench_lua(options, given) end
  local names, by_name = {}, {}
  for i, b in ipairs(moe.benchmarks) do names[i], by_name[b.name] = b.name, b end
  names[#names + 1] = "lua"
  if not words[1] then moe.fail { op = "bench", got = "no name", want = table.concat(names, " or ") } end
  moe.check_keys({ [words[1]] = true }, names, "bench: name")
  moe.check_keys(options, { "steps", "warmup", "batch", "seq", "dtype", "grads" }, "bench: options")
  if options.dtype then moe.check_keys({ [options.dtype] = true }, { "bf16", "fp8", "fp32" }, "bench: dtype") end
  if options.grads then moe.check_keys({ [options.grads] = true }, { "fp32", "bf16" }, "bench: grads") end
  local result = train(words[1], by_name[words[1]], options, given.profile)
  if given.json then
    print(moe.json.encode(result))
  else
    print(("%s: %.0f %s, %.1f ms a step, %.2f TFLOPS, MFU %.1f %% (%.2f and %.1f %% with all of attention counted), %.2f GiB (%s, %s on %s, commit %s)"):format(result.name, result.value, result.unit, 1e3 * result.median_step_secs, result.tflops,
      100 * result.mfu, result.tflops_full, 100 * result.mfu_full, result.memory_gib, result.shape, result.dtype, result.device, result.commit))
  end
end
