-- Runs points: here, or as processes of this program.
local carry, metrics, spec, store = require "moe.sweep.carry", require "moe.sweep.metrics", require "moe.sweep.spec", require "moe.sweep.store"
local session = require "moe.sweep.session"
local runner = {}

local FIELDS = { "kind", "op", "got", "want", "hint", "where", "rank", "traceback" }

-- An error as plain data, with where it was raised.
local function error_data(err)
  local data = {}
  if type(err) == "table" and err.kind then
    for _, name in ipairs(FIELDS) do data[name] = err[name] end
  else
    data.kind, data.op = "lua", tostring(err)
  end
  data.text = tostring(err)
  if (data.traceback or "") == "" then data.traceback = debug.traceback(nil, 2) end
  return data
end

-- Where any rank was.
local function stop_if_asked()
  local asked = false
  for rank = 0, moe.num_ranks - 1 do asked = moe.on(rank, moe.stopping) or asked end
  if asked then moe.fail { kind = "interrupted", op = "interrupted" } end
end

--- Calls fn at a point and keeps what came of it in its file. An interrupt is raised on: the point stays missing.
function runner.attempt(folder, sweep_name, point, fn)
  local cfg = point.config:with { output_dir = folder .. "/runs" }
  local start = moe.clock()
  -- On several ranks a point that fails on one fails on all.
  local ok, result = xpcall(moe.on, error_data, "all", function() return store.plain_result(fn(point, { config = cfg, name = point.id, console = false })) end)
  if not ok and result.kind == "interrupted" then moe.fail { kind = "interrupted", op = "interrupted" } end
  stop_if_asked()
  point.secs, point.commit, point.device, point.finished = moe.clock() - start, moe.commit, moe.default_device(), os.time()
  point.status, point.result, point.error = ok and "done" or "failed", ok and result or nil, not ok and result or nil
  store.write(folder, sweep_name, point)
  store.refresh(folder, point)                -- as a later session reads it
  collectgarbage()
  collectgarbage()                            -- what the first one closed, such as a model
end

local function say_failed(s, point)
  if session.quiet then return end
  print(("point %s (%s) failed: %s"):format(point.id, spec.describe(s.keys, point.values), point.error.text or "?"))
end

local function run_here(s, points, bar, done)
  for _, point in ipairs(points) do
    stop_if_asked()
    if not store.refresh(s.folder, point) then                 -- another session may have run it meanwhile
      local before = done()
      point.progress = function(share, text) bar:update(before + math.min(share, 1), ("%s: %s"):format(spec.describe(s.keys, point.values), text or "")) end
      point.progress(0, "")
      runner.attempt(s.folder, s.name, point, s.fn)
    end
    if point.status == "failed" then say_failed(s, point) end
    if not s.trains then metrics.check_all(s) end
    bar:update(done())
  end
end

-- --- processes ---

local function write_job(s)
  moe.fs.write(s.folder .. "/fn.json", moe.json.encode(carry.pack(s.fn)))
  moe.fs.write(s.folder .. "/worker.lua", "require(\"moe.sweep.runner\").work(arg[1], arg[2])\n")
end

--- One point in a process of its own: `moelab run worker.lua FOLDER ID`.
function runner.work(folder, id)
  local saved = store.read(folder, id)
  if not saved then moe.fail { kind = "state", op = "sweep: point " .. id, got = "no file", want = store.path(folder, id) } end
  local fn = carry.unpack(moe.json.decode(store.text(folder .. "/fn.json"), folder .. "/fn.json"))
  local point = { id = id, values = saved.values, budget = saved.budget, round = saved.round, config = moe.config(saved.config), progress = function() end }
  runner.attempt(folder, saved.sweep, point, fn)
end

local function start_process(s, point, jobs)
  local words = { moe.executable(), "--device", moe.default_device(), "--threads", tostring(math.max(1, moe.num_threads() // jobs)), "run" }
  if s.ranks > 1 then table.move({ "--ranks", tostring(s.ranks) }, 1, 2, #words + 1, words) end
  table.move({ s.folder .. "/worker.lua", s.folder, point.id }, 1, 3, #words + 1, words)
  return moe.spawn(words, { output = ("%s/logs/%s.txt"):format(s.folder, point.id) })
end

local function died(s, point, code)
  local log = ("%s/logs/%s.txt"):format(s.folder, point.id)
  local last = ""
  if moe.fs.exists(log) then
    for line in moe.fs.read(log):gmatch("[^\n]+") do last = line end
  end
  point.status, point.finished = "failed", os.time()
  point.error = { kind = "state", op = "process of the point", got = ("exit code %d"):format(code), want = "a result", hint = "its output is in " .. log, text = ("its process ended with code %d: %s"):format(code, last) }
  store.write(s.folder, s.name, point)
end

local function run_processes(s, points, jobs, bar, done)
  write_job(s)
  moe.fs.mkdir(s.folder .. "/logs")
  local running, places, next_point = {}, {}, 1
  local _ <close> = setmetatable({}, { __close = function()                 -- an error ends those that run
    for _, process in ipairs(running) do process:free() end
  end })
  while next_point <= #points or #running > 0 do
    while #running < jobs and next_point <= #points do
      local point = points[next_point]
      next_point = next_point + 1
      if not store.refresh(s.folder, point) then
        running[#running + 1], places[#places + 1] = start_process(s, point, jobs), point
      end
    end
    bar:update(done(), ("%d running"):format(#running))
    if #running > 0 then
      local i, code = moe.wait_any(running, { timeout_secs = 1 })
      if i then
        local point = table.remove(places, i)
        table.remove(running, i):free()
        if not store.refresh(s.folder, point) and code ~= 130 then died(s, point, code) end
        if point.status == "failed" then say_failed(s, point) end
        if not s.trains then metrics.check_all(s) end
      end
    end
  end
end

--- Runs points that have no result. options: jobs (0: here), bar, done (how many have ended).
function runner.run(s, points, options)
  if options.jobs == 0 then run_here(s, points, options.bar, options.done) else run_processes(s, points, options.jobs, options.bar, options.done) end
end

return runner
