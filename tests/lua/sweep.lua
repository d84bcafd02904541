-- moe.sweep: points, ids, what runs and what does not, failures, processes, tables, pictures and the report.
local check = dofile(arg[0]:match("^(.*)/") .. "/lib/check.lua")
local test, equal, near, is, raises, contains = check.test, check.equal, check.near, check.is, check.raises, check.contains

local folder = check.folder()
local SMALL = {
  output_dir = folder .. "/runs", experiment_name = "small",
  model = { num_layers = 2, vocab_size = 264, first_k_dense_replace = 1, dense_intermediate_size = 64,
    mla = { d_model = 32, d_latent = 16, num_heads = 2, qk_nope_head_dim = 8, qk_rope_head_dim = 8, v_head_dim = 8 },
    moe = { num_experts = 4, num_experts_per_token = 2, expert_intermediate_size = 16, num_shared_experts = 1 } },
  training = { global_batch_size = 4, micro_batch_size = 2, seq_length = 32, train_steps = 4, learning_rate = 3e-3, min_learning_rate = 1e-6 },
  data = { dataset_type = "synthetic", synthetic = { domains = 2 } },
  validation = { enabled = true, max_batches = 1 },
}
local base = moe.config(SMALL)
local LR = "training.learning_rate"
local function ids(sweep)
  local list = {}
  for i, p in ipairs(sweep:points()) do list[i] = p.id end
  return table.concat(list, " ")
end
local function statuses(sweep)
  local list = {}
  for i, p in ipairs(sweep:points()) do list[i] = p.status end
  return table.concat(list, " ")
end
local function square(p) return { loss = p.values[LR] ^ 2 + p.values.seed } end

