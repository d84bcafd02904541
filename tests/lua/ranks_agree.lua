-- Where ranks could go different ways without a word: calls beside a job, standard input, files that one rank sees and another does not, tensors that differ.
local ranks = dofile(arg[0]:match("^(.*)/") .. "/lib/ranks.lua")
local check, write, run_on, line_of = ranks.check, ranks.write, ranks.run, ranks.line_of
local test, equal, is, contains = check.test, check.equal, check.is, check.contains

if not check.has_ranks("ranks agree") then return check.done() end

local beside = write("beside", [=[
  local a, b, evaluated = small { steps = 100000 }, small { steps = 100000 }, 0
  a:on("step", function() a:evaluate { max_batches = 1 } evaluated = evaluated + 1 end)
  local job = a:start(100000)
  for i = 1, 30 do
    if moe.rank == i % 2 then moe.sleep(0.003) end
    b:train(1)
    if i % 10 == 0 then b:evaluate { max_batches = 1 } end
  end
  print("trained", b.step, evaluated > 0)
  print("second job", shown(pcall(b.start, b, 5)))
  -- The job waits for b's step: it may be told something, but not be waited for.
  local told, waited
  b:on("step", function()
    if told == nil then
      told = job:pause():status()
      waited = select(2, pcall(job.wait, job, { timeout = 1 })).got
      job:resume()
    end
  end)
  b:train(1)
  print("told", told, waited, job:status())
  job:stop()
  -- And a call of all ranks inside of which a job would begin.
  local begun
  b:on("step", function() begun = begun or shown(pcall(a.start, a, 1)) end)
  b:train(1)
  print("begun", begun)
  print("waited", b:start(3):wait().step == b.step)
  local of_a = a:start(2)
  of_a:wait()
  print("after it", b:start(1):wait().step == b.step)
  all_said_the_same()
]=])

test("ranks: another run may be trained beside a job whose callbacks need all ranks", function()
  local text, code = run_on(2, beside)
  equal(code, 0, text)
  contains(text, "trained\t30\ttrue")
  contains(text, "second job\tstate rank -1: run:start | another run's job")
  contains(text, "told\tpaused\ta paused job\trunning")
  contains(text, "begun\tstate rank -1: run:start | a callback of another run")
  contains(text, "waited\ttrue")
  contains(text, "after it\ttrue")
end)

local input = write("input", [=[
  for line in io.stdin:lines() do
    print("line", line)
    if line == "two" then break end
  end
  print("number", io.stdin:read("n", "l"))
  for a, b in io.stdin:lines("n", "l") do print("pair", a, b) break end
  for a in io.stdin:lines(3) do print("three", a) break end
  print("seek", io.stdin:seek())
  local own = arg[1] .. "/own" .. moe.rank
  moe.fs.write(own, "of rank " .. moe.rank .. "\nand more\n")
  local mine = io.open(own)
  for line in mine:lines() do own = line break end
  print("own", each(function() return own .. ", " .. mine:read("l") .. ", " .. mine:seek() end))
  print("rest", io.stdin:read("a"))
  for line in io.stdin:lines() do print("nothing", line) end
  io.stdin:close()
  print("closed", shown(pcall(io.stdin.read, io.stdin)))
  all_said_the_same()
]=])

test("ranks: standard input's lines are rank 0's on all, other files are each rank's own", function()
  local typed = ranks.folder .. "/typed"
  moe.fs.write(typed, "one\ntwo\n3 four\n5 six\nseven\neight\nnine\n")
  local text, code = run_on(2, input, "< '" .. typed .. "'")
  equal(code, 0, text)
  contains(text, "line\tone\nline\ttwo\nnumber\t3\t four\npair\t5\t six\nthree\tsev\n")
  contains(text, "own\tof rank 0, and more, 19 of rank 1, and more, 19")
  contains(text, "rest\ten\neight\nnine\n\nclosed\t")
end)

