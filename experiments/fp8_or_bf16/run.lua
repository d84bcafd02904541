-- Does training in FP8 cost anything? One small mixture of experts on real bytes, the same tokens in the same order, with products in
-- fp32, bf16 and fp8: how far apart are the losses? Arguments: --help
local here = arg[0]:match("^(.*)/[^/]*$") or "."
local corpus = dofile(here .. "/../quickstart/corpus.lua")

local options = moe.check_keys(arg.options, { "output_dir", "seed", "steps", "device", "batch", "precisions", "help" }, "fp8_or_bf16")
if options.help then
  print([[
output_dir=outputs            where the corpus, the run folders and the picture go
seed=1                        of weights and data
steps=1000                    optimizer steps of each model
batch=16                      sequences of 512 bytes a step
precisions=fp32,bf16,fp8      which to train, the first is what the others are held against
device=cpu|cuda               default: a GPU where there is one; on a CPU fp8 is exact and slow]])
  return
end
local output, steps, batch = options.output_dir or "outputs", options.steps or 1000, options.batch or 16

local domains = corpus.build(output .. "/fp8_or_bf16-corpus", moe.torch_folder(), 5e6 // 1)
local train_sources, validation_sources = {}, {}
for i, d in ipairs(domains) do
  train_sources[i] = { name = d.name, path = d.train, weight = 1.0 }
  validation_sources[i] = { name = d.name, path = d.validation, weight = 1.0 }
end

local function configuration(precision)
  return moe.config("cpu_quick"):with {
    experiment_name = "fp8_or_bf16_" .. precision, output_dir = output, seed = options.seed or 1, device = options.device,
    model = { num_layers = 4, vocab_size = moe.null, init_method_std = 0.02, dense_intermediate_size = 1024,
      mla = { d_model = 512, num_heads = 8, d_latent = 128, qk_nope_head_dim = 32, qk_rope_head_dim = 16, v_head_dim = 32 },
      moe = { num_experts = 16, num_experts_per_token = 2, expert_intermediate_size = 512, num_shared_experts = 1 } },
    training = { use_bf16 = precision == "bf16", use_fp8 = precision == "fp8", train_steps = steps, global_batch_size = batch, micro_batch_size = batch, seq_length = 512, learning_rate = 1e-3,
      min_learning_rate = 5e-5, lr_warmup_steps = steps // 10, weight_decay = 0.1, log_interval = 1000000 },
    data = { dataset_type = "text", sources = train_sources },
    validation = { enabled = true, sources = validation_sources, max_batches = 20 },
  }
end

local rows, curves, first = {}, {}, nil
for precision in (options.precisions or "fp32,bf16,fp8"):gmatch("[^,]+") do
  local run <close> = moe.run { config = configuration(precision), console = false }
  local bar, curve, sum, last = moe.progress(steps, { label = precision }), { name = precision, x = {}, y = {} }, 0, 0
  local window, count = 0, 0
  for step, s in run:steps(steps) do
    window, count = window + s.loss, count + 1
    if step % math.max(1, steps // 100) == 0 then
      curve.x[#curve.x + 1], curve.y[#curve.y + 1] = step, window / count
      window, count = 0, 0
    end
    if step > steps - math.max(1, steps // 10) then sum, last = sum + s.loss, last + 1 end
    bar:update(step, ("loss %.3f"):format(s.loss))
  end
  bar:done()
  if run.stopping then
    print("stopped; what there is of this run is saved in " .. run.folder)
    return
  end
  local loss, after = sum / last, run:evaluate().loss
  first = first or { loss = loss, after = after }
  rows[#rows + 1] = { precision, loss, 100 * (loss / first.loss - 1), after, 100 * (after / first.after - 1), run.folder }
  curves[#curves + 1] = curve
end

print(("\nAfter %d steps of %d bytes; training loss is the mean of the last tenth, nats a byte"):format(steps, batch * 512))
print(moe.table(rows, { titles = { "products", "training loss", "apart %", "validation loss", "apart %", "folder" }, formats = { false, "%.4f", "%+.3f", "%.4f", "%+.3f", false } }))
local picture = output .. "/fp8_or_bf16.svg"
viz.line(curves, { title = "Loss by the precision of the products", x_label = "step", y_label = "nats a byte" }):save(picture)
print("\nPicture: " .. picture)
