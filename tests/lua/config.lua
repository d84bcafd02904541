local check = dofile(arg[0]:match("^(.*)/") .. "/lib/check.lua")
local test, equal, near, is, raises = check.test, check.equal, check.near, check.is, check.raises

test("config: ready names, keys and aliases", function()
  local cfg = moe.config "tiny"
  equal(cfg.model.moe.num_experts, 4)
  equal(cfg.model.moe.n_routed_experts, 4)
  equal(cfg.model.mla.rope_scaling, nil)
  is(#moe.config_names() >= 9)
end)

test("config: with makes a changed copy, deeply", function()
  local cfg = moe.config "tiny"
  local changed = cfg:with { model = { moe = { num_experts = 16 } }, ["training.learning_rate"] = 1e-4, ["model.moe.num_experts_per_token"] = 2 ^ 1 }
  equal(changed.model.moe.num_experts, 16)
  equal(changed.model.moe.num_experts_per_token, 2)
  equal(changed.training.learning_rate, 1e-4)
  equal(cfg.model.moe.num_experts, 4)
  equal(changed.model.num_layers, cfg.model.num_layers)
  check.contains(tostring(changed), "num_experts")
  is(changed ~= cfg)
  is(cfg:with {} == cfg)
end)

test("config: key=value texts are read by their key's type", function()
  local cfg = moe.config("tiny"):assign { "training.train_steps=7", "experiment_name=1e3", "model.vocab_size=null", "training.learning_rate=2e-4", "training.train_steps=8" }
  equal(cfg.training.train_steps, 8)
  equal(cfg.experiment_name, "1e3")
  equal(cfg.model.vocab_size, nil)
  equal(cfg.training.learning_rate, 2e-4)
  raises("config", function() return cfg:assign { "model.moe.num_expert=3" } end, "num_experts")
  raises("usage", function() return cfg:assign { "seed" } end)
  raises("usage", function() return cfg:assign { 3 } end)
end)

test("config: invalid values have no parameters, and short names are known", function()
  raises("config", function() return moe.config("cpu_quick"):with({ model = { num_layers = -3 } }):params() end, "model.num_layers: got -3")
  equal(moe.config({ training = { lr = 0.5 }, model = { moe = { top_k = 1 } } }).training.learning_rate, 0.5)
  local out, code = check.moelab("config cpu_quick model.moe.num_experts=0")
  equal(code, 2)
  check.contains(out, "model.moe.num_experts: got 0")
  raises("config", function() return moe.config { training = { qqqq = 1 } } end, "moelab config --keys lists them")
end)

test("config: length and memory of a run", function()
  local cfg = moe.config("cpu_quick")
  equal(cfg:num_steps(), nil)
  equal(cfg:with({ training = { train_steps = 9 } }):num_steps(), 9)
  equal(cfg:with({ training = { total_training_tokens = 16 * 256 * 3 + 1 } }):num_steps(), 4)
  local m = cfg:memory()
  equal(m.weights, 4 * cfg:params().total)
  equal(m.total, m.weights + m.gradients + m.optimizer + m.activations)
  is(cfg:with({ distributed = { zero_stage = 3 } }):memory({ ranks = 2 }).weights < m.weights)
  raises("config", function() return cfg:with({ distributed = { tensor_parallel_size = 2 } }):memory { ranks = 3 } end, "ranks")
  raises("config", function() return cfg:with({ training = { micro_batch_size = 0 } }):memory() end, "micro_batch_size")
  check.contains(moe.config_about "tiny", "97.6 M")
  raises("config", function() return moe.config_about "tinny" end, "tiny")
end)

test("config: printed without what is at its default, the tree has all", function()
  local cfg = moe.config("tiny"):with { model = { moe = { num_experts = 16 } } }
  local text, tree = tostring(cfg), cfg:tree()
  check.contains(text, "\n  model\n")
  is(text:find("\n%*%s+num_experts%s+16%s+%(was 4%)"), text)
  is(text:find("\n%s+num_heads%s+8\n"), text)          -- the base's own choice, not changed
  is(not text:find("norm_eps", 1, true) and not text:find("slurm", 1, true), text)
  is(select(2, text:gsub("\n", "")) < 60, text)
  local left = tonumber(text:match("\n  … (%d+) keys at their defaults; cfg:tree%(%) shows all$"))
  local lines, sections = select(2, tree:gsub("\n", "")), select(2, tree:gsub("\n%s+%S+%f[\n]", ""))
  equal(left + select(2, text:gsub("\n", "")) - select(2, text:gsub("\n%s+%S+%f[\n]", "")), lines - sections)
  check.contains(tree, "norm_eps")
  is(tostring(moe.config {}):find("^  … %d+ keys"))
end)

test("config: null, lists and empty lists", function()
  local cfg = moe.config("tiny"):with { training = { train_steps = 5, recompute = {} }, data = { sources = { { name = "a", path = "b" } } } }
  equal(cfg:with({ training = { train_steps = moe.null } }).training.train_steps, nil)
  equal(cfg.data.sources[1].name, "a")
  equal(#cfg:with({ data = { sources = {} } }).data.sources, 0)
end)

test("config: unknown keys name the nearest", function()
  local cfg = moe.config "tiny"
  raises("config", function() return cfg:with { model = { moe = { num_expert = 3 } } } end, "num_experts")
  raises("usage", function() return cfg.model.moe.num_expertz end, "num_experts")
  raises("config", function() return moe.config "tinny" end, "tiny")
  raises("usage", function() return moe.config(3) end, "a ready name")
end)

test("config: wrong types and impossible values", function()
  local cfg = moe.config "tiny"
  raises("config", function() return cfg:with { model = { num_layers = "four" } } end, "num_layers")
  raises("config", function() return cfg:with({ model = { moe = { num_experts_per_token = 9 } } }):validate() end, "9")
end)

test("config: frozen", function()
  local cfg = moe.config "tiny"
  raises("state", function() cfg.seed = 3 end, "cfg:with")
  raises("state", function() cfg.model.moe.num_experts = 3 end, "cfg:with")
end)

test("config: saved, read again, and malformed files with their line", function()
  local folder = check.folder()
  local cfg = moe.config("tiny"):with { seed = 7 }
  cfg:save(folder .. "/c.json")
  is(moe.config(folder .. "/c.json") == cfg)
  moe.fs.write(folder .. "/bad.json", '{\n  "seed": 1,\n  "model": {,}\n}')
  local err = raises("config", function() return moe.config(folder .. "/bad.json") end)
  check.contains(tostring(err) .. err.where, ":3")
  raises("io", function() return moe.config(folder .. "/none.json") end, "none.json")
  raises("io", function() return moe.config "tinny.json" end, 'did you mean "tiny"?')
  raises("io", function() return cfg:save(folder .. "/none/c.json") end)
end)

test("config: parameters and tables", function()
  local p = moe.config("cpu_quick"):params()
  is(p.total > 6.0e6 and p.total < 6.6e6, "total " .. p.total)
  is(p.active < p.total)
  is(p.flops_per_token > 6 * p.active * 0.9)
  local keys = {}
  for key in pairs(p) do keys[#keys + 1] = key end
  equal(table.concat(keys, " "), "total active flops_per_token flops_per_token_full mtp router_bias")
  is(p.flops_per_token_full > p.flops_per_token and p.flops_per_token_full < 2 * p.flops_per_token)
  equal(moe.config("tiny"):to_table().model.moe.num_experts, 4)
  check.contains(tostring(p), "{total = " .. p.total .. ", active = " .. p.active .. ", ")
end)

test("config: the length of a run in steps and tokens counts a ramp's smaller steps, and refuses what cannot be", function()
  local base = { training = { global_batch_size = 4, micro_batch_size = 1, seq_length = 10, total_training_tokens = 401 }, data = { dataset_type = "synthetic" } }
  local cfg = moe.config("cpu_quick"):with(base)
  equal(cfg:num_steps(), 11)
  equal(cfg:num_tokens(), 440)
  cfg = cfg:with { training = { batch_size_ramp = { start = 1, tokens = 90 } } }
  equal(cfg:num_steps(), 14)
  equal(cfg:num_tokens(), 100 + 8 * 40)
  local two = cfg:with { training = { batch_size_ramp = { start = 2, tokens = 90 } } }
  equal(two:num_steps(), 12)                         -- 2 sequences at 0, 20, 40 tokens, 3 at 60, then 4 from 90 on
  equal(two:num_steps { ranks = 2 }, 13)             -- on two ranks 2 at 60 and 80, too
  raises("config", function() return cfg:with({ training = { micro_batch_size = 0 } }):num_steps() end, "micro_batch_size")
end)

test("config: a misspelt method or key names the nearest of both", function()
  raises("usage", function() return moe.config("tiny").wiht end, 'did you mean "with"?')
  raises("usage", function() return moe.config("tiny").modle end, 'did you mean "model"?')
  raises("usage", function() moe.config("tiny"):set { seed = 1 } end, "cfg:with { … }")
end)

test("config: help explains a key", function()
  local text = moe.help_text(moe.config "tiny", "model.moe.capacity_factor")
  check.contains(text, "capacity_factor")
  raises("usage", function() return moe.help_text(moe.config "tiny", "model.moe.capacity_facto") end, "capacity_factor")
end)

check.done()
