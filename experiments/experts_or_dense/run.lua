-- Does a mixture of experts earn its parameters? Three models on several unrelated domains, the same tokens in the same order: a dense
-- one, and two mixtures that use as many weights a token, with and without the balancing bias. Arguments: --help
local options = moe.script_options({ "device", "help", output_dir = "outputs", seed = 1, steps = 400, vocab = 512, batch = 16, domains = 12 }, "experts_or_dense")
if options.help then
  print([[
output_dir=outputs   where the run folders and the picture go
seed=1               of weights
steps=400            optimizer steps of each model
domains=12           unrelated random languages in the data
vocab=512            tokens of each of them
batch=16             sequences of 128 tokens a step
device=cpu|cuda      default: a GPU where there is one]])
  return
end
local output, steps, vocab = options.output_dir, options.steps, options.vocab
local batch = options.batch

-- Width of the dense feed-forward = what a token meets in a mixture: top-k experts.
local EXPERTS, TOP_K, WIDTH = 16, 2, 64
local function configuration(name, dense, bias)
  return moe.config("cpu_quick"):with {
    experiment_name = name, output_dir = output, seed = options.seed, device = options.device,
    model = { num_layers = 3, vocab_size = vocab, init_method_std = 0.02, first_k_dense_replace = dense and 3 or 0, dense_intermediate_size = TOP_K * WIDTH,
      mla = { d_model = 96, num_heads = 3, d_latent = 48, qk_nope_head_dim = 24, qk_rope_head_dim = 8, v_head_dim = 24 },
      moe = { num_experts = EXPERTS, num_experts_per_token = TOP_K, expert_intermediate_size = WIDTH, num_shared_experts = 0, use_aux_loss_free = bias, bias_update_speed = 0.02, bias_update_rule = "magnitude" } },
    training = { train_steps = steps, global_batch_size = batch, micro_batch_size = batch, seq_length = 128, learning_rate = 5e-3, min_learning_rate = 2.5e-4, lr_warmup_steps = steps // 10, weight_decay = 0.1, log_interval = 1000000 },
    data = { dataset_type = "synthetic", sources = {}, path = moe.null, synthetic = { domains = options.domains, seed = 7 } },
    validation = { enabled = true, sources = {}, max_batches = 20 },
  }
end

local MODELS = {
  { name = "dense", dense = true, bias = false, title = "dense" },
  { name = "experts", dense = false, bias = true, title = "experts, balanced by bias" },
  { name = "unbalanced", dense = false, bias = false, title = "experts, not balanced" },
}
local rows, curves = {}, {}
for _, m in ipairs(MODELS) do
  local cfg = configuration("experts_or_dense_" .. m.name, m.dense, m.bias)
  local run <close> = moe.run { config = cfg, console = false }
  local bar, curve, vio, last = moe.progress(steps, { label = m.title }), { name = m.title, x = {}, y = {} }, 0, 0
  for step, s in run:steps(steps) do
    curve.x[#curve.x + 1], curve.y[#curve.y + 1] = step, s.loss
    if step > steps - math.max(1, steps // 10) then vio, last = vio + s.maxvio, last + 1 end
    bar:update(step, ("loss %.3f"):format(s.loss))
  end
  bar:done()
  if run.stopping then
    print("stopped; what there is of this run is saved in " .. run.folder)
    return
  end
  local params, after = cfg:params(), run:evaluate()
  rows[#rows + 1] = { m.title, moe.format_count(params.total), moe.format_count(params.active), after.loss, m.dense and "" or ("%.2f"):format(vio / last), run.folder }
  curves[#curves + 1] = curve
end

print(("\nAfter %d steps of %d tokens from %d random languages (MaxVio: mean of the last tenth, worst layer of each step)"):format(steps, batch * 128, options.domains))
print(moe.table(rows, { titles = { "model", "parameters", "active a token", "validation loss", "MaxVio", "folder" }, formats = { false, false, false, "%.4f", false, false } }))
local picture = output .. "/experts_or_dense.svg"
viz.line(curves, { title = "The same weights a token, dense or chosen", x_label = "step", y_label = "nats a token" }):save(picture)
print("\nPicture: " .. picture)
