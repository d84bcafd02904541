-- What `moelab bench lua` measures: the cost of a bound call, of tensor arithmetic beside what C++ pays for it, and of training in the background.
-- Calls: seconds of the processor, best of several rounds: what else runs on the machine only adds. Background: wall time, in turns, the mean.
local function best(rounds, f)
  local least = math.huge
  for _ = 1, rounds do least = math.min(least, f()) end
  return least
end

local function loop_secs(n, f)
  local start = os.clock()
  for _ = 1, n do f() end
  return (os.clock() - start) / n
end

-- Time of steps in the background over that of as many in the foreground, in turns: the mean of the rounds and its standard error.
local function background(rounds, steps)
  local config = moe.config("cpu_quick"):with { training = { train_steps = 1 << 20 }, data = { dataset_type = "synthetic" }, validation = { enabled = false }, checkpointing = { save_on_exit = false } }
  local run <close> = moe.run { config = config, console = false, log = false }
  run:train(math.min(2, steps))
  local ratios = {}
  for i = 1, rounds do
    local start = moe.clock()
    run:train(steps)
    local middle = moe.clock()
    run:start(steps):wait()
    ratios[i] = (moe.clock() - middle) / (middle - start)
  end
  return moe.statistics.mean(ratios), moe.statistics.std(ratios) / math.sqrt(rounds)
end

local function bench_lua(options)
  options = moe.check_keys(options or {}, { "rounds", "calls", "steps" }, "moe.bench_lua: options")
  local rounds, n = options.rounds or 15, options.calls or 20000
  local nothing, a, b = moe.bench.nothing, moe.ones { 4 }, moe.ones { 4 }
  local lua_add, cpp_add = math.huge, math.huge
  -- Both in turns, so that both see the same clock and neighbours.
  for _ = 1, rounds do
    local cpp = moe.bench.add_secs(a, b, n)
    local lua = loop_secs(n, function() return a + b end)
    cpp_add, lua_add = math.min(cpp_add, cpp), math.min(lua_add, lua)
  end
  local function empty() end
  local ratio, ratio_se = background(rounds, options.steps or 4)
  local call = best(rounds, function() return loop_secs(10 * n, nothing) end)
  return {
    name = "lua", value = call * 1e9, unit = "ns a call", empty_call_secs = call, lua_call_secs = best(rounds, function() return loop_secs(10 * n, empty) end),
    add_secs = lua_add, add_cpp_secs = cpp_add, add_ratio = lua_add / cpp_add,
    index_secs = best(rounds, function() return loop_secs(n, function() return a[1] end) end), field_secs = best(rounds, function() return loop_secs(n, function() return a.dtype end) end),
    method_secs = best(rounds, function() return loop_secs(n, function() return a:dim() end) end), background_ratio = ratio, background_ratio_se = ratio_se, commit = moe.commit,
  }
end

return moe.document(bench_lua, "moe.bench_lua",
  "moe.bench_lua {rounds = 15, calls = 20000, steps = 4}: what `moelab bench lua` measures, in seconds of the processor: an empty bound call, a + b of 4 numbers from Lua and in C++ and their ratio, t[1], t.dtype, t:dim(); and background_ratio: how much longer `steps` steps of cpu_quick take in the background than in the foreground, the mean of the rounds, with its standard error.")
