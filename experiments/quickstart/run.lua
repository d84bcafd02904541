-- The quickstart: a corpus of five domains from this machine, a byte-level mixture of experts trained on it for about two minutes,
-- and a look at which experts took which domain.
--   ./moelab run experiments/quickstart/run.lua [output_dir=outputs] [seconds=120] [seed=42] [device=cpu|cuda] …
local here = arg[0]:match("^(.*)/[^/]*$") or "."
local corpus = dofile(here .. "/corpus.lua")

local options = moe.script_options({ "seconds", "steps", "device", "megabytes", "learning_rate", "bias_speed", "bias_rule", "compare", "name", "help", output_dir = "outputs", seed = 42 }, "quickstart")
if options.help then
  print([[
output_dir=outputs   where the corpus, the run folder and the pictures go
seconds=120          how long to train, evaluation included (45 on a GPU, where longer means the same files again and again); the number of steps follows from this machine's speed
steps=N              train exactly N steps instead
seed=42              of weights and data
device=cpu|cuda      default: a GPU where there is one; there the model is larger
megabytes=3          of training text a domain
learning_rate=X      peak of the cosine
bias_speed=X         step of the balancing bias; bias_rule=magnitude|sign|centred is its rule
compare=true         afterwards a second, short run without the balancing bias]])
  return
end
for _, key in ipairs { "seconds", "steps", "seed", "megabytes", "learning_rate" } do
  if options[key] ~= nil and type(options[key]) ~= "number" then moe.fail { kind = "usage", op = "quickstart: " .. key, got = tostring(options[key]), want = "a number" } end
end
if (tonumber(os.getenv("OMPI_COMM_WORLD_SIZE")) or 1) > 1 then
  moe.fail { kind = "usage", op = "quickstart", got = "several ranks", want = "one", hint = "it measures and draws on one process; start it without --ranks" }
end
local on_gpu = (options.device or moe.default_device()) == "cuda"
local output = options.output_dir
local name = options.name or "quickstart"
local seconds, compare = options.seconds or (on_gpu and 45 or 120), options.compare ~= false
local started = moe.clock()