local sweeps = write("sweeps", [=[
  require "moe.sweep.session".quiet = true
  -- Files come late to the machine of rank 1, which writes none.
  if moe.rank == 1 then
    local exists = moe.fs.exists
    function moe.fs.exists(path) return not path:find("/points/", 1, true) and exists(path) end
    function moe.fs.write(path) error("rank 1 writes " .. path) end
  end
  RAN, FAILS, TRAIN = 0, true, function() return small():train(1).loss end
  local function sweep()
    return moe.sweep { name = "points", base = "cpu_tiny", output_dir = arg[1], grid = { seed = { 1, 2, 3, 4 } }, fn = function(point)
      RAN = RAN + 1
      local fails = rawget(_G, "FAILS")        -- a global that fn names would be a part of the points' ids
      if fails and point.values.seed == 2 and moe.rank == 1 then error("seed 2 on rank 1") end
      if fails and point.values.seed == 4 then error("seed 4") end
      return { loss = TRAIN() }
    end }
  end
  local function show(name, s)
    local states = {}
    for i, p in ipairs(s:points()) do states[i] = p.status .. (p.error and (" (%s, rank %d)"):format(p.error.op, p.error.rank) or "") end
    print(name, RAN, table.concat(states, " "), s:table("done").rows[1] ~= nil)
  end
  local first = sweep():run { limit = 3 }
  show("first", first)
  show("second", sweep():run())
  show("third", sweep():run())
  FAILS = false
  show("mended", sweep():run { retry = true })
  print("report", #moe.fs.read(sweep():report { path = arg[1] .. "/report.md" }) > 100)
  all_said_the_same()
]=])

test("ranks: of a sweep rank 0 knows what is missing, and a point that fails on one fails on all", function()
  local text, code = run_on(2, sweeps)
  equal(code, 0, text)
  contains(text, "first\t3\tdone failed (seed 2 on rank 1, rank 1) done waiting\ttrue")
  contains(text, "second\t4\tdone failed (seed 2 on rank 1, rank 1) done failed (seed 4, rank -1)\ttrue")
  contains(text, "third\t4\tdone failed")
  contains(text, "mended\t6\tdone done done done\ttrue")
  contains(text, "report\ttrue")
end)

local tensors = write("tensors", [=[
  local run = small()
  local m, mine = run.model, moe.rank == 1 and 1 or 0
  local name = "model.layers.0.mlp.down_proj.weight"
  local value = m:parameters()[name]
  m:set(name, value * 0.5)
  print("set", shown(pcall(m.set, m, name, value + mine)))
  local wide = moe.zeros { 8, 4 }
  print("shape", shown(pcall(m.set, m, name, moe.zeros { 4 + mine, 8 })))
  print("dtype", shown(pcall(m.set, m, name, moe.zeros({ 4 }, { dtype = mine == 1 and "fp64" or "fp32" }))))
  wide[{ 7, 3 }] = mine
  print("strided", shown(pcall(m.set, m, name, wide.T)))
  local large = moe.zeros { 1000, 1000 }
  print("same", shown(pcall(m.set, m, name, large.T)))
  large[{ 999, 999 }] = mine
  print("large", shown(pcall(m.set, m, name, large.T)))
  local bias = run.model.router
  print("in a table", shown(pcall(bias.bias, bias, { layer = 1, set = moe.full({ 4 }, mine) })))
  print("an array", shown(pcall(bias.bias, bias, { layer = 1, set = moe.array(moe.full({ 4 }, mine)) })))
  print("a list", shown(pcall(bias.bias, bias, { layer = 1, set = moe.full({ 4 }, mine).shape })))
  print("another list", shown(pcall(bias.bias, bias, { layer = 1, set = moe.full({ 4 + mine }, 0).shape })))
  -- What each rank has of its own.
  local cut = small { distributed = { expert_parallel_size = 2 } }
  local ids = moe.tensor { { 1, 2, 3 + mine } }
  print("tokens", cut.model:loss(ids):item() > 0, cut.model.layers[1]:forward(moe.ones { 4, 16 } + mine).shape)
  print("on", moe.on(1, function(t) return t:sum():item() end, moe.full({ 2 }, mine)))
  print("the same", pcall(m.set, m, name, value))
  -- moe.on("all"): each its own result, one error for all.
  local r, sum = moe.on("all", function(x) return moe.rank, x:sum():item() end, moe.full({ 2 }, mine))
  print("all", each(function() return r .. ":" .. sum end))
  print("one fails", shown(pcall(moe.on, "all", function() if moe.rank == 1 then error("rank 1 alone") end os.time() return run:train(1) end)))
  print("one is early", shown(pcall(moe.on, "all", function() if moe.rank == 1 then error("rank 1 early") end end)))
  print("who", shown(pcall(moe.on, "everybody", print)))
  print("inside", shown(pcall(moe.on, 0, function() moe.on("all", print) end)))
  print("goes on", run:train(1).step)
  all_said_the_same()
]=])

test("ranks: tensors that differ are an error where all should have the same, and each rank's own where it computes with them", function()
  local text, code = run_on(2, tensors)
  equal(code, 0, text)
  local has = function(name, part)
    local line = line_of(text, name .. "\t")
    is(line, name .. " was not printed: " .. text)
    contains(line, part)
  end
  for _, name in ipairs { "set", "shape", "dtype", "strided", "large", "in a table", "an array", "another list" } do has(name, "dist rank 1: ranks with different arguments | rank 0: ") end
  has("same", "shape rank -1: ")
  is(not line_of(text, "a list\t"):find("different arguments", 1, true), text)
  has("tokens", "true\t[4, 16]")
  has("on", "2")
  has("the same", "true\t")
  has("all", "0:0 1:2")
  has("one fails", "lua rank 1: rank 1 alone")
  has("one is early", "lua rank 1: rank 1 early")
  has("who", "usage rank -1: moe.on: rank")
  has("inside", "state rank 0: moe.on | all ranks inside of what rank 0 does alone")
  has("goes on", "1")
end)

check.done()
