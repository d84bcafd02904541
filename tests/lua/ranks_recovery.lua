-- Ranks of which one fails before anything is sent, amid a trace, in a function of an intervention, or while the state changes: all get its error soon, and know what is left.
local ranks = dofile(arg[0]:match("^(.*)/") .. "/lib/ranks.lua")
local check, write, run_on = ranks.check, ranks.write, ranks.run
local test, equal, contains = check.test, check.equal, check.contains

if not check.has_ranks("ranks recover") then return check.done() end

-- Rank 1 calls a method of something else: an error of its own, while the other is on its way to the call's collectives.
local before = write("before", [=[
  local cut = { distributed = { expert_parallel_size = 2 } }
  local want, run = small(cut), small(cut)
  want:train(1)
  run:train(1)
  local function one(name, of, ...)
    print(name, shown(pcall(of[name], moe.rank == 1 and moe.config or of, ...)))
  end
  local router, folder, ids = run.model.router, arg[1], moe.zeros({ 2, 16 }, { dtype = "int64" })
  local start = moe.clock()
  one("train", run, 1)
  one("evaluate", run)
  one("save", run, folder .. "/saved")
  one("restore", run, folder .. "/saved")
  one("set", run, { learning_rate = 1e-3 })
  one("trace", run)
  one("close", run)
  one("trace", run.model, ids)
  one("set", run.model, "lm_head.weight", run.model:parameters()["lm_head.weight"])
  one("mask", router, { layer = 1, expert = 1 })
  one("swap", router, { layer = 1, experts = { 0, 1 } })
  print("in time", moe.clock() - start < 30)
  print("goes on", run:train(1).loss == want:train(1).loss, run:evaluate().loss == want:evaluate().loss)
  all_said_the_same()
]=])

test("ranks: a call that fails on one rank before its collectives is over on all at once, and the run goes on bit for bit", function()
  local text, code = run_on(2, before)
  equal(code, 0, text)
  for _, name in ipairs { "train", "evaluate", "save", "restore", "set", "trace", "close", "mask", "swap" } do contains(text, name .. "\tusage rank 1: ") end
  equal(select(2, text:gsub("\nset\tusage rank 1", "")), 2, text)
  equal(select(2, text:gsub("\ntrace\tusage rank 1", "")), 2, text)
  contains(text, "in time\ttrue")
  contains(text, "goes on\ttrue\ttrue")
end)

-- The second half of a checkpoint that cannot be read is found when the first has been taken.
local broken = write("broken", [=[
  local run = small { distributed = { expert_parallel_size = 2 } }
  run:train(2)
  local good, bad = run:save(arg[1] .. "/good"), run:save(arg[1] .. "/bad")
  moe.on(0, function()
    local file = bad .. "/rank_1.safetensors"
    local bytes = moe.fs.read(file)
    moe.fs.write(file, bytes:sub(1, -2) .. string.char(bytes:byte(-1) ~ 1))
  end)
  local function follow(r)
    local list = {}
    for i = 1, 2 do list[i] = r:train(1).loss end
    list[3] = r:evaluate().loss
    return table.concat(list, " ")
  end
  local want = follow(run)
  local function breaks()
    local ok, e = pcall(run.restore, run, bad)
    print("breaks", ok, e.kind, tostring(e):find("rank_1.safetensors", 1, true) ~= nil)
  end
  breaks()
  for _, call in ipairs {
    { "train", function() run:train(1) end }, { "start", function() run:start(1):wait() end }, { "save", function() run:save(arg[1] .. "/third") end }, { "evaluate", function() run:evaluate() end },
    { "trace", function() run:trace { batches = 1 } end }, { "set", function() run:set { learning_rate = 1e-3 } end }, { "mask", function() run.model.router:mask { layer = 1, expert = 1 } end },
  } do
    local ok, e = pcall(call[2])
    print(call[1], ok, e.kind, e.rank, e.got:find("half changed", 1, true) ~= nil, e.hint:find("run:restore", 1, true) ~= nil)
  end
  print("nothing saved", moe.fs.exists(arg[1] .. "/third"))
  run:restore(good)
  print("restored", run.step, follow(run) == want)
  breaks()
  local again = moe.resume(good, {}, { console = false, log = false })
  print("resumed", again.step, follow(again) == want)
  print("still", select(2, pcall(run.train, run, 1)).kind)
  run:restore(good)
  print("whole", follow(run) == want)
  all_said_the_same()
]=])