-- 1. the corpus
moe.write("1/4  corpus: ")
local domains = corpus.build(output .. "/quickstart-corpus", moe.torch_folder(), (options.megabytes or (on_gpu and 20 or 3)) * 1e6 // 1)
local train_sources, validation_sources = {}, {}
for i, d in ipairs(domains) do
  train_sources[i] = { name = d.name, path = d.train, weight = 1.0, description = d.about }
  validation_sources[i] = { name = d.name, path = d.validation, weight = 1.0 }
end
print(("five domains in %s/quickstart-corpus (%s)"):format(output, moe.format_secs(moe.clock() - started)))

-- 2. the model: shape of the CPU benchmark, or a larger one for a GPU
local function configuration(steps, bias)
  local shape = on_gpu and {
    model = { num_layers = 8, dense_intermediate_size = 2048, mla = { d_model = 512, num_heads = 8, d_latent = 256, qk_nope_head_dim = 64, qk_rope_head_dim = 32, v_head_dim = 64, max_context_length = 1024 },
      moe = { num_experts = 32, num_experts_per_token = 4, expert_intermediate_size = 512 } },
    training = { use_bf16 = true, global_batch_size = 32, micro_batch_size = 32, seq_length = 1024, learning_rate = 2e-3 },
  } or {
    training = { global_batch_size = 8, micro_batch_size = 8, seq_length = 256, learning_rate = 4e-3 },
  }
  return moe.config("cpu_quick"):with(shape):with {
    experiment_name = name, output_dir = output, seed = options.seed, device = options.device,
    model = { vocab_size = moe.null, init_method_std = 0.02, moe = { bias_update_speed = options.bias_speed or (on_gpu and 0.05 or 0.02), bias_update_rule = options.bias_rule or "magnitude", use_aux_loss_free = bias } },
    training = { train_steps = steps, lr_warmup_steps = math.min(30, steps // 10), lr_decay_style = "cosine", min_learning_rate = (options.learning_rate or shape.training.learning_rate) / 20, weight_decay = 0.1, grad_clip = 1.0,
      learning_rate = options.learning_rate or shape.training.learning_rate, log_interval = 10 },
    data = { dataset_type = "text", sources = train_sources, packing = true, document_mask = true },
    validation = { enabled = true, sources = validation_sources, max_batches = on_gpu and 8 or 40 },
  }
end

-- How many steps fit: a few steps of a throwaway run tell this machine's speed.
local steps = options.steps
if not steps then
  local probe <close> = moe.run { config = configuration(100, true), console = false, log = false }
  probe:train(3)
  local clock, n = moe.clock(), 0
  while moe.clock() - clock < 4 do probe:train(1) n = n + 1 end
  steps = math.max(50, math.floor((seconds - 16) * n / (moe.clock() - clock)))
end
local cfg = configuration(steps, true)
local run = moe.run { config = cfg, name = name, console = false }
local before = run:evaluate { max_batches = 5 }
local params = cfg:params()
print(("2/4  model: %s parameters, %s active a token, %d experts a layer of which %d work on a token"):format(
  moe.format_count(params.total), moe.format_count(params.active), cfg.model.moe.num_experts, cfg.model.moe.num_experts_per_token))

-- 3. training
print(("3/4  training: %d steps of %d tokens"):format(steps, cfg.training.global_batch_size * cfg.training.seq_length))
local bar, curve, validation, rates = moe.progress(steps, { label = "train" }), { x = {}, y = {} }, { x = { 0 }, y = { before.loss } }, {}
for step, m in run:steps(steps) do
  curve.x[#curve.x + 1], curve.y[#curve.y + 1] = step, m.loss
  rates[#rates + 1] = m.tps
  bar:update(step, ("loss %.3f  %.0f tok/s  maxvio %.2f"):format(m.loss, m.tps, m.maxvio))
  if step % math.max(1, steps // 4) == 0 and step < steps then
    validation.x[#validation.x + 1], validation.y[#validation.y + 1] = step, run:evaluate({ max_batches = 5 }).loss
  end
end
bar:done()
if run.stopping then
  print(("stopped after step %d; it is saved: ./moelab train --resume %s goes on"):format(run.step, run.folder))
  return
end
table.sort(rates)

-- 4. what came out
local after = run:evaluate()
validation.x[#validation.x + 1], validation.y[#validation.y + 1] = steps, after.loss
local trace = run:trace { batches = on_gpu and 8 or 40 }
print(("4/4  results (%s so far, median %s tok/s)"):format(moe.format_secs(moe.clock() - started), moe.format_count(rates[#rates // 2 + 1])))

local rows = {}
for i, d in ipairs(after.by_domain) do
  rows[i] = { d.name, before.by_domain[i].loss, d.loss, d.loss / math.log(2), domains[i].about }
end
rows[#rows + 1] = { "mean", before.loss, after.loss, after.bits, "" }
print("\nValidation loss, in nats a byte before and after training, and in bits")
print(moe.table(rows, { titles = { "domain", "before", "after", "bits", "made of" }, formats = { false, "%.3f", "%.3f", "%.3f" } }))

--- MaxVio of each routed layer over the traced validation tokens.
local function maxvio(tr)
  local out = {}
  for i, layer in ipairs(tr.layers) do
    local load = tr:load { layer = layer }:to_table()
    local sum, top = 0, 0
    for _, n in ipairs(load) do sum, top = sum + n, math.max(top, n) end
    out[i] = top / (sum / #load) - 1
  end
  return out
end

local balance = {}
local with_bias = maxvio(trace)
for i, layer in ipairs(trace.layers) do balance[i] = { layer, with_bias[i], trace:mutual_information(layer) } end
if compare then
  local short = math.max(20, steps // 8)
  local unbalanced = moe.run { config = configuration(short, false), console = false, log = false }
  local bar2 = moe.progress(short, { label = "without the bias" })
  for step in unbalanced:steps(short) do bar2:update(step, "") end
  bar2:done()
  if unbalanced.stopping then compare = false end          -- too short to say anything
  for i, v in ipairs(compare and maxvio(unbalanced:trace { batches = on_gpu and 8 or 20 }) or {}) do balance[i][4] = v end
end
print("\nBalance and specialisation by layer, on validation data (MaxVio 0 is perfect balance; the mutual information of expert and domain is in nats)")
print(moe.table(balance, { titles = { "layer", "MaxVio", "mutual information", compare and "MaxVio of a short run without the bias" or nil }, formats = { "%d", "%.2f", "%.3f", "%.2f" } }))

print("\nThe experts that specialise most: share of what an expert gets that comes from one domain, and bytes that it was sent")
local special = {}
for _, s in ipairs(trace:specialization()) do
  if #special == 10 then break end
  local tokens = {}
  for text in trace:tokens { layer = s.layer, expert = s.expert, top = 6 } do tokens[#tokens + 1] = text == " " and "␣" or text end
  local examples = trace:examples { layer = s.layer, expert = s.expert, count = 2, width = 18 }
  special[#special + 1] = { s.layer, s.expert, s.domain, 100 * s.share, table.concat(tokens, " "), table.concat(examples, "   ") }
end
print(moe.table(special, { titles = { "layer", "expert", "domain", "share %", "most frequent", "in context" }, formats = { "%d", "%d", false, "%.0f" } }))

local curves = run.folder .. "/loss.svg"
viz.line({ { name = "training", x = curve.x, y = curve.y }, { name = "validation, mean of five domains", x = validation.x, y = validation.y } },
  { title = "Loss", x_label = "step", y_label = "nats a byte" }):save(curves)
local panels = {}
for i, layer in ipairs(trace.layers) do
  local load, panel = trace:load { layer = layer, by = "domain" }:to_table(), {}
  for d, row in ipairs(load) do
    local sum = 0
    for _, n in ipairs(row) do sum = sum + n end
    panel[d] = {}
    for e, n in ipairs(row) do panel[d][e] = n / sum * #row end
  end
  panels[i] = { title = ("layer %d"):format(layer), values = panel }
end
local heat = run.folder .. "/load.svg"
viz.heatmap(panels, { title = "Which expert reads which domain", rows = trace.domains, col_label = "expert", scale_label = "load relative to an even spread", min = 0 }):save(heat)
print(("\nPictures: %s\n          %s"):format(curves, heat))
print(("Everything took %s.\n\nNext:"):format(moe.format_secs(moe.clock() - started)))
print(("  ./moelab run experiments/quickstart/run.lua seconds=600        # the same, longer: the experts part further\n  ./moelab config cpu_quick                                      # the model that this was, key by key\n  ./moelab -e 'print(moe.config(\"deepseek_v3_671b\"):params())'    # and the one it is modelled on"))
