-- The tour of the Lua interface, runnable: what a first session looks like.
local check = dofile(arg[0]:match("^(.*)/") .. "/lib/check.lua")
local folder = check.folder()

check.test("sketch: a configuration, changed and explained", function()
  local cfg = moe.config "tiny":with { model = { moe = { num_experts = 16, num_experts_per_token = 2 } }, training = { learning_rate = 3e-4 } }
  check.contains(tostring(cfg), "num_experts")
  check.is(cfg:params().total > cfg:params().active)
  help(cfg, "model.moe.capacity_factor")
end)

local cfg = moe.config("cpu_quick"):with {
  output_dir = folder, ["model.num_layers"] = 2, ["model.mla.d_model"] = 64, ["model.moe.expert_intermediate_size"] = 32, ["model.dense_intermediate_size"] = 64,
  training = { global_batch_size = 4, micro_batch_size = 2, seq_length = 64, train_steps = 12 }, data = { synthetic = { domains = 3 } }, validation = { enabled = true },
}

check.test("sketch: a run, stepped, watched and looked into", function()
  local run = moe.run { config = cfg, name = "bias-16e", console = false }
  run:every(5, function(m) print(m) end)
  run:train(5)
  for step, m in run:steps(100) do
    if m.loss < 3 or step == 10 then break end
  end
  local e = run:evaluate { max_batches = 2 }
  print(moe.table(e.by_domain, { columns = { "name", "loss" }, formats = { loss = "%.3f" } }))
  local tr = run:trace { tokens = 500 }
  local layer = tr.layers[1]
  viz.heatmap(tr:load { layer = layer, by = "domain" }, { rows = tr.domains, col_label = "expert" }):save(folder .. "/load.svg")
  for token, n in tr:tokens { layer = layer, expert = 7, top = 3 } do print(token, n) end
  check.is(tr:specialization()[1].domain)
  local text = run.model:trace(moe.data("local_corpus", { seq_length = 64, batch_size = 2 }), { tokens = 512 })
  viz.heatmap(text:load { by = "domain" }:select("layer", layer)):save(folder .. "/local.png")
  print(text:specialization { layer = layer })
  text:coactivation(layer):plot():save(folder .. "/coactivation.svg")
  print(text:statistics())
  check.is(run.model:bias(layer):is_finite())
  run:save "mid"
  local again = moe.resume("mid", { training = { learning_rate = 1e-4, min_learning_rate = 1e-5 } })
  check.equal(again.step, run.step)
  again:train(2)
end)

check.test("sketch: a model without a run", function()
  local m = moe.model(cfg, { dtype = "fp32" })
  local ids = moe.randint(0, 256, { 2, 16 })
  local out, loss, g, p = m:logits(ids), m:loss(ids), m:grads(ids), m:parameters()
  check.equal(out:size(2), 264)
  check.equal(loss:dim(), 0)
  for name, value in pairs(p) do check.equal(table.concat(value.shape, "x"), table.concat(g[name].shape, "x"), name) end
  moe.save_safetensors(folder .. "/p.safetensors", p)
  check.is(moe.load_safetensors(folder .. "/p.safetensors")["lm_head.weight"]:allclose(p["lm_head.weight"]))
end)

check.test("sketch: tensors", function()
  local a = moe.randn { 4, 8 }
  check.equal(table.concat(a:matmul(a.T).shape, ","), "4,4")
  check.near((0.5 * a):softmax(-1)[0]:sum():item(), 1, 1e-5)
end)

check.done()
