-- A run under control: keys, callbacks, restore, jobs.
local check = dofile(arg[0]:match("^(.*)/") .. "/lib/check.lua")
local test, equal, near, is, raises, contains = check.test, check.equal, check.near, check.is, check.raises, check.contains

local folder = check.folder()
local small = dofile(arg[0]:match("^(.*)/") .. "/lib/small_run.lua")(check, folder)
local cfg, fresh, weights, same, must_equal, counts = small.cfg, small.fresh, small.weights, small.same, small.must_equal, small.counts

test("run: keys change between steps, by name, path and section", function()
  local run = fresh()
  local h = run:set { learning_rate = 1e-4 }
  run:set { ["training.grad_clip"] = 0.5, training = { global_batch_size = 2 } }
  equal(run.config.training.learning_rate, 1e-4)
  equal(run.config.training.grad_clip, 0.5)
  run:train(1)
  equal(run:counts()[1]:sum():item(), 2 * 32 * 2)
  h:undo()
  equal(run.config.training.learning_rate, 3e-3)
  raises("usage", function() run:set { learnin_rate = 1 } end, "learnin_rate")
  raises("usage", function() run:set { lr = 1 } end, "run.lr = … sets it")
  raises("usage", function() run:set { data = { web = 1 } } end, "got web, want a run whose data.sources name its domains")
  raises("usage", function() run:set { model = { num_layers = 4 } } end, "model.num_layers")
  raises("config", function() run:set { learning_rate = -1 } end)
  raises("config", function() run:set { global_batch_size = 3 } end)
  raises("usage", function() run:set {} end)
  run:train(1)
  equal(run.step, 2)
end)

test("run: the learning rate is held, scheduled, and given back", function()
  local run = fresh()
  local own = run.lr
  run.lr = 1e-4
  near(run.lr, 1e-4)
  near(run:train(1).lr, 1e-4)
  run.lr = nil
  run.schedule = function(step) return step * 1e-5 end
  near(run:train(1).lr, 2e-5, 1e-12)
  local set = run.schedule
  near(set(7), 7e-5, 1e-12)
  run.schedule = nil
  equal(run.schedule, run.config.training.lr_decay_style)
  is(run:train(1).lr > 2e-3)
  run.schedule = set                                  -- what was read can be set again
  run.schedule = nil
  for _, key in ipairs { "schedule", "optimizer", "data" } do run[key] = run[key] end
  equal(run.schedule, run.config.training.lr_decay_style)
  raises("usage", function() run.schedule = "linear" end, 'got "linear"')
  run.schedule = set
  near(run.lr, 4e-5, 1e-12)
  run:undo()
  raises("usage", function() run.lr = "x" end, 'run.lr = …: lr: got "x"')
  raises("usage", function() run.lr = -1 end)
  raises("usage", function() run.learning_rate = 1 end)
  run.schedule = function(step) return nil end
  raises("usage", function() run:train(1) end, "run.schedule, ", "at step 4: ")
  equal(run.step, 3)
  run:undo()
  run:train(1)
end)

test("run: an error in a callback ends training at a step edge, and the run goes on", function()
  local a, b = fresh(), fresh()
  local here = "control.lua:" .. debug.getinfo(1, "l").currentline + 1
  a:every(2, function(m) if m.step == 2 then error("enough") end end)
  local err = raises("lua", function() a:train(5) end, "callback 1: every 2 steps, ", here, "at step 2: enough")
  is(err.where:find(here .. "$"), err.where)
  equal(select(2, err.traceback:gsub("stack traceback:", "")), 1, err.traceback)
  equal(a.step, 2)
  a:train(2) b:train(4)
  must_equal(a, b)
end)

test("run: what a callback does may not call it again", function()
  local run = fresh()
  local on = run:on("step", function() run:train(1) end)
  raises("state", function() run:train(3) end, "callback 1: on step", "at step 1: run:train: got a call from a callback of \"step\"")
  equal(run.step, 1)
  on:off()
  on = run:on("step", function() for _ in run:steps(1) do end end)
  raises("state", function() run:train(3) end, "a call from a callback of \"step\"")
  equal(run.step, 2)
  on:off()
  run:on("save", function() run:save(folder .. "/again") end)
  raises("state", function() run:save(folder .. "/once") end, "run:save: got a call from a callback of \"save\"")
  is(moe.fs.exists(folder .. "/once") and not moe.fs.exists(folder .. "/again"))
  run:on("evaluate", function() run:evaluate() end)
  raises("state", function() run:evaluate() end, "run:evaluate: got a call")
  equal(run:train(1).step, 3)
  local job
  on = run:on("step", function() job = run:start(1) job:wait() end)
  raises("state", function() run:train(1) end, "job:wait: got a callback, for whose end the job waits")
  on:off()
  is(job:wait())
  equal(run.step, 5)
end)

