-- Does training in FP8 cost anything? One small mixture of experts on real bytes, the same tokens in the same order, with products in
-- fp32, bf16 and fp8: how far apart are the losses? Arguments: --help
local here = arg[0]:match("^(.*)/[^/]*$") or "."
local corpus = dofile(here .. "/../quickstart/corpus.lua")

local options = moe.script_options({ "device", "precisions", "help", output_dir = "outputs", seed = 1, steps = 1000, batch = 16, from = 0, seeds = 1 }, "fp8_or_bf16")
if options.help then
  print([[
output_dir=outputs            where the corpus, the run folders and the picture go
seed=1                        of weights and data
steps=1000                    optimizer steps of each model
batch=16                      sequences of 512 bytes a step
precisions=fp32,bf16,fp8      which to train, the first is what the others are held against
from=0                        so many steps are made once, with the first products; from there all go on with the same weights
seeds=1                       so many seeds, from seed on: a mean with its standard error
device=cpu|cuda               default: a GPU where there is one; on a CPU fp8 is exact and slow]])
  return
end
local output, steps, batch, from, num_seeds = options.output_dir, options.steps, options.batch, options.from, options.seeds
if from < 0 or from >= steps then moe.fail { op = "fp8_or_bf16: from", got = tostring(from), want = "0 to " .. steps - 1 .. ", below steps" } end
if num_seeds < 1 then moe.fail { op = "fp8_or_bf16: seeds", got = tostring(num_seeds), want = "1 or more" } end
local precisions = {}
for precision in (options.precisions or "fp32,bf16,fp8"):gmatch("[^,]+") do precisions[#precisions + 1] = precision end

local domains = corpus.build(output .. "/fp8_or_bf16-corpus", moe.torch_folder(), 5e6 // 1)
local train_sources, validation_sources = {}, {}
for i, d in ipairs(domains) do
  train_sources[i] = { name = d.name, path = d.train, weight = 1.0 }
  validation_sources[i] = { name = d.name, path = d.validation, weight = 1.0 }
end

local function products(precision) return { use_bf16 = precision == "bf16", use_fp8 = precision == "fp8" } end

local function configuration(precision, seed)
  return moe.config("cpu_quick"):with {
    experiment_name = "fp8_or_bf16_" .. precision, output_dir = output, seed = seed, device = options.device,
    model = { num_layers = 4, vocab_size = moe.null, init_method_std = 0.02, dense_intermediate_size = 1024,
      mla = { d_model = 512, num_heads = 8, d_latent = 128, qk_nope_head_dim = 32, qk_rope_head_dim = 16, v_head_dim = 32 },
      moe = { num_experts = 16, num_experts_per_token = 2, expert_intermediate_size = 512, num_shared_experts = 1 } },
    training = { train_steps = steps, global_batch_size = batch, micro_batch_size = batch, seq_length = 512, learning_rate = 1e-3,
      min_learning_rate = 5e-5, lr_warmup_steps = steps // 10, weight_decay = 0.1, log_interval = 1000000 },
    data = { dataset_type = "text", sources = train_sources },
    validation = { enabled = true, sources = validation_sources, max_batches = 20 },
  }:with { training = products(precision) }
end

local losses, curves = {}, {}      -- by precision: a list of {of the last tenth, of all steps, validation loss}, one a seed; curves of the first seed

--- The steps after `from`; nothing where they were interrupted.
local function train(run, precision, seed)
  local bar, curve, tenth = moe.progress(steps, { label = precision .. " " .. seed }), { name = precision, x = {}, y = {} }, math.max(1, (steps - from) // 10)
  local window, count, sum, last = 0, 0, 0, 0
  for step, s in run:steps(steps - from) do
    window, count, sum = window + s.loss, count + 1, sum + s.loss
    if step % math.max(1, steps // 100) == 0 then
      curve.x[#curve.x + 1], curve.y[#curve.y + 1] = step, window / count
      window, count = 0, 0
    end
    if step > steps - tenth then last = last + s.loss end
    bar:update(step, ("loss %.3f"):format(s.loss))
  end
  bar:done()
  if run.stopping then return print("stopped; what there is of this run is saved in " .. run.folder) end
  if #curves < #precisions then curves[#curves + 1] = curve end
  losses[precision] = losses[precision] or {}
  table.insert(losses[precision], { last / tenth, sum / (steps - from), run:evaluate().loss })
  return true
end

for seed = options.seed, options.seed + num_seeds - 1 do
  local start
  if from > 0 then
    local run <close> = moe.run { config = configuration(precisions[1], seed), console = false }
    run:train(from)
    if run.stopping then return print("stopped; what there is of this run is saved in " .. run.folder) end
    start = run:save("start")
  end
  for _, precision in ipairs(precisions) do
    local run <close> = start and moe.resume(start, { experiment_name = "fp8_or_bf16_" .. precision, training = products(precision) }, { console = false }) or moe.run { config = configuration(precision, seed), console = false }
    if not train(run, precision, seed) then return end
  end
end

--- How far from the first precision's, in percent: the mean over seeds, and its standard error.
local function apart(precision, which)
  local sum, squares, n = 0, 0, num_seeds
  for i = 1, n do
    local d = 100 * (losses[precision][i][which] / losses[precisions[1]][i][which] - 1)
    sum, squares = sum + d, squares + d * d
  end
  local mean = sum / n
  return ("%+.3f"):format(mean) .. (n > 1 and (" (%.3f)"):format(math.sqrt(math.max(0, squares / n - mean * mean) / (n - 1))) or "")
end

local rows = {}
for i, precision in ipairs(precisions) do
  local first = losses[precision][1]
  rows[i] = { precision, first[1], apart(precision, 1), first[2], apart(precision, 2), first[3], apart(precision, 3) }
end
print(("\nAfter %d steps of %d bytes%s, nats a byte; apart in %%%s"):format(steps, batch * 512, from > 0 and (", the first %d of them the same"):format(from) or "", num_seeds > 1 and (", the mean of %d seeds (standard error); losses are the first seed's"):format(num_seeds) or ""))
print(moe.table(rows, { titles = { "products", "last tenth", "apart", "all steps", "apart", "validation", "apart" }, formats = { false, "%.4f", false, "%.4f", false, "%.4f", false } }))
local picture = output .. "/fp8_or_bf16.svg"
viz.line(curves, { title = "Loss by the precision of the products", x_label = "step", y_label = "nats a byte" }):save(picture)
print("\nPicture: " .. picture)