test("ranks: a run whose state is half changed says so until it is restored, or another is made of its checkpoint", function()
  local text, code = run_on(2, broken)
  equal(code, 0, text)
  equal(select(2, text:gsub("breaks\tfalse\tdata\ttrue", "")), 2, text)
  for _, name in ipairs { "train", "start", "save", "evaluate", "trace", "set", "mask" } do contains(text, name .. "\tfalse\tstate\t-1\ttrue\ttrue") end
  contains(text, "nothing saved\tfalse")
  contains(text, "restored\t2\ttrue")
  contains(text, "resumed\t2\ttrue")
  contains(text, "still\tstate")
  contains(text, "whole\ttrue")
end)

-- Experts and tokens on two ranks: while one fails the other waits for its tokens.
local amid = write("amid", [=[
  local layout = { distributed = { expert_parallel_size = 2 } }
  local want, run = small(layout), small(layout)
  local function ids(last)
    local t = moe.arange(64):reshape { 4, 16 }
    t[3] = last
    return t
  end
  local function same(a, b) return a:ids():equal(b:ids()) and a:experts(1):equal(b:experts(1)) and a:weights(1):equal(b:weights(1)) end
  local first = run.model:trace(ids(5))
  print("trace", shown(pcall(run.model.trace, run.model, ids(9999))))
  print("trace again", same(run.model:trace(ids(5)), first))
  -- Functions that an intervention has brought.
  local hook = run.model.router:hook("post_topk", function() if moe.rank == 1 then error("hook") end end)
  print("hook in a trace", shown(pcall(run.model.trace, run.model, ids(5))))
  print("hook in a run's trace", shown(pcall(run.trace, run, { batches = 1 })))
  print("hook in a step", shown(pcall(run.train, run, 1)))
  hook:undo()
  print("without it", same(run.model:trace(ids(5)), first))
  run.optimizer = function(name, value, grad)
    if moe.rank == 1 and name == "model.norm.weight" then error("optimizer") end
    return value - grad
  end
  print("optimizer", shown(pcall(run.train, run, 1)))
  run:undo()
  run.model.router.balance = function(_, bias) if moe.rank == 1 then error("balance") end return bias end
  print("balance", shown(pcall(run.train, run, 1)))
  run:undo()
  print("goes on", run:train(1).loss == want:train(1).loss, run:train(1).loss == want:train(1).loss)
  all_said_the_same()
]=])

test("ranks: a trace, and an intervention's function, that fail on one rank amid collectives fail on all and leave nothing behind", function()
  local text, code = run_on(2, amid)
  equal(code, 0, text)
  contains(text, "trace\tdata rank 1: model: token ids | ")
  for _, name in ipairs { "trace again", "without it" } do contains(text, name .. "\ttrue") end
  for name, parts in pairs {
    ["hook in a trace"] = { "hook post_topk, ", "layer 1, outside of training: hook | " }, ["hook in a run's trace"] = { "hook post_topk, ", "layer 1, outside of training: hook | " },
    ["hook in a step"] = { "hook post_topk, ", "layer 1, at step 1: hook | " }, optimizer = { "run.optimizer, ", "model.norm.weight, at update 1: optimizer | " }, balance = { "router.balance, ", "layer 1, at step 1: balance | " },
  } do
    local line = ("\n" .. text):match("\n" .. name:gsub("%p", "%%%0") .. "\tlua rank 1: ([^\n]*)")
    check.is(line and line:find(parts[1], 1, true) == 1 and line:find(parts[2], 1, true), name .. ": " .. text)
  end
  contains(text, "goes on\ttrue\ttrue")
end)

check.done()
