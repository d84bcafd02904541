-- Scripts on four ranks: the same prints as on one, errors that arrive on all, inputs that act at the same step.
local ranks = dofile(arg[0]:match("^(.*)/") .. "/lib/ranks.lua")
local check, folder = ranks.check, ranks.folder
local test, equal, is, contains = check.test, check.equal, check.is, check.contains
local write, run_on, line_of = ranks.write, ranks.run, ranks.line_of

if not check.has_ranks("ranks") then return check.done() end

local plain = write("plain", [=[
  print(moe.randn { 2, 3 }, moe.arange(12):reshape { 3, 4 }:sum(1), moe.rand { 3 }:softmax(-1))
  for key, value in pairs { zebra = 1, ape = 2, cat = { 3 }, [3] = "three", [1] = "one", dog = true } do print(key, type(value) == "table" and #value or value) end
  print(math.random(1, 1 << 40), math.random(), moe.generator(7).initial_seed)
  local kept = {}
  for i = 1, 200 do kept["key" .. (i * 7919 % 1000)] = i end
  local order = {}
  for key in pairs(kept) do order[#order + 1] = key end
  print(table.concat(order, " "))
  print(moe.config("tiny"))
  local cfg = moe.config "cpu_tiny"
  print(cfg:params())
  local rows = {}
  for seed = 1, 3 do
    for _, k in ipairs { 1, 2 } do rows[#rows + 1] = { seed = seed, top_k = k, loss = 1 / (seed + k) + math.random() } end
  end
  print(moe.table(rows):group("top_k"):agg { loss = { "loss", "mean" } })
  print(moe.table(moe.commands()))
  local sweep = moe.sweep { name = "points", base = "cpu_tiny", output_dir = arg[1], fn = function(point) return { loss = point.index + math.random() } end,
    grid = { seed = { 1, 2 }, ["model.moe.num_experts_per_token"] = { 1, 2 } } }
  require "moe.sweep.session".quiet = true                    -- no times
  sweep:run()
  for i, row in ipairs(sweep:table()) do print(i, row.seed, row["model.moe.num_experts_per_token"], row.loss, row.status) end
  print(sweep:table():group("model.moe.num_experts_per_token"):agg { loss = { "loss", "mean" } })
  local a, t, none, tenth = moe.on(moe.num_ranks - 1, function(a) return a, { x = { 1, 2.5, "three" }, y = true }, nil, 0.1 end, "given")
  print(a, math.type(t.x[1]), t.x[2], t.x[3], t.y, none, tenth == 0.1)
  local now = os.time()
  assert(each(function() return now end) == (now .. " "):rep(moe.num_ranks):sub(1, -2), "ranks have other times")
  local name = os.tmpname()
  assert(not each(function() return name end):gsub(name, "", 1):gsub(" " .. name, ""):find("%S"), "ranks have other names")
  os.remove(name)
  math.randomseed()
  local drawn = math.random(1 << 60)
  for word in each(function() return drawn end):gmatch("%d+") do assert(word == tostring(drawn), "ranks draw other numbers after math.randomseed()") end
  print(pcall(moe.on, 9, print))
  all_said_the_same()
]=])

test("ranks: a script without training prints on four what it prints on one", function()
  local one, code_one = run_on(1, plain)
  local four, code_four = run_on(4, plain)
  equal(code_one, 0, one)
  equal(code_four, 0, four)
  is(#one > 2000, "little was printed")
  equal((four:gsub("0 to 3", "0 to 0")), one)
end)

local training = write("training", [=[
  local run = small()
  local m = run:train(2)
  print(("%d %.6f %.6f"):format(m.step, m.loss, m.grad_norm))
  print(run:evaluate { max_batches = 1 }.loss)
  for step, m in run:steps(2) do print(step, m.loss) end
  local h = run.model.router:mask { layer = 1, expert = 3 }
  print(run:train(1).loss, run:counts()[1])
  h:undo()
  run.lr = 1e-4
  print(run.lr, run.events)

  -- Rank 2 alone fails: in a callback, a hook, a data function, a learning rate, an argument; all ranks get it, and go on.
  local fails = true
  local before = run.step
  run:on("step", function() if fails and moe.rank == 2 then error("the callback of rank 2") end end)
  print("callback", shown(pcall(run.train, run, 3)), run.step - before)
  fails = false
  local hook = run.model.router:hook("pre_topk", function(s) if fails and moe.rank == 2 then error("the hook of rank 2") end return s.scores end, { replay = false })
  fails, before = true, run.step
  print("hook", shown(pcall(run.train, run, 3)), run.step - before)
  print("hook in evaluation", shown(pcall(run.evaluate, run)))
  fails = false
  print(run:train(1).step - before)
  hook:undo()
  run.lr = nil
  run.schedule = function(step) if moe.rank == 2 then return nil end return 1e-3 end
  print("schedule", shown(pcall(run.train, run, 1)))
  run:undo()
  run.data = function(m) if moe.rank == 2 then error("no data") end return moe.zeros({ m.sequences, m.seq_length }, { dtype = "int64" }) end
  print("data", shown(pcall(run.train, run, 1)))
  run:undo()
  print("moe.on", shown(pcall(moe.on, 2, function() moe.randn { 2 }:matmul(moe.randn { 3 }) end)))
  print("alone", shown(pcall(moe.on, 1, function() run:train(1) end)))
  local function value() if moe.rank == 2 then return 1 / 0 end return 1 end
  print("argument", shown(pcall(run.train, run, moe.rank == 2 and 5 or 4)))
  print("inside a callback", shown(pcall(function()
    local in_callback = true
    run:on("step", function() if in_callback then in_callback = false if moe.rank == 2 then error("before the save") end run:evaluate { max_batches = 1 } end end)
    run:train(1)
  end)))
  print("after all that", run:train(1).loss)

  -- Calls that differ, within seconds.
  local start = moe.clock()
  print("calls", shown(pcall(function() if moe.rank == 2 then run:eval() else run:train(1) end end)))
  print("time", shown(pcall(function() if moe.rank == 1 then os.time() else run:train(1) end end)))
  assert(moe.clock() - start < 10, "took " .. moe.clock() - start .. " s")
  print("all fail alike", shown(pcall(run.train, run, "many")))

  -- Experts on several ranks: a hook that fails in the middle of a step's collectives.
  local cut = small { distributed = { expert_parallel_size = 4 } }
  local wrong = true
  cut.model.router:hook("post_topk", function(s) if wrong and moe.rank == 2 then error("in the middle") end end, { replay = false })
  print("in the middle", shown(pcall(cut.train, cut, 2)), cut.step)
  wrong = false
  print(cut:train(1).loss)
  -- What a hook gives is wrong on one rank alone.
  local post = cut.model.router:hook("post_topk", function(s) if moe.rank == 2 then return s.ids:clone():fill_(1) end end, { replay = false })
  print("twice", shown(pcall(cut.train, cut, 1)))
  print("twice in loss", shown(pcall(cut.model.loss, cut.model, { { 1, 2, 3 } })))
  print("twice in a trace", shown(pcall(cut.model.trace, cut.model, { { 1, 2, 3, 4 }, { 1, 2, 3, 4 }, { 1, 2, 3, 4 }, { 1, 2, 3, 4 } })))
  post:undo()
  print("one layer", shown(pcall(function() if moe.rank == 1 then os.time() else cut.model.layers[1]:forward(moe.randn { 4, 16 }) end end)))
  print(cut.model.layers[1]:forward(moe.ones { 4, 16 }).shape)

  -- The same words first on all ranks, then on one of them.
  local who = "all"
  run:on("step", function() if who == "all" or moe.rank == who then error("the same words") end end)
  print("all say it", shown(pcall(run.train, run, 1)))
  who = 1
  print("one says it", shown(pcall(run.train, run, 1)))
  who = nil
  print("arguments", shown(pcall(function() run.model.router:mask { layer = 1, experts = { moe.rank } } end)))
  print("a long text", shown(pcall(function() run:save("no folder/" .. ("x"):rep(80) .. moe.rank) end)))
  local traced = run:trace { batches = 1 }
  print("saved trace", shown(pcall(function() if moe.rank == 2 then os.time() else traced:save("no folder/trace") end end)))
  print("load_hf", shown(pcall(function() if moe.rank == 2 then os.time() else moe.load_hf "no folder" end end)))
  print("cut model", shown(pcall(function() if moe.rank == 1 then os.time() else cut.model:loss { { 1, 2, 3 } } end end)))
  print("whole model", moe.on(1, function() return run.model:loss({ { 1, 2, 3 } }):item() end) > 0, cut.model:loss({ { 1, 2, 3 } }):item() > 0)
  all_said_the_same()
]=])

test("ranks: training prints the same twice, what one rank raises arrives on all, and the run goes on", function()
  local first, code = run_on(4, training)
  equal(code, 0, first)
  local has = function(name, text)
    local line = line_of(first, name)
    is(line, name .. " was not printed: " .. first)
    contains(line, text)
  end
  has("callback", "lua rank 2: callback 1: on step, ")
  has("callback", "at step 6: the callback of rank 2")
  has("callback", "traceback true\t1")
  has("hook", "lua rank 2: hook pre_topk, ")
  has("hook", "layer 1, at step 7: the hook of rank 2 |  | traceback true\t0")
  has("hook in evaluation", "layer 1, outside of training: the hook of rank 2")
  has("schedule", "rank 2: ")
  has("data", "lua rank 2: run.data, ")
  has("data", ": no data")
  has("moe.on", "shape rank 2: matmul: inner dims differ")
  has("alone", "state rank 1: run:train")
  has("argument", "dist rank 2: ranks at different places | ranks 0, 1, 3: run:train(4)")
  has("argument", "; rank 2: run:train(5)")
  has("inside a callback", "lua rank 2: callback 2: on step, ")
  has("inside a callback", "at step 8: before the save")
  has("calls", "ranks 0, 1, 3: run:train(1) at ")
  has("calls", "training.lua:")
  has("calls", "; rank 2: run:eval")
  has("time", "rank 1: os.time")
  has("all fail alike", "usage rank -1: ")
  has("in the middle", "lua rank 2: hook post_topk, ")
  has("in the middle", "at step 1: in the middle |  | traceback true\t0")
  has("twice", "usage rank 2: post_topk: ids, layer 1, at step 2 | an expert twice in a row")
  has("twice in loss", "usage rank 2: post_topk: ids, layer 1, outside of training | an expert twice in a row")
  has("twice in a trace", "usage rank 2: post_topk: ids, layer 1, outside of training | an expert twice in a row")
  has("one layer", "rank 1: os.time")
  has("all say it", "lua rank -1: callback 3: on step, ")
  has("one says it", "lua rank 1: callback 3: on step, ")
  has("arguments", "dist rank 1: ranks with different arguments")
  has("a long text", "dist rank 1: ranks with different arguments")
  has("saved trace", "trace:save(")
  has("load_hf", "moe.load_hf(")
  has("cut model", "ranks 0, 2, 3: model:loss(…) at ")
  has("whole model", "true\ttrue")
  equal(run_on(4, training), first)
end)

test("ranks: what one rank raises elsewhere ends the program on all, shown with its rank", function()
  local start = moe.clock()
  local text, code = run_on(4, write("alone", [=[
    local run = small()
    run:train(1)
    if moe.rank == 2 then error("only here") end
    run:train(1)
    print("not reached")
  ]=]))
  equal(code, 1, text)
  contains(line_of(text, "only here") or text, "error: [rank 2] only here")
  is(not text:find("not reached", 1, true), text)
  equal(select(2, text:gsub("only here", "")), 1, "how often it is shown")
  -- One that ends before the others, while these train; and one that fails while the others never come to a meeting.
  text, code = run_on(4, write("ends", [=[
    local run = small()
    if moe.rank == 2 then return end
    run:train(1)
  ]=]))
  equal(code, 1, text)
  contains(text, "ranks 0, 1, 3: run:train(1) at ")
  contains(text, "rank 2: the end of ")
  text, code = run_on(4, write("busy", [=[
    moe.on(0, function() end)
    if moe.rank == 2 then moe.fail { op = "mine", got = "nothing" } end
    while true do end
  ]=]))
  is(code ~= 0, text)
  contains(text, "error: [rank 2] mine: got nothing")
  is(moe.clock() - start < 45, "took " .. moe.clock() - start .. " s")
end)

local background = write("background", [=[
  local run, steps, rates, skipped = small { steps = 100000 }, {}, {}, {}
  run:on("step", function(m) steps[#steps + 1] = m.step rates[m.step] = m.lr end)
  local job = run:start(100000)
  -- Every rank comes at another time to each input.
  local function wait() moe.sleep(0.03 * ((moe.rank * 3 + 1) % 4)) end
  local function at() return each(function() return #steps end) end
  assert(1 + 1 == 2)
  wait() run.lr = 1e-4
  wait() run.lr = 2e-4
  local h = run.model.router:mask { layer = 1, expert = 0 }
  wait() h:undo()
  wait() job:pause()
  local paused = run.step
  assert(job:status() == "paused", job:status())
  assert(paused == job.step and at() == ((paused .. " "):rep(moe.num_ranks)):sub(1, -2), "paused at " .. paused .. ", steps " .. at())
  moe.sleep(0.1)
  assert(run.step == paused, "a step while paused")
  run.lr = 3e-4
  job:resume()
  wait()
  print("train meanwhile", shown(pcall(run.train, run, 1)))
  print("alone meanwhile", shown(pcall(moe.on, 1, function() return run.lr end)))
  print("status", job:status(), shown(pcall(function() if moe.rank == 3 then return job:status() end return run.lr end)))
  wait() run.lr = nil
  local seen
  run:on("step", function() if moe.rank == 2 then seen = run.step end end)
  moe.sleep(0.1)
  job:stop()
  if moe.rank == 2 then assert(seen and run.lr and run.step >= seen) end     -- once all know that it has ended, one may look alone
  print(job:status(), run.step == job.step, job.last.step == job.step)
  -- What each rank has seen at every step, and where the rate changed.
  local function history()
    local list, last = {}, nil
    for i, step in ipairs(steps) do
      assert(step == i)
      if rates[step] ~= last then list[#list + 1] = step .. ":" .. rates[step] last = rates[step] end
    end
    return table.concat(list, ",") .. " of " .. #steps
  end
  local first = moe.on(0, history)
  for r = 1, moe.num_ranks - 1 do assert(moe.on(r, history) == first, "rank " .. r .. ": " .. moe.on(r, history) .. ", rank 0: " .. first) end
  for _, rate in ipairs { "0.0001", "0.0002", "0.0003" } do assert(first:find(":" .. rate, 1, true), rate .. " is not in " .. first) end
  local events = {}
  for _, e in ipairs(run.events) do if e.event == "intervention" or e.event == "undo" then events[#events + 1] = e.step .. e.event end end
  for r = 0, moe.num_ranks - 1 do assert(moe.on(r, function() return table.concat(events, " ") end) == table.concat(events, " "), "other events on rank " .. r) end
  print("events", #events)
  -- A callback of one rank ends the job on all; the run goes on.
  local fails = true
  run:on("step", function() if fails and moe.rank == 2 then error("in the background") end end)
  job = run:start(5)
  print("callback", shown(pcall(job.wait, job)))
  print(job:status(), job.error.rank)
  fails = false
  print("goes on", run:train(1).step == run.step)
  -- And its end, with callbacks that need all ranks.
  local losses = {}
  run:every(1, function() losses[#losses + 1] = run:evaluate { max_batches = 1 }.loss end)
  print("waited", run:start(3):wait().step == run.step, #losses)
  all_said_the_same()
]=])

test("ranks: inputs while a job trains act at the same step on all", function()
  local text, code = run_on(4, background)
  equal(code, 0, text)
  contains(text, "train meanwhile\tstate rank -1: run:train | a run that a job trains")
  contains(text, "alone meanwhile\tstate rank 1: ")
  contains(text, "status\trunning\tdist rank 3: ranks at different places | ranks 0, 1, 2: ")
  contains(text, "stopped\ttrue\ttrue")
  contains(text, "events\t6")
  contains(text, "callback\tlua rank 2: callback 3: on step, ")
  contains(text, ": in the background")
  contains(text, "failed\t2")
  contains(text, "goes on\ttrue")
  contains(text, "waited\ttrue\t3")
end)

test("ranks: plain mode gives every input to all, and shows the errors of any", function()
  local input = folder .. "/input"
  moe.fs.write(input, [=[
mine = moe.rank + 1
moe.on(3, function() return mine end)
if moe.rank == 2 then
  error("of rank 2")
end
line = io.read("l")
typed by a person
moe.on(2, function() return line end)
if moe.rank == 1 then error("again") else moe.clock() end
-- a comment, and values
moe.num_ranks, "still here";
moe.num_ranks, "and here"
1 + nil
exit(3)
]=])
  local text, code = check.moelab(("--threads 1 -n 4 < '%s'"):format(input))
  equal(code, 3, text)
  contains(text, "4\n")
  contains(text, "error: [rank 2] of rank 2")
  contains(text, "typed by a person\n")
  contains(text, "error: [rank 1] again")
  contains(text, "4\tand here\n")
  contains(text, "error: attempt to perform arithmetic on a nil value")
  is(not text:find("still here", 1, true), text)
end)

check.done()