test("run: what a callback refuses in its own thread, others may do", function()
  local run = fresh()
  local slow = run:on("step", function() moe.sleep(0.3) end)
  local job = run:start(2)
  while run.step < 1 do moe.sleep(0.001) end
  job:pause()
  slow:off()
  while not pcall(run.train, run, 1) do moe.sleep(0.001) end
  job:resume()
  job:wait()
  equal(run.step, 3)
end)

test("run: callbacks end by their handle, by the run, with a scope, and from inside", function()
  local run, calls = fresh(), {}
  local function call(name) return function() calls[name] = (calls[name] or 0) + 1 end end
  local a, b = run:every(2, call "a"), run:on("step", call "b")
  contains(run, "\n  callback 1: every 2 steps, ") contains(run, "\n  callback 2: on step, ")
  is(b.active)
  run:train(2)
  b:off()
  b:off()
  is(not b.active)
  contains(b, "(off)")
  do
    local _ <close> = run:every(1, call "scope")
    run:train(2)
  end
  local c, d
  c = run:on("step", function() call "c" () c:off() d:off() end)
  d = run:on("step", call "d")
  run:train(2)
  run:off(a)
  run:train(2)
  equal(calls.a, 3) equal(calls.b, 2) equal(calls.scope, 2) equal(calls.c, 1) equal(calls.d, nil)
  is(not tostring(run):find("callback"))
  raises("usage", function() run:off("step") end, "a callback")
  raises("usage", function() fresh():off(a) end, "another run")
end)

