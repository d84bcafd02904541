local check = dofile(arg[0]:match("^(.*)/") .. "/lib/check.lua")
local test, equal, near, is, raises = check.test, check.equal, check.near, check.is, check.raises

local folder = check.folder()
local SMALL = {
  output_dir = folder, experiment_name = "small",
  model = { num_layers = 2, vocab_size = 264, first_k_dense_replace = 1, dense_intermediate_size = 64,
    mla = { d_model = 32, d_latent = 16, num_heads = 2, qk_nope_head_dim = 8, qk_rope_head_dim = 8, v_head_dim = 8 },
    moe = { num_experts = 4, num_experts_per_token = 2, expert_intermediate_size = 16, num_shared_experts = 1 } },
  training = { global_batch_size = 4, micro_batch_size = 2, seq_length = 32, train_steps = 20, learning_rate = 3e-3 },
  data = { dataset_type = "synthetic", synthetic = { domains = 3 } },
  validation = { enabled = true, max_batches = 3 },
}
local cfg = moe.config(SMALL)

test("run: trains, and calls back", function()
  local run = moe.run { config = cfg, console = false }
  local every, on = 0, 0
  run:every(2, function(m) every = every + 1 check.equal(m.step % 2, 0) end)
  run:on("step", function(m) on = on + 1 end)
  local m = run:train(5)
  equal(run.step, 5)
  equal(m.step, 5)
  equal(every, 2)
  equal(on, 5)
  is(m.loss > 0 and m.loss < 8, "loss " .. m.loss)
  check.contains(tostring(m), "step: 5 loss: ")
  check.contains(tostring(m), "maxvio: ")
  is(moe.fs.exists(run.folder .. "/config.json") and moe.fs.exists(run.folder .. "/script.lua"))
  equal(#run.domains, 3)
end)

test("run: steps can be left, and go on", function()
  local run = moe.run { config = cfg, console = false, log = false }
  equal(run.folder, nil)
  for step in run:steps(10) do
    if step == 3 then break end
  end
  equal(run.step, 3)
  run:train()
  equal(run.step, run.num_steps)
end)

test("run: the same twice", function()
  local function losses()
    local list = {}
    local run = moe.run { config = cfg, console = false, log = false }
    for _, m in run:steps(4) do list[#list + 1] = m.loss end
    return list
  end
  local a, b = losses(), losses()
  for i = 1, 4 do near(a[i], b[i], 1e-6) end
end)

test("run: evaluation by domain, counts, trace", function()
  local run = moe.run { config = cfg, console = false, log = false }
  raises("state", function() return run:counts() end, "no step")
  run:train(2)
  local seen
  run:on("evaluate", function(e) seen = e end)
  local e = run:evaluate { max_batches = 2 }
  equal(seen, e)
  equal(#e.by_domain, 3)
  near(e.bits, e.loss / math.log(2), 1e-9)
  local counts = run:counts { by = "domain" }
  equal(table.concat(counts.shape, ","), "2,3,4")
  equal(counts:sum():item(), run:counts():sum():item())
  equal(run:counts():sum():item(), 4 * 32 * 2)
  local tr = run:trace { batches = 2 }
  equal(table.concat(tr.layers, ","), "1")
  local load = tr:load { layer = 1, by = "domain" }
  equal(table.concat(load.shape, ","), "3,4")
  equal(load:sum():item(), tr:load({ layer = 1 }):sum():item())
  equal(table.concat(tr:load({ by = "domain" }).shape, ","), "1,3,4")
  local total, last = 0, math.huge
  for text, n, id in tr:tokens { layer = 1, expert = 0, top = 1000 } do
    is(type(text) == "string" and n <= last and id >= 0)
    total, last = total + n, n
  end
  equal(total, load:sum(0)[0]:item())
  is(tr:mutual_information(1) >= 0)
  local special = tr:specialization()
  equal(#special, 4)
  is(special[1].share >= special[4].share and special[1].share <= 1)
  equal(#tr:examples { layer = 1, expert = special[1].expert, count = 2 }, 2)
  raises("config", function() return tr:load { layer = 0 } end, "routed")
  raises("config", function() return tr:tokens { layer = 1, expert = 4 } end, "0 … 3")
  raises("usage", function() return tr:load { layr = 1 } end, 'did you mean "layer"?')
end)

test("run: past the end of its schedule it says once that the learning rate stays", function()
  moe.fs.write(folder .. "/past.lua", ([[
    local run = moe.run { config = moe.config "%s/cfg.json", log = false }
    run:train() print "end"
    run:train(1) run:train(2)
    assert(run.last.step == run.num_steps + 3 and run.last.lr == run.lr)
  ]]):format(folder))
  cfg:with({ training = { train_steps = 2 } }):save(folder .. "/cfg.json")
  local out, code = check.moelab(("run '%s/past.lua'"):format(folder))
  equal(code, 0, out)
  equal(select(2, out:gsub("the schedule of 2 steps", "")), 1, out)
  is(out:find("end\n.*the schedule of 2 steps %(training.train_steps%) has ended"), out)
end)

test("run: a step past the end of its schedule that is undone says nothing", function()
  moe.fs.write(folder .. "/undone.lua", ([[
    local run = moe.run { config = moe.config "%s/cfg.json", log = false }
    run:train()
    run.data = function() error("no data") end
    for _ = 1, 2 do assert(not pcall(run.train, run, 1)) end
    run:undo()
    print "end"
    run:train(1)
  ]]):format(folder))
  local out, code = check.moelab(("run '%s/undone.lua'"):format(folder))
  equal(code, 0, out)
  equal(select(2, out:gsub("the schedule of 2 steps", "")), 1, out)
  is(out:find("end\n.*the schedule of 2 steps"), out)
end)

test("run: wrong events, keys and folders", function()
  local run = moe.run { config = cfg, console = false, log = false }
  raises("usage", function() run:on("stepp", print) end, "step")
  raises("usage", function() run:on("step", 3) end, "a function")
  raises("usage", function() run:every(0, print) end)
  raises("usage", function() return run.modle end, 'did you mean "model"?')
  raises("usage", function() return moe.run { confg = cfg } end, 'did you mean "config"?')
  raises("usage", function() return moe.run {} end, "config")
  raises("io", function() return moe.run { config = cfg:with { output_dir = "/proc/none" }, console = false } end)
  raises("config", function() return moe.run { config = cfg:with { model = { moe = { num_experts_per_token = 9 } } } } end, "9")
  raises("config", function() return moe.run { config = cfg:with { model = { moe = { use_deep_ep = true } } } } end, "not built yet")
  raises("io", function() return moe.run { config = cfg:with { data = { dataset_type = "text", sources = { { name = "a", path = folder .. "/none" } } }, validation = { enabled = false } } } end, "none")
end)

test("run: an error in a callback comes out, the run goes on", function()
  local run = moe.run { config = cfg, console = false, log = false }
  run:on("step", function(m) if m.step == 2 then error({ mine = true }) end end)
  local ok, err = pcall(run.train, run, 3)
  is(not ok and err.mine)
  equal(run.step, 2)
  run:train(1)
  equal(run.step, 3)
end)

test("run: freed in its own callback", function()
  local run = moe.run { config = cfg, console = false, log = false }
  run:on("step", function() run:free() end)
  local ok = pcall(run.train, run, 2)
  is(ok ~= nil)
  raises("state", function() return run.step end, "freed")
end)

test("model: loss, gradients and parameters agree", function()
  local m = moe.model(cfg, { dtype = "fp64" })
  local ids = moe.randint(0, 256, { 2, 9 })
  local loss, p, g = m:loss(ids):item(), m:parameters(), m:grads(ids)
  near(loss, math.log(264), 0.3)
  local logits, sum = m:logits(ids):to("fp64"), 0
  equal(table.concat(logits.shape, ","), "2,9,264")
  for b = 0, 1 do
    for t = 0, 7 do
      local row = logits[b][t]
      sum = sum + row:exp():sum():log():item() - row[ids[b][t + 1]:item()]:item()
    end
  end
  near(loss, sum / 16, 1e-9, "loss against a plain sum over logits")
  local names = {}
  for name, value in pairs(p) do
    names[#names + 1] = name
    equal(table.concat(value.shape, ","), table.concat(g[name].shape, ","))
  end
  equal(names[1], "model.embed_tokens.weight")
  -- A central difference along one weight.
  local name = "model.layers.1.mlp.experts.2.down_proj.weight"
  for _, n in ipairs { name, "model.layers.0.self_attn.o_proj.weight" } do
    local w, h = p[n], 1e-5
    local function at(delta)
      w[3][1] = w[3][1] + delta
      local value = m:loss(ids):item()
      w[3][1] = w[3][1] - delta
      return value
    end
    near(g[n][3][1]:item(), (at(h) - at(-h)) / (2 * h), 1e-7, n)
  end
end)

test("model: wrong inputs", function()
  local m = moe.model(cfg)
  raises("data", function() return m:logits { { 1, 999 } } end, "999")
  raises("shape", function() return m:loss { { 1 } } end)
  raises("dtype", function() return m:loss(moe.randn { 1, 4 }) end, "int64")
  raises("config", function() return m:bias(0) end, "routed")
  raises("config", function() return moe.model(cfg, { dtype = "fp23" }) end)
  equal(#m:bias(1), 4)
end)

test("safetensors: written and read in order", function()
  local m = moe.model(cfg)
  local path = folder .. "/m.safetensors"
  moe.save_safetensors(path, m:parameters(), { made = "by a test" })
  local count = 0
  for name, t in pairs(moe.load_safetensors(path)) do
    is(t:allclose(m:parameters()[name], { atol = 0, rtol = 0 }))
    count = count + 1
  end
  is(count > 10)
  raises("io", function() return moe.load_safetensors(folder .. "/none.safetensors") end)
  raises("io", function() return moe.save_safetensors("/proc/none/x.safetensors", {}) end)
  raises("usage", function() return moe.save_safetensors(path, { a = 3 }) end)
  raises("io", function() return moe.load_hf(folder .. "/none") end)
end)

test("run: an interrupt stops at the next step with 130", function()
  local script = folder .. "/long.lua"
  moe.fs.write(script, ("local r = moe.run { config = moe.json.decode(moe.fs.read(%q)), console = false, log = false }\nr:train(1)\nio.open(%q, 'w'):close()\nr:train(1000000)"):format(folder .. "/small.json", folder .. "/ready"))
  cfg:save(folder .. "/small.json")
  local out, code = check.interrupted(script, folder .. "/ready")
  equal(code, 130, out)
end)

check.done()
