-- moelab train --config NAME|FILE [key=value …] [--steps N] [--ranks N] [--name N] [--init DIR] [--resume PATH|last] [--dry-run] [--json]: trains a configuration.
local FEW_STEPS = 20       -- runs of no more log every step

-- --- the configuration ---

--- What a JSON file inherits, as moe.config understands it; nil where nothing.
local function inherited(path)
  if not path:find("/") and not path:find("%.json$") then return nil end
  local parent = moe.json.decode(moe.fs.read(path), path).inherits
  if type(parent) ~= "string" then return nil end
  local is_path = parent:find("%.json$") and parent:sub(1, 1) ~= "/"
  return is_path and (path:match("^(.*/)") or "") .. parent or parent
end

local function flat(value, path, out)
  for key, inner in pairs(value) do
    local name = path == "" and key or path .. "." .. key
    if type(inner) == "table" and #inner == 0 and next(inner) then
      flat(inner, name, out)
    else
      out[name] = moe.json.encode(inner)
    end
  end
  return out
end

--- Keys whose values differ: a list of {key, old, new}. What is null is not in a table.
local function differences(base, cfg)
  local old, new, keys, list = flat(base:to_table(), "", {}), flat(cfg:to_table(), "", {}), {}, {}
  for key in pairs(new) do keys[key] = true end
  for key in pairs(old) do keys[key] = true end
  for key in pairs(keys) do
    if old[key] ~= new[key] then list[#list + 1] = { key = key, old = old[key] or "null", new = new[key] or "null" } end
  end
  return list
end

local function refuse_cluster(given)
  for _, name in ipairs { "submit", "script-only" } do
    if given[name] then
      moe.fail { op = "moelab train --" .. name, got = "--" .. name, want = "a run on this machine", hint = "submission to a cluster is not built yet; in a job of your own: mpirun -n N moelab train …" }
    end
  end
end

--- What options stand for among the keys.
local function keys_of(given)
  local changes = {}
  if given.steps then changes["training.train_steps"] = math.tointeger(given.steps) end
  if given.init then changes["training.init_from"] = given.init end
  if given.deepspeed then changes["deepspeed.enabled"] = true end
  return changes
end

--- A run whose length the command line says: its warm-up must fit, and each of a few steps is worth a line.
local function fit_to_steps(cfg, options)
  local steps, t, more = cfg.training.train_steps, cfg.training, {}
  if not options["training.lr_warmup_steps"] and t.lr_warmup_steps > steps then more["training.lr_warmup_steps"] = steps end
  if steps <= FEW_STEPS and not options["training.log_interval"] and not options["logging.log_interval"] then more["training.log_interval"] = 1 end
  return cfg:with(more)
end

local function configuration(words, options, given, assignments)
  local source = given.config or table.remove(words, 1)
  if #words > 0 then
    moe.fail { op = "moelab train", got = '"' .. words[1] .. '"', want = "key=value", hint = "a configuration is given once: --config NAME|FILE" }
  end
  if not source then return nil end
  local named = moe.config(source)
  local cfg = named:assign(assignments):with(keys_of(given))
  if given.steps then cfg = fit_to_steps(cfg, options) end
  local t = cfg.training
  if not (t.train_steps or t.total_training_tokens or t.tokens_per_parameter_ratio) then
    moe.fail { kind = "config", op = "training.train_steps", got = "null", want = "a length of the run", hint = "add --steps N, or set training.train_steps, total_training_tokens or tokens_per_parameter_ratio" }
  end
  local parent = inherited(source)
  return { cfg = cfg, source = source, is_changed = cfg ~= named, base = parent and moe.config(parent) or named, base_name = parent or source }
end

-- --- what will run ---

--- The fewest ranks that the parallel sizes can be laid out on.
local function least_ranks(cfg)
  local d = cfg.distributed
  local in_replica, n = d.tensor_parallel_size * d.pipeline_parallel_size, 0
  repeat n = n + in_replica until (n // d.pipeline_parallel_size) % d.expert_parallel_size == 0
  return n
end

--- Memory of the device that a rank trains on, as all ranks of this machine share it.
local function available_memory()
  if moe.default_device() == "cuda" then return moe.gpus()[1].memory, "on the GPU" end
  return moe.host_memory().available, "available on this machine"
end

local function plan_of(cfg, given)
  local ranks, least = math.tointeger(given.ranks), least_ranks(cfg)
  local t, p = cfg.training, cfg:params()
  local planned = ranks == 1 and least or ranks
  local steps, device = cfg:num_steps { ranks = planned }, moe.default_device()
  local bytes, where = available_memory()
  return {
    steps = steps, tokens_per_step = t.global_batch_size * t.seq_length, tokens = cfg:num_tokens { ranks = planned },
    parameters = p.total, active = p.active, mtp = p.mtp, flops_per_token = p.flops_per_token,
    device = device, ranks = ranks, ranks_needed = least, planned_ranks = planned, memory = cfg:memory { ranks = planned },
    available = bytes, available_where = where,
    dtype = t.use_bf16 and "bf16" or t.use_fp64 and "fp64" or t.use_fp16 and "fp16" or t.use_fp8 and "fp8" or "fp32",
  }
end

--- Bytes that are certain, on all ranks that share one memory.
local function certain_bytes(plan)
  local m = plan.memory
  return (m.total - m.activations) * (plan.device == "cuda" and 1 or plan.planned_ranks)
end

local function show_memory(plan)
  local m, rows = plan.memory, {}
  for i, part in ipairs { { "weights", "weights" }, { "gradients", "gradients" }, { "optimizer", "optimizer state (master weights, moments)" }, { "activations", "activations, about" }, { "total", "together" } } do
    rows[i] = { part[2], moe.format_bytes(m[part[1]]) }
  end
  print(moe.table(rows, { title = ("memory of %s"):format(plan.planned_ranks == 1 and "the one rank" or ("the fullest of %d ranks"):format(plan.planned_ranks)) }))
  local sharing = plan.device ~= "cuda" and plan.planned_ranks or 1
  local wanted = sharing > 1 and (" for %d ranks, %s together"):format(sharing, moe.format_bytes(sharing * m.total)) or ""
  local fits = certain_bytes(plan) <= plan.available
  print(("%s %s%s%s"):format(moe.format_bytes(plan.available), plan.available_where, wanted, fits and "" or ": it does not fit"))
end

local function show_plan(spec, plan)
  local cfg = spec.cfg
  local t = cfg.training
  print(("%s: %s parameters%s, %s active a token; %.4g GFLOPs a token at %d tokens (causal rule)"):format(spec.source, moe.format_count(plan.parameters),
    plan.mtp > 0 and (" and %s of MTP"):format(moe.format_count(plan.mtp)) or "", moe.format_count(plan.active), plan.flops_per_token / 1e9, t.seq_length))
  local batch = t.dynamic_batch_tokens and ("at least %s tokens in sequences of %d"):format(moe.format_count(t.dynamic_batch_tokens), t.seq_length)
    or ("%s%d sequences x %d tokens"):format(t.batch_size_ramp and "up to " or "", t.global_batch_size, t.seq_length)
  print(("%d steps of %s: %s tokens; %s on %s, %d rank%s"):format(plan.steps, batch, moe.format_count(plan.tokens), plan.dtype, plan.device, plan.ranks, plan.ranks == 1 and "" or "s"))
  local changed = spec.changes or differences(spec.base, cfg)
  if #changed == 0 then
    print("configuration: " .. spec.base_name .. " as it is")
  else
    local rows = {}
    for i, d in ipairs(changed) do rows[i] = { d.key, d.old, "→ " .. d.new } end
    print(moe.table(rows, { title = "configuration: " .. spec.base_name .. " with" }))
  end
  show_memory(plan)
end

local function plan_json(spec, plan)
  local out = { config = spec.source, changes = spec.changes or differences(spec.base, spec.cfg) }
  for key, value in pairs(plan) do out[key] = value end
  return out
end

--- Before anything is built: a machine that runs out of memory kills instead of raising.
local function require_memory(spec, plan)
  local bytes = certain_bytes(plan)
  if bytes <= plan.available then return end
  moe.fail { kind = "memory", op = "training " .. spec.source, got = ("%s %s"):format(moe.format_bytes(plan.available), plan.available_where),
    want = ("%s for weights, gradients and optimizer state%s"):format(moe.format_bytes(bytes), plan.planned_ranks > 1 and (" of %d ranks"):format(plan.planned_ranks) or ""),
    hint = "a smaller configuration (moelab list), fewer layers or experts (model.num_layers=2 …), training.use_bf16=true, or a larger machine" }
end

local function dry_run(spec, plan, given)
  local launch = given.launch
  if plan.planned_ranks ~= plan.ranks then launch = ("%s --ranks %d"):format(launch, plan.planned_ranks) end
  local ok, unbuilt = pcall(spec.cfg.validate, spec.cfg)
  if given.json then
    local out = plan_json(spec, plan)
    out.launch, out.resolved = launch, spec.cfg:to_table()
    if not ok then out.refused = tostring(unbuilt) end
    print(moe.json.encode { plan = out })
    return
  end
  print("launch: " .. launch .. "\n")
  show_plan(spec, plan)
  if not ok then print("\nnot ready to run: " .. tostring(unbuilt)) end
  print("\nresolved configuration (* differs from " .. (spec.is_changed and spec.source or "the defaults") .. ")")
  print(spec.cfg)
end

-- --- training ---

--- What the resumed run's configuration changes of the saved one, as its event says: a list of {key, old, new}.
local function changes_on_resume(run)
  local list = {}
  for line in moe.fs.read(run.folder .. "/events.jsonl"):gmatch("[^\n]+") do
    local event = moe.json.decode(line)
    if event.event == "resume" then list = event.changes end
  end
  local function text(value) return moe.json.encode(value == nil and moe.null or value) end
  for i, c in ipairs(list) do list[i] = { key = c.key, old = text(c.old), new = text(c.new) } end
  return list
end

local function open_run(spec, options, given)
  if not given.resume then return moe.run { config = spec.cfg, name = given.name } end
  if spec then return moe.run { config = spec.cfg, name = given.name, resume = given.resume } end
  local changes = keys_of(given)
  for key, value in pairs(options) do changes[key] = value == "null" and moe.null or value end
  return moe.resume(given.resume, changes, { name = given.name, output_dir = options.output_dir })
end

local function train(run, json)
  local first, bar, last, skipped = run.step, nil, nil, 0
  if moe.is_terminal() and not json then bar = moe.progress(run.num_steps - first, { label = "train" }) end
  for step, m in run:steps() do
    last = m
    if m.skipped then skipped = skipped + 1 end
    if bar then bar:update(step - first, ("loss %.3f  %s tok/s"):format(m.loss, moe.format_count(m.tps))) end
  end
  if bar then bar:done() end
  return last, skipped
end

local function show_validation(e)
  local rows = {}
  for i, d in ipairs(e.by_domain) do rows[i] = { d.name, d.loss, math.exp(d.loss) } end
  rows[#rows + 1] = { "mean", e.loss, math.exp(e.loss) }
  print(moe.table(rows, { title = "validation, in nats a token", titles = { "domain", "loss", "perplexity" }, formats = { false, "%.4f", "%.2f" } }))
end

local function show_next(spec, run)
  local source = spec and spec.source or run.folder .. "/config.json"
  print()
  print(moe.table({
    { "  moelab train --resume " .. run.folder .. (run.stopping and "" or " --steps " .. run.num_steps * 2), "goes on from here" },
    { "  moelab train --config " .. source .. " training.learning_rate=1e-4 --dry-run", "shows a run with changes" },
    { "  moelab config " .. source, "every key" },
  }, { title = "Next:" }))
end

local function finish(spec, run, last, skipped, secs, json)
  -- Asked to stop, it has saved; whatever else takes time would be cut off.
  local e = not run.stopping and run.config.validation.enabled and run:evaluate() or nil
  local summary = { steps = run.step, loss = last and last.loss, tokens = last and last.tokens, secs = secs, folder = run.folder, skipped = skipped, validation = e }
  if json then
    print(moe.json.encode { summary = summary })
    return
  end
  if e then show_validation(e) end
  if not last then
    print(("nothing to do: step %d of %d is done; folder %s"):format(run.step, run.num_steps, run.folder))
    return
  end
  print(("\n%s loss %.5f after %d steps, %s tokens, %s%s; folder %s"):format(run.stopping and "stopped and saved:" or "done: final", last.loss, run.step, moe.format_count(last.tokens), moe.format_secs(secs),
    skipped > 0 and (", %d steps skipped"):format(skipped) or "", run.folder))
  show_next(spec, run)
end

return function(words, options, given, assignments)
  refuse_cluster(given)
  local spec = configuration(words, options, given, assignments)
  if not spec and not (given.resume and not given["dry-run"]) then
    moe.fail { op = "moelab train", got = "no configuration", want = "--config NAME|FILE", hint = "ready ones: " .. table.concat(moe.config_names(), ", ") }
  end
  if spec then
    spec.cfg:validate { built = false }
    local plan = plan_of(spec.cfg, given)
    if given["dry-run"] then return dry_run(spec, plan, given) end
    require_memory(spec, plan)
    spec.cfg:validate()
    if given.json then print(moe.json.encode { plan = plan_json(spec, plan) }) else show_plan(spec, plan) end
  end
  local clock = moe.clock()
  local run <close> = open_run(spec, options, given)
  if not spec then                             -- resumed by its own configuration, which only the checkpoint knows
    local resumed = { cfg = run.config, source = run.folder .. "/config.json", base_name = "that of the checkpoint", changes = changes_on_resume(run) }
    local plan = plan_of(resumed.cfg, given)
    if given.json then print(moe.json.encode { plan = plan_json(resumed, plan) }) else show_plan(resumed, plan) end
  end
  if not given.json then print(("\n%s\n"):format(tostring(run))) end
  local last, skipped = train(run, given.json)
  finish(spec, run, last, skipped, moe.clock() - clock, given.json)
end