test("run: spike and save are events", function()
  local run = fresh()
  local spikes, saves = {}, {}
  run:on("spike", function(m) spikes[#spikes + 1] = m.step end)
  run:on("save", function(s) saves[#saves + 1] = s.step end)
  run:train(14)
  equal(#spikes, 0)
  run.model:set("lm_head.weight", run.model:parameters()["lm_head.weight"] * 0 + moe.randn({ 264, 32 }, { device = run.model.device }) * 20)
  run:train(1)
  equal(spikes[1], 15)
  local path = folder .. "/there"
  run:save(path)
  equal(saves[1], 15)
  raises("usage", function() run:on("spikes", print) end, "spikes")
end)

test("run: restored in place it is what it was, interventions and keys included", function()
  local run, other = fresh { log = true, name = "restored" }, fresh()
  run.model.router:mask { layer = 1, expert = 2 } other.model.router:mask { layer = 1, expert = 2 }
  run:train(2) other:train(4)
  run:save("two")
  run:set { learning_rate = 1, global_batch_size = 8 }
  run.model.router:swap { layer = 1, experts = { 0, 1 } }
  run:undo()
  run:undo()
  run.model.router:ablate { layer = 2, expert = 1 }
  run:train(3)
  run:restore("two")
  equal(run.step, 2)
  equal(run.config.training.learning_rate, 3e-3)
  is(not tostring(run.model.router):find("ablate"))
  run:train(2)
  must_equal(run, other)
  equal(run.events[#run.events].event, "restore")
  raises("io", function() run:restore("three") end)
  run:train(1)
end)

test("run: the mixture's weights change for what comes", function()
  for _, name in ipairs { "a", "b" } do
    moe.fs.mkdir(folder .. "/text/" .. name)
    local f = io.open(folder .. "/text/" .. name .. "/x.txt", "w")
    f:write((name:rep(60) .. "\n"):rep(400))
    f:close()
  end
  local run = fresh { config = cfg:with { data = { dataset_type = "text", sources = { { name = "a", path = folder .. "/text/a", weight = 0.5 }, { name = "b", path = folder .. "/text/b", weight = 0.5 } } } } }
  run:train(4)
  run:set { data = { a = 1, b = 0 } }
  run:train(1)
  local c = run:counts { by = "domain" }
  equal(c[1][1]:sum():item(), 0)
  raises("usage", function() run:set { data = { c = 1 } } end, "c")
  run:undo()
  run:train(2)
  is(run:counts { by = "domain" }[1][1]:sum():item() > 0)
end)

-- --- jobs ---

test("job: trains in the background to the same weights", function()
  local a, b = fresh(), fresh()
  local job = a:start(6)
  local sum = 0
  for i = 1, 1e5 do sum = sum + i end
  local m = job:wait()
  equal(m.step, 6)
  equal(job:status(), "done")
  equal(job.step, 6) equal(job.steps_left, 0) equal(job.error, nil)
  b:train(6)
  must_equal(a, b)
end)

test("job: pauses, goes on, stops; meanwhile the run is trained by nobody else", function()
  local run = fresh()
  local job = run:start(10000)
  raises("state", function() run:train(1) end, "job")
  raises("state", function() run:start(1) end, "job")
  job:pause()
  equal(job:status(), "paused")
  raises("state", function() job:wait() end, "paused")
  while not pcall(run.train, run, 1) do end
  local at = run.step
  run:train(2)
  equal(run.step, at + 2)
  job:resume()
  equal(job:wait { timeout = 0.05 }, nil)
  job:stop()
  equal(job:status(), "stopped")
  is(job.steps_left > 0)
  run:train(1)
end)

test("job: interventions wait for the step edge, callbacks are called between inputs", function()
  local run = fresh()
  local steps, on = {}, true
  run:on("step", function(m) steps[#steps + 1] = m.step end)
  local job = run:start(2000)
  while job.step < 3 do local _ = run.model:bias(1) end
  local h = run.model.router:mask { layer = 1, expert = 0 }
  local from = run.step
  while job.step < from + 3 do local _ <close> = run.model.router:override { layer = 2, top_k = 1 } end
  equal(run:counts()[1][0]:item(), 0)
  h:undo()
  job:stop { now = true }
  for i, step in ipairs(steps) do equal(step, i) end
  must_equal(run, moe.replay(run, { console = false, log = false }))
end)

test("job: hooks and an error in one; the run goes on", function()
  local run = fresh()
  local h = run.model.router:hook("pre_topk", function(s) if s.step == 3 then error("in the job") end return s.scores end)
  local job = run:start(10)
  local err = raises("lua", function() job:wait() end, "in the job")
  equal(job:status(), "failed")
  equal(run.step, 3)
  is(job.error.traceback)
  h:undo()
  run:train(1)
  run:on("step", function(m) if m.step == 6 then error("a callback") end end)
  raises("lua", function() run:start(10):wait() end, "a callback")
  equal(run.step, 6)
  run:train(1)
end)

test("job: the log line of its last step is printed when it ends, once", function()
  local script = folder .. "/last_line.lua"
  moe.fs.write(script, ([[
    local run = moe.run { config = dofile("%s/lib/small_run.lua")({}, "%s").cfg, log = false }
    local job = run:start(3)
    while job:status() == "running" do moe.sleep(0.005) end
    print("ended")
    job:wait()
    run:start(7):wait()
    job = run:start(5000)
    while job.step < 12 do end
    job:stop()
    print("stopped at", job.step)]]):format(arg[0]:match("^(.*)/"), folder))
  local out, code = check.moelab(("run '%s'"):format(script))
  equal(code, 0, out)
  is(out:find("^step: 1 loss[^\n]*\nstep: 3 loss[^\n]*\nended\nstep: 10 loss[^\n]*\n"), out)
  equal(select(2, out:gsub("step: 10 ", "")), 1, out)
  local last, at = out:match("\nstep: (%d+) loss[^\n]*\nstopped at\t(%d+)\n$")
  equal(last, at, out)
end)

test("job: a run that it trains is not closed under it", function()
  local run = fresh()
  local job = run:start(100000)
  raises("state", function() run:close() end, "run:close: got a run that a job trains", "job:stop() first")
  job:stop()
  run:close()
  raises("state", function() run.lr = 1e-3 end, "run.lr: got a closed run")
end)

test("job: is ended with its run freed, or the session closed", function()
  local run = fresh()
  local job = run:start(5)
  run:free()
  job:wait()
  equal(job.step, 5)
  fresh():start(100000)      -- goes on until the end of this script
end)

-- --- parts in Lua ---

test("job: callbacks are called while the session waits for a process", function()
  local run, seen = fresh(), 0
  run:on("step", function() seen = seen + 1 end)
  local job = run:start(20)
  local process = moe.spawn { "sleep", "30" }
  local start = moe.clock()
  while job:status() == "running" and moe.clock() < start + 20 do process:wait { timeout_secs = 0.02 } end
  process:kill()
  equal(seen, 20)
end)

test("job: a program that ends by os.exit or an error ends its jobs first", function()
  local script = folder .. "/ends.lua"
  for ending, want in pairs { ["os.exit(3)"] = 3, ["os.exit(true, false)"] = 0, ["error 'no'"] = 1 } do
    moe.fs.write(script, ([[
      local check = {}
      local small = dofile("%s/lib/small_run.lua")(check, "%s")
      local run = small.fresh()
      run:on("step", function(m) setmetatable({}, { __gc = function() end }) end)
      run:start(100000)
      moe.sleep(0.02)
      %s]]):format(arg[0]:match("^(.*)/"), folder, ending))
    local out, code = check.moelab(("run '%s'"):format(script))
    equal(code, want, out)
  end
end)

test("job: what it was the last to hold is gone before the session ends", function()
  for _ = 1, 3 do
    local run = fresh()
    local job = run:start(3)
    job:free()
    run:free()
  end
  collectgarbage()
end)

test("parts: an operator of moe.autograd in a score trains in a job as in the foreground, and beside the session's own", function()
  local function with_operator()
    local run = fresh()
    run.model.router.score = function(logits)
      local twice = moe.autograd { forward = function(ctx, x) ctx.x = x return x * x end, backward = function(ctx, g) return 2 * g * ctx.x end }
      return twice(logits:sigmoid())
    end
    return run
  end
  local a, b = with_operator(), with_operator()
  if a.model.device ~= "cpu" then            -- backward runs on threads of the device's there, which cannot wait for Lua
    raises("state", function() a:train(1) end, "a thread that is not Lua's")
    return
  end
  local job = a:start(4)
  local cube = moe.autograd { forward = function(ctx, x) ctx.x = x return x ^ 3 end, backward = function(ctx, g) return g * 3 * ctx.x ^ 2 end }
  local count = 0
  repeat
    local x = moe.full({ 50 }, 2.0):requires_grad_()
    cube(x):sum():backward()
    is(x.grad:eq(12):all())
    count = count + 1
  until job:status() ~= "running"
  is(not job.error, tostring(job.error))
  b:train(4)
  must_equal(a, b)
  is(count > 1)
end)

test("parts: a router's score", function()
  local a, b = fresh { config = cfg:with { model = { moe = { scoring_func = "softmax" } } } }, fresh()
  b.model.router.score = function(logits) return logits:softmax(-1) end
  local x = moe.randn({ 7, 32 }, { device = moe.default_device() })
  near((a.model.layers[1].router:forward(x).weights - b.model.layers[1].router:forward(x).weights):abs():max():item(), 0, 1e-6)
  near(a:train(3).loss, b:train(3).loss, 1e-4)
  b.model.router.score = nil
  b:train(1)
  b.model.router.score = function(logits) return logits[0] end
  raises("shape", function() b:train(1) end, "router.score")
end)

test("parts: a data source", function()
  local run = moe.run { config = cfg, console = false, log = false, data = function(m)
    return moe.randint(0, 8, { m.sequences, m.seq_length })
  end }
  equal(run.data({ sequences = 2, seq_length = 3 }).shape[2], 3)
  local first = run:train(10).loss
  is(run:train(20).loss < first)
  equal(run:counts { by = "domain" }[1][1]:sum():item(), 0)
  must_equal(run, moe.replay(run, { console = false, log = false }))
  run.data = function(m) return moe.zeros { m.sequences, m.seq_length } end
  raises("usage", function() run:train(1) end, "run.data", "got ids float32 [")
  run.data = function(m) return moe.zeros({ 1, 1 }):to("int64") end
  raises("shape", function() run:train(1) end, "run.data")
  run.data = nil
  equal(run.data.dataset_type, "synthetic")
  run:train(1)
end)

test("parts: an optimizer's step, its state saved with the run", function()
  local plain = cfg:with { training = { optimizer = "sgd", momentum = 0.9, weight_decay = 0, learning_rate = 0.1, lr_warmup_steps = 0 } }
  local a, b = fresh { config = plain }, fresh { config = plain, log = true, name = "sgd" }
  b.optimizer = function(name, value, grad, state, m)
    state[1]:copy_(0.9 * state[1] + grad)
    return value - m.lr * state[1]
  end
  a:train(4) b:train(2)
  b:save("two")
  b = moe.resume("two", nil, { console = false })
  b:train(2)
  for name, value in pairs(weights(a)) do near((value - weights(b)[name]):abs():max():item(), 0, 1e-5, name) end
  b.optimizer = function() error "no" end
  local before = weights(b)
  raises("lua", function() b:train(1) end, "run.optimizer, ", ".weight, at update 5: no")
  is(same(before, weights(b)))
  b.optimizer = nil
  equal(b.optimizer, "sgd")
  b:train(1)
end)

check.done()