test("sweep: a grid is all combinations, seeds fastest, and the configuration of each is resolved", function()
  local s = moe.sweep { name = "grid", base = base, fn = square, grid = { seed = { 1, 2 }, [LR] = { 1e-3, 3e-3, 1e-2 } } }
  equal(#s, 6)
  local p = s:points()
  for i, lr in ipairs { 1e-3, 1e-3, 3e-3, 3e-3, 1e-2, 1e-2 } do
    equal(p[i].values[LR], lr)
    equal(p[i].values.seed, i % 2 == 1 and 1 or 2)
    equal(p[i].config.training.learning_rate, lr)
    equal(p[i].config.seed, p[i].values.seed)
    equal(p[i].status, "waiting")
  end
  local t = s:check()
  equal(#t, 6)
  equal(t[1].parameters, base:params().total)
  equal(t[1].steps, 4)
  is(not moe.fs.exists(s.folder), "check wrote " .. s.folder)
end)

test("sweep: lists, draws and grids combine; draws are repeatable and do not depend on one another", function()
  local function made(random, grid, list) return moe.sweep { name = "combine", base = base, fn = square, random = random, grid = grid, list = list } end
  equal(#made(nil, { seed = { 1, 2 } }, { { [LR] = 1e-3 }, { [LR] = 2e-3, ["training.weight_decay"] = 0.2 } }), 4)
  local space = { [LR] = { 1e-5, 1e-1, log = true } }
  local few, many = made({ n = 3, space = space }):points(), made({ n = 40, space = space }):points()
  for i = 1, 3 do equal(few[i].values[LR], many[i].values[LR]) end
  local wider = made { n = 3, space = { [LR] = space[LR], ["model.moe.num_experts"] = { 4, 16 }, ["model.norm_eps"] = { values = { 1e-5, 1e-6 } } } }:points()
  for i = 1, 3 do equal(wider[i].values[LR], few[i].values[LR]) end
  local below, other = 0, made({ n = 40, seed = 2, space = space }):points()
  for i, p in ipairs(many) do
    is(p.values[LR] >= 1e-5 and p.values[LR] < 1e-1)
    if p.values[LR] < 1e-3 then below = below + 1 end
    is(p.values[LR] ~= other[i].values[LR])
  end
  is(below > 10 and below < 30, below .. " of 40 draws lie in the lower half of the logarithm")
  local whole = made { n = 60, space = { ["model.moe.num_experts"] = { 2, 5 } } }:points()
  local seen = {}
  for _, p in ipairs(whole) do seen[p.values["model.moe.num_experts"]] = true end
  for n = 2, 5 do is(seen[n], n .. " was never drawn") end
  equal(#whole, 4)                     -- equal points are there once
end)

test("sweep: running again does only what is missing; other values add, another fn is another result", function()
  local calls = 0
  local counter = { add = function() calls = calls + 1 end }
  local function fn(p)
    counter.add()
    return { loss = p.values.seed * 10 }
  end
  -- What fn holds on to is part of it, and calls grows: so the count is kept out of its reach.
  local real = fn
  local function made(seeds) return moe.sweep { name = "again", base = base, fn = function(p) _G.sweep_calls = (_G.sweep_calls or 0) + 1; return { loss = p.values.seed * 10 } end, grid = { seed = seeds } } end
  local first = made { 1, 2 }:run { limit = 1 }
  equal(_G.sweep_calls, 1)
  equal(statuses(first), "done waiting")
  is(moe.fs.exists(first:points()[2].path), "a point that waits is written before any runs")
  equal(moe.json.decode(moe.fs.read(first:points()[2].path)).config.seed, 2)
  local second = made { 1, 2 }
  equal(ids(second), ids(first))
  equal(second:points()[1].result.loss, 10)
  second:run()
  equal(_G.sweep_calls, 2)
  made { 3, 1, 2 }:run()
  equal(_G.sweep_calls, 3)
  local other = moe.sweep { name = "again", base = base, fn = function() return { loss = 0 } end, grid = { seed = { 1, 2 } } }
  equal(statuses(other), "waiting waiting")
  local changed = moe.sweep { name = "again", base = base:with { training = { weight_decay = 0.3 } }, fn = real, grid = { seed = { 1 } } }
  is(changed:points()[1].id ~= first:points()[1].id)
  _G.sweep_calls = nil
end)

test("sweep: ids follow what fn does and holds on to, not where it stands or runs are kept", function()
  local function id_of(code, over)
    local fn = assert(load(code, code))()
    return moe.sweep { name = "ids", base = over and base:with(over) or base, fn = fn, grid = { seed = { 1 } } }:points()[1].id
  end
  local id = id_of "local scale = 2\nreturn function(p)\n  return { loss = scale }\nend"
  equal(id_of "local scale = 2\n\n\nreturn function(p)\n  -- a comment\n      return { loss = scale }\n\nend", id)
  is(id_of "local scale = 3\nreturn function(p)\n  return { loss = scale }\nend" ~= id, "an upvalue changed")
  is(id_of "local scale = 2\nreturn function(p)\n  return { loss = -scale }\nend" ~= id, "the code changed")
  local function of_globals() return id_of "return function(p) seen[#seen + 1] = p; calls = calls + 1; local function f() return scale * half(2) end return { loss = f() } end" end
  _G.seen, _G.calls, _G.scale, _G.half = {}, 0, 2, function(x) return x / 2 end
  local first = of_globals()
  _G.seen, _G.calls = { 1 }, 1
  equal(of_globals(), first, "what it writes is no part of it")
  _G.scale = 3
  local second = of_globals()
  is(second ~= first, "a global changed")
  _G.half = function(x) return x / 2 + 1 end
  is(of_globals() ~= second, "a global function changed")
  _G.seen, _G.calls, _G.scale, _G.half = nil
  equal(id_of("local scale = 2\nreturn function(p)\n  return { loss = scale }\nend", { output_dir = "elsewhere", experiment_name = "x" }), id)
end)

test("sweep: a failed point keeps its error, the others go on, retry runs it again", function()
  local function made() return moe.sweep { name = "fails", base = base, grid = { seed = { 1, 2, 3 } }, fn = function(p)
    if p.values.seed == 2 and not moe.fs.exists(p.values.seed .. "") and not rawget(_G, "mended") then moe.zeros { -1 } end
    if p.values.seed == 3 then error "plain" end
    return { loss = 0 / 0, high = math.huge, seed = "kept" }
  end } end
  local s = made():run()
  equal(statuses(s), "done failed failed")
  local p = made():points()
  equal(p[2].error.kind, "shape")
  contains(p[2].error.text, "got [-1]")
  contains(p[2].error.where, "sweep.lua:")
  contains(p[2].error.traceback, "stack traceback")
  equal(p[3].error.kind, "lua")
  contains(p[3].error.text, "plain")
  is(p[1].result.loss ~= p[1].result.loss, "nan is kept")
  equal(p[1].result.high, math.huge)
  equal(statuses(made():run()), "done failed failed")
  _G.mended = true
  equal(statuses(made():run { retry = true }), "done done failed")
  _G.mended = nil
  equal(#s:table "failed", 2)
  contains(tostring(s:table()), "plain")
end)

test("sweep: the default trains each point and tells its losses", function()
  local s = moe.sweep { name = "trains", base = base, grid = { seed = { 1, 2 } } }:run()
  local p = s:points()[1]
  equal(p.status, "done", p.error and p.error.text)
  equal(p.result.steps, 4)
  equal(p.result.tokens, 4 * 4 * 32)
  is(moe.fs.exists(p.result.folder .. "/metrics"), "no log in " .. p.result.folder)
  local run <close> = moe.run { config = p.config:with { output_dir = folder .. "/alone" }, console = false }
  local m = run:train()
  equal(p.result.loss, m.loss)                    -- the last tenth of 4 steps is the last one
  equal(p.result.validation_loss, run:evaluate().loss)
  equal(s:metric(), "validation_loss")
  for name, v in pairs(p.result) do                -- whatever it tells may be asked for before it has run
    if type(v) == "number" then equal(#moe.sweep { name = "asked", base = base, metric = name, grid = { seed = { 1 } } }, 1) end
  end
end)

test("sweep: a misspelt result is found before the first point where the sweep trains, else when the first point has ended", function()
  local GRID = { seed = { 1, 2, 3 } }
  local function trains(more, of)
    return function()
      local given = { name = "names", base = of or base, grid = GRID }
      for key, v in pairs(more) do given[key] = v end
      return moe.sweep(given)
    end
  end
  raises("usage", trains { metric = "validation_los" }, "moe.sweep: metric", 'did you mean "validation_loss"?', "one of drop_rate, loss, maxvio")
  raises("usage", trains { halving = { budgets = { 1, 2 }, by = "maxvo" } }, "halving: by", 'did you mean "maxvio"?')
  raises("usage", trains({ metric = "validation_loss" }, base:with { validation = { enabled = false } }), "validation = { enabled = true }")
  local s = trains {}()
  raises("usage", function() s:agg { "los" } end, "sweep:agg", 'did you mean "loss"?')
  raises("usage", function() s:plot { y = "los" } end, 'did you mean "loss"?')
  raises("usage", function() s:report { metrics = { "los" } } end, 'did you mean "loss"?')
  raises("usage", function() s:report { plots = { { y = "los" } } } end, 'did you mean "loss"?')
  raises("state", function() s:agg { "loss" } end, "a point that is done")
  for _, jobs in ipairs { 0, 2 } do
    local function made(metric, halving) return moe.sweep { name = "names" .. jobs, base = base, metric = metric, halving = halving, grid = GRID, fn = function(p) return { score = p.values.seed, text = "x" } end } end
    raises("usage", function() made("scor"):run { jobs = jobs } end, "moe.sweep: metric", 'did you mean "score"?', "one of score")
    local after = statuses(made "score")
    is(after:find "done" and after:find " waiting$", after)
    raises("usage", function() made "scor" end, 'did you mean "score"?')        -- known by now
    equal(statuses(made("score"):run { jobs = jobs }), "done done done")
    raises("usage", function() made(nil, { budgets = { 1, 2 } }):run { jobs = jobs } end, "halving: by", '"loss"', "one of score")
  end
end)

test("sweep: halving gives the larger budget to the better half", function()
  local function made() return moe.sweep { name = "halving", base = base, grid = { [LR] = { 4e-3, 1e-3, 3e-3, 2e-3 }, seed = { 1, 2 } },
    halving = { budgets = { 2, 4, 8 }, keep = 0.5, by = "loss" },
    fn = function(p)
      -- By its seed alone 1 of 4e-3 would win.
      local luck = (p.values[LR] == 4e-3 and p.values.seed == 1) and -3e-3 or 0
      return { loss = p.values[LR] + luck, steps = p.config.training.train_steps }
    end } end
  local s = made():run()
  local by_budget = {}
  for _, p in ipairs(s:points()) do
    equal(p.status, "done")
    equal(p.result.steps, p.budget)
    local list = by_budget[p.budget] or {}
    by_budget[p.budget] = list
    list[#list + 1] = ("%g/%d"):format(p.values[LR], p.values.seed)
  end
  equal(table.concat(by_budget[2], " "), "0.004/1 0.004/2 0.001/1 0.001/2 0.003/1 0.003/2 0.002/1 0.002/2")
  equal(table.concat(by_budget[4], " "), "0.001/1 0.001/2 0.002/1 0.002/2")
  equal(table.concat(by_budget[8], " "), "0.001/1 0.001/2")
  equal(#made(), 14)                               -- a later session knows the rounds again
end)

test("sweep: halving takes what is not finite for the worst, whichever way is better", function()
  for _, largest in ipairs { false, true } do
    local odd = { [1e-3] = 0 / 0, [2e-3] = math.huge, [3e-3] = -math.huge, [4e-3] = 5 }
    local s = moe.sweep { name = "odd_halving", base = base, metric = "score", grid = { [LR] = { 1e-3, 2e-3, 3e-3, 4e-3 } }, halving = { budgets = { 2, 4 }, keep = 0.25, by = "score", largest = largest },
      fn = function(p) return { score = odd[p.values[LR]], way = largest } end }:run()
    equal(#s, 5)
    equal(s:points()[5].values[LR], 4e-3)
  end
end)

test("sweep: a point that diverges is nan in its file, tables and report, and no part of means and of n", function()
  local s = moe.sweep { name = "diverges", base = base:with { training = { train_steps = 3 }, validation = { enabled = false } }, grid = { [LR] = { 1e-3, 1e30 }, seed = { 1, 2 } } }:run()
  equal(statuses(s), "done done done done")
  equal(moe.json.decode(moe.fs.read(s:points()[3].path)).result.loss, "nan")
  local again = moe.sweep { name = "diverges", base = base:with { training = { train_steps = 3 }, validation = { enabled = false } }, grid = { [LR] = { 1e-3, 1e30 }, seed = { 1, 2 } } }
  for _, i in ipairs { 3, 4 } do is(again:points()[i].result.loss ~= again:points()[i].result.loss, "nan is read back") end
  is(tostring(s:table()):find "1e%+30 +2 [^\n]* nan\n?", tostring(s:table()))
  local a = s:agg()
  is(a[1].n == 2 and a[2].n == 0 and a[2].loss ~= a[2].loss and a[2].loss_std == nil, tostring(a))
  local text = moe.fs.read(s:report())
  contains(text, "2 of 4 points did not stay finite")
  is(text:find "\n| 1e%+30 | nan | nan | [^|]+ %(n = 2%) | 0 |\n", text)
end)

test("sweep: means are over the finite points, and a report of none has no picture", function()
  local function made(name, values) return moe.sweep { name = name, base = base, grid = { [LR] = { 1e-3, 2e-3 }, seed = { 1, 2, 3 } }, fn = function(p) return { loss = values[p.values.seed], other = 1 } end }:run() end
  local s = made("partly", { 2, 0 / 0, 4 })
  local a = s:agg { "loss", "other" }
  is(a[1].loss == 3 and a[1].n == 2 and a[1].other_n == 3 and a[1].loss_n == 2, tostring(a))
  near(a[1].loss_std, math.sqrt(2), 1e-12)
  contains(moe.fs.read(s:report()), "2 of 6 points did not stay finite")
  local none = moe.fs.read(made("nowhere", { 0 / 0, math.huge, -math.huge }):report())
  contains(none, "6 of 6 points did not stay finite")
  is(not none:find("report-1.svg", 1, true))
  is(not moe.fs.read(made("everywhere", { 1, 2, 3 }):report()):find "stay finite")
end)

test("sweep: processes run a function with all that it holds on to", function()
  local factor, names = 3, { "a", "b", odd = { true } }
  local function helper(x) return x * factor end
  function user_global(x) return x + 1 end
  local s = moe.sweep { name = "jobs", base = base, grid = { seed = { 1, 2, 3 } }, fn = function(p, options)
    if p.values.seed == 3 then os.exit(7) end
    local run <close> = moe.run(options)
    run:train(1)
    return { value = user_global(helper(p.values.seed)), name = names[p.values.seed], odd = names.odd[1], steps = run.step, name_is_id = options.name == p.id, mean = moe.statistics.mean { 1, base.seed } }
  end }
  s:run { jobs = 2 }
  local p = s:points()
  equal(statuses(s), "done done failed", p[1].error and p[1].error.text)
  equal(p[1].result.value, 4)
  equal(p[2].result.value, 7)
  equal(p[2].result.name, "b")
  equal(p[1].result.odd, true)
  equal(p[1].result.steps, 1)
  equal(p[1].result.name_is_id, true)
  equal(p[1].result.mean, (1 + base.seed) / 2)
  contains(p[3].error.text, "code 7")
  _G.user_global = nil
end)

test("sweep: a point on two ranks is that of one", function()
  if not moe.mpi_plugin() or not moe.execute({ "mpirun", "--version" }).found then
    print("skipped: no MPI plugin beside this program")
    return
  end
  local two = moe.sweep { name = "ranks", base = base, seeds = 1, ranks = 2 }
  raises("usage", function() two:run { jobs = 0 } end, "ranks = 2")
  local p, alone = two:run():points()[1], moe.sweep { name = "ranks", base = base, seeds = 1 }:run():points()[1]
  equal(p.status, "done", p.error and p.error.text)
  is(p.id ~= alone.id)
  near(p.result.loss, alone.result.loss, 1e-4)
end)

test("sweep: what cannot be sent to a process is said by its name", function()
  local tensor = moe.zeros { 2 }
  local s = moe.sweep { name = "tensor", base = base, grid = { seed = { 1 } }, fn = function() return { loss = tensor:sum():item() } end }
  raises("usage", function() s:run { jobs = 1 } end, "'tensor'")
  equal(s:run():points()[1].result.loss, 0)
end)

test("sweep: an interrupt leaves what is done and the next call goes on, here and with processes", function()
  for _, jobs in ipairs { 0, 2 } do
    local name, ready, script = "stop" .. jobs, folder .. "/ready", folder .. "/stop.lua"
    moe.fs.write(script, ([[
      local ready = %q
      local s = moe.sweep { name = %q, base = %q, output_dir = %q, grid = { seed = { 1, 2, 3 } }, fn = function(p)
        if p.values.seed > 1 and not moe.fs.exists(ready .. "2") then
          -- With two processes the third point starts when the first has ended.
          if p.values.seed == 3 or %d == 0 then moe.fs.write(ready, "") end
          while true do moe.sleep(0.01) end
        end
        return { loss = p.values.seed }
      end }
      s:run { jobs = %d }
    ]]):format(ready, name, folder .. "/base.json", folder .. "/runs", jobs, jobs))
    base:save(folder .. "/base.json")
    moe.fs.remove(ready .. "2")
    local out, code = check.interrupted(script, ready)
    equal(code, 130, out)
    local done = 0
    for _, file in ipairs(moe.fs.list(folder .. "/runs/" .. name .. "/points")) do
      local p = moe.json.decode(moe.fs.read(file))
      if p.status == "done" then done = done + 1 else equal(p.status, "waiting") end
    end
    is(done >= 1 and done < 3, done .. " done")
    moe.fs.write(ready .. "2", "")
    out, code = check.moelab("run '" .. script .. "'")
    equal(code, 0, out)
    contains(out, ("%d done, 0 failed, %d to run"):format(done, 3 - done))
    for _, file in ipairs(moe.fs.list(folder .. "/runs/" .. name .. "/points")) do equal(moe.json.decode(moe.fs.read(file)).status, "done") end
  end
end)

test("sweep: prints the state of its points, the results with the metric last, and the report's path", function()
  local s = moe.sweep { name = "printed", base = base, grid = { seed = { 1, 2 } }, fn = function(p) if p.values.seed == 2 then error "bad" end return { loss = 0.5, zeta = 3 } end }
  equal(tostring(s), "sweep printed: 2 points, 0 done, 0 failed, 2 to run")
  equal(tostring(s:run()):match("^[^\n]*"), s:status())
  local text = tostring(s)
  is(text:find("\nid +status +seed +secs +zeta +loss +error\n"), text)
  is(text:find("done +1 .* 3 +0.5\n") and text:find("failed +2 .*bad\n"), text)
  contains(text, "\nno report yet: :report() writes " .. s.folder .. "/report.md")
  s:report()
  contains(tostring(s), "\nreport: " .. s.folder .. "/report.md")
end)

test("sweep: tables, groups, means with Student's interval", function()
  local s = moe.sweep { name = "tables", base = base, grid = { seed = { 1, 2, 4 }, [LR] = { 1e-3, 2e-3 } }, fn = function(p) return { loss = p.values.seed * p.values[LR], text = "x" } end }:run()
  local t = s:table()
  equal(#t, 6)
  equal(t[2].loss, 2e-3)
  equal(#s:table "waiting", 0)
  local a = s:agg()
  equal(#a, 2)
  near(a[1].loss, 7e-3 / 3, 1e-12)
  -- By hand: sample variance of 1, 2, 4 is 7/3; t of 2 degrees of freedom at 95 % is 4.302653.
  near(a[1].loss_std, math.sqrt(7 / 3) * 1e-3, 1e-12)
  near(a[1].loss_ci, 4.302653 * math.sqrt(7 / 3) / math.sqrt(3) * 1e-3, 1e-8)
  equal(a[1].n, 3)
  local g = s:group { "seed" }:agg { "loss", worst = { "loss", "max" }, count = { "loss", function(v) return #v end } }
  equal(#g, 3)
  equal(g[3].worst, 8e-3)
  equal(g[3].count, 2)
end)

test("sweep: pictures and a report with what was varied, results, failures, commit and time", function()
  local s = moe.sweep { name = "report", about = "Does it matter?", base = base, grid = { seed = { 1, 2 }, [LR] = { 1e-3, 1e-1 }, ["model.moe.num_experts"] = { 4, 8 } },
    fn = function(p)
      if p.values.seed == 2 and p.values[LR] == 0.1 and p.values["model.moe.num_experts"] == 8 then error "too hot" end
      return { loss = p.values[LR] + p.values.seed }
    end }
  raises("state", function() s:report() end, "a point that is done")
  raises("usage", function() s:report { metric = "loss" } end, 'did you mean "metrics"?')
  s:run()
  local picture = s:plot { x = LR, by = "model.moe.num_experts" }
  contains(picture.svg, "learning_rate")
  contains(picture.svg, "num_experts 8")
  contains(s:plot({ x = LR, by = "model.moe.num_experts", categories = true }).svg, "learning_rate")
  local path = s:report()
  equal(path, s.folder .. "/report.md")
  local text = moe.fs.read(path)
  for _, part in ipairs { "# report", "Does it matter?", "7 points done, 1 failed", moe.commit, moe.torch_version, "| model.moe.num_experts | 4 | 4, 8 |", "too hot", "training.seq_length", "±", "report-1.svg", "sweep.lua" } do contains(text, part) end
  is(moe.fs.exists(s.folder .. "/report-1.svg"))
  is(moe.fs.exists(s.folder .. "/script.lua"))
  raises("usage", function() s:report { path = folder .. "/x.txt" } end)
  raises("usage", function() s:plot { xx = 1 } end, 'did you mean "x"?')
end)

test("sweep: points by names are drawn too, and a base made by a function of the values", function()
  local s = moe.sweep { name = "made", base = function(v) return base:with { model = { moe = { num_experts = v.size == "large" and 8 or 4 } } } end,
    list = { { size = "small" }, { size = "large" } }, seeds = 2, fn = function(p) return { loss = p.config.model.moe.num_experts, seed = p.config.seed } end }:run()
  equal(#s, 4)
  equal(s:points()[4].result.seed, 2)
  equal(s:points()[3].result.loss, 8)
  contains(s:plot().svg, "large")
  contains(moe.fs.read(s:report()), "made by a function")
end)

test("sweep: the command runs a file, shows it dry, and answers in JSON", function()
  local file = folder .. "/cmd.lua"
  moe.fs.write(file, ([[
    return moe.sweep { name = "cmd", base = %q, output_dir = %q, grid = { seed = { 1, 2, 3 } }, fn = function(p)
      if p.values.seed == 3 and not arg.options.fine then error "third" end
      return { loss = p.values.seed + (arg.options.more or 0), odd = 0 / 0 }
    end }]]):format(folder .. "/base.json", folder .. "/runs"))
  base:save(folder .. "/base.json")
  local out, code = check.moelab("sweep '" .. file .. "' --dry-run")
  equal(code, 0, out)
  contains(out, "waiting")
  is(not moe.fs.exists(folder .. "/runs/cmd"))
  out, code = check.moelab("sweep '" .. file .. "' more=10 --json")
  equal(code, 1, out)
  local first = moe.json.decode(out:match("^[^\n]*"))
  equal(first.sweep, "cmd")
  equal(first.points[2].result.loss, 12)
  equal(first.points[2].result.odd, "nan")
  contains(first.points[3].error, "third")
  out, code = check.moelab("sweep '" .. file .. "' --retry --jobs 2 fine=true")
  equal(code, 0, out)
  contains(out, "report.md")
  contains(out, "3 done, 0 failed")
  for line, part in pairs { ["sweep"] = "no file", ["sweep '" .. folder .. "/none.lua'"] = "none.lua", ["sweep '" .. file .. "' --job 2"] = "--jobs" } do
    out, code = check.moelab(line)
    is(code ~= 0, line)
    contains(out, part)
  end
  moe.fs.write(file, ([[
    local s = moe.sweep { name = "runs", base = %q, output_dir = %q, seeds = 2, fn = function(p) return { loss = 1 } end }
    s:run()
    print(s:agg()[1].loss)]]):format(folder .. "/base.json", folder .. "/runs"))
  out, code = check.moelab("sweep '" .. file .. "' --dry-run")
  equal(code, 0, out)
  contains(out, "waiting")
  moe.fs.write(file, "return 3")
  out, code = check.moelab("sweep '" .. file .. "'")
  equal(code, 2, out)
  contains(out, "a file without a sweep")
end)

test("sweep: bad input is an error object each, before anything runs", function()
  local function made(more)
    return function()
      local given = { name = "bad", base = base, fn = square, grid = { seed = { 1 } } }
      for key, v in pairs(more) do given[key] = v ~= moe.null and v or nil end
      moe.sweep(given)
    end
  end
  raises("usage", function() moe.sweep() end)
  raises("usage", made { gird = {} }, 'did you mean "grid"?')
  raises("usage", made { name = "a/b" })
  raises("usage", made { name = 3 })
  raises("usage", made { base = moe.null }, "base")
  raises("config", made { base = "tinny" }, "tiny")
  raises("usage", made { fn = 3 })
  raises("usage", made { fn = moe.zeros })
  raises("usage", made { grid = { seed = {} } }, "no values")
  raises("usage", made { grid = { seed = 3 } })
  raises("usage", made { grid = { seed = { print } } })
  raises("usage", made { grid = { 1, 2 } })
  raises("config", made { grid = { ["training.learning_rat"] = { 1 } } }, "learning_rate")
  raises("config", made { grid = { seed = { 1, "x" } } }, "seed x")
  raises("config", made { grid = { ["model.moe.num_experts_per_token"] = { 2, 99, 98 } } }, "2 points that cannot run")
  raises("usage", made { list = { { seed = 2 } } }, "twice")
  raises("usage", made { list = { 3 } })
  raises("usage", made { seeds = 0 })
  raises("usage", made { seeds = 2 }, "twice")
  raises("usage", made { random = { n = 0, space = {} } })
  raises("usage", made { random = { n = 2, space = { [LR] = { 3, 1 } } } })
  raises("usage", made { random = { n = 2, space = { [LR] = { 0, 1, log = true } } } })
  raises("usage", made { random = { n = 2, space = { [LR] = { 1, 2, lgo = true } } } }, 'did you mean "log"?')
  raises("usage", made { halving = { budgets = { 3, 2 } } })
  raises("usage", made { halving = { budgets = { 1, 2 }, keep = 2 } })
  raises("usage", made { ranks = 0 })
  local s = moe.sweep { name = "bad", base = base, fn = square, grid = { seed = { 1 }, [LR] = { 1e-3 } } }
  raises("usage", function() s:run { job = 2 } end, 'did you mean "jobs"?')
  raises("usage", function() s:run { jobs = -1 } end)
  raises("usage", function() s:run { jobs = 1.5 } end)
  raises("config", function() s:submit {} end, "clusters")
  raises("usage", function() s:tabel() end, 'did you mean "table"?')
  raises("usage", function() s:table "all" end)
  raises("usage", function() s:group { "x" } end)
  local function empty() end
  local nothing = moe.sweep { name = "nothing", base = base, fn = empty, grid = { seed = { 1 } } }:run()
  contains(nothing:points()[1].error.text, "no result")
  local tensor = moe.sweep { name = "unkept", base = base, fn = function() return { x = { y = moe.zeros { 3 } } } end, grid = { seed = { 1 } } }:run()
  contains(tensor:points()[1].error.text, "result.x.y")
  moe.fs.write(nothing:points()[1].path, "{ torn")
  raises("data", function() moe.sweep { name = "nothing", base = base, fn = empty, grid = { seed = { 1 } } } end, ".json")
end)

check.done()
